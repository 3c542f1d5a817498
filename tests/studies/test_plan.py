"""What rows need, and how long it takes; whole studies are made in tests/commands/test_reproduce.py."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, TINY_SENTIMENT, settings
from vdrop_cli import checkpoint, corpora, tasks
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.provenance import device_name
from vdrop_cli.settings.choices import Backend, Precision
from vdrop_cli.settings.commands import Reproduce
from vdrop_cli.settings.train import Train
from vdrop_cli.studies import plan
from vdrop_cli.studies.plan import Plan, PlannedEvaluation, RunFactory, Training
from vdrop_cli.studies.processes import Commands, train_arguments
from vdrop_cli.studies.study import Row
from vdrop_cli.tasks import LanguageModelling


def row_of(settings: Train, name: str = "it", samples: int = 0) -> Row:
    return Row(name, (), (), settings, (), Evaluation(samples=samples))


def test_a_run_whose_checkpoints_are_damaged_is_reported_and_no_reason_to_stop(
    tmp_path: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(*TINY, *text, f"outputs={tmp_path}")
    task = LanguageModelling(config.task, corpora.load_text(config.data), torch.device("cpu"))
    training = Training(row_of(config), config, task)
    training.folder.mkdir(parents=True)
    checkpoint.path_of(training.folder, 1).write_bytes(b"damaged")
    assert training.epochs_done == 0.0
    assert f"{training.folder} holds no checkpoint that can be used" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["language_model", "sentiment"])
def test_a_plan_lists_what_is_left_with_its_time(
    task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: list[str],
    rated: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(*TINY, *text) if task == "language_model" else settings(*TINY_SENTIMENT, *rated)
    factory = RunFactory(Reproduce(precision=Precision.fp32))
    training = factory.training(row_of(config), 3)
    passes = PlannedEvaluation(row_of(config, "by passes", samples=2), [training])
    assert training.settings.seed == 3 and not passes.is_finished
    planned = Plan({training.folder: training}, {(training.folder, 1, 2): passes})
    plan.print_plan(planned, factory)
    shown = capsys.readouterr().err
    time = r"(\d+ (h|min|s) ?)+"
    assert re.search(
        rf"it seed 3: {time} \(0 of 1 epochs are done\)\n"
        rf"  by passes seed 3 \(MC, 2 samples\): {time}\n  together: {time}\n",
        shown,
    )
    assert re.search(
        rf"on {re.escape(device_name(factory.device))} \(\d+ threads?, back end \w+, fp32\)", shown
    )
    with pytest.raises(RunError, match=r"-s3 is not finished, nor are 1 others; the same command resumes"):
        planned.require_finished()
    train.run(training.settings)
    assert training.is_finished
    with pytest.raises(RunError, match=r"^by passes seed 3 is not finished; "):
        planned.require_finished()
    assert [argument.split("=")[0] for argument in passes.arguments] == [
        "checkpoint",
        "stored_data",
        "mc_samples",
        "device",
        "backend",
        "precision",
    ]
    assert settings(*replace(passes, mc_batch=7).arguments, command="eval").mc_batch == 7
    together = replace(passes, trainings=[training] * 2, mc_batch=7)
    assert settings(*together.arguments, command="eval").mc_batch is None, "an ensemble has no passes"


def test_runs_on_other_machines_are_planned_by_the_settings_that_they_are_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """This machine need not have the device; its own would give the run folder another name."""
    monkeypatch.chdir(tmp_path)
    place = {"device": "cuda", "backend": Backend.triton, "precision": Precision.bf16}
    asked = Reproduce(launcher="submitit_slurm hydra.launcher.gres=gpu:1", **place)
    factory, config = RunFactory(asked), settings(*TINY, *text)
    training = factory.training(row_of(config), 1)
    made = replace(config, outputs="outputs", **place)
    assert training.folder == checkpoint.run_folder(made, training.task.fingerprint)
    words = train_arguments([training], asked)
    assert {"device=cuda", "backend=triton", "precision=bf16", "hydra.launcher.gres=gpu:1"} <= {*words}
    plan.print_plan(Plan({training.folder: training}), factory)
    assert capsys.readouterr().err.splitlines() == [
        "what is needed, by launcher=submitit_slurm hydra.launcher.gres=gpu:1:",
        "  it seed 1: 0 of 1 epochs are done",
    ]
    assert Commands(asked).sweep_words[:2] == ["-m", "hydra/launcher=submitit_slurm"], "evaluations, too"
    for wrong, message in (
        ({"device": "cdua"}, "^device must be cpu, cuda or cuda:N, got cdua"),
        ({"device": "cpu"}, "^backend must be native, fused or reference with device=cpu, got triton"),
    ):
        with pytest.raises(ConfigError, match=message):
            RunFactory(replace(asked, **wrong))
    assert Commands(Reproduce(jobs=2)).sweep_words == []


def test_a_text_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rated: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    factory, loaded = RunFactory(Reproduce(precision=Precision.fp32)), []
    load = tasks.load
    monkeypatch.setattr(tasks, "load", lambda *of: loaded.append(of) or load(*of))
    for more in ([], ["dropout=none"], ["task.protocol=clean"]):
        factory.training(row_of(settings(*TINY_SENTIMENT, *rated, *more)), 1)
    assert len(loaded) == 2, "each protocol splits it anew"
