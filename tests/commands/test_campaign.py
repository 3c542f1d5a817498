"""Many runs as one piece of work: what is finished, what the rest takes. Whole campaigns are in
test_reproduce and test_figures.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, TINY_SENTIMENT, settings
from vdrop_cli import checkpoint, corpora, tasks
from vdrop_cli.commands import train
from vdrop_cli.commands.campaign import Commands, Cost, Evaluation, Maker, Training, announce, require_all
from vdrop_cli.errors import RunError
from vdrop_cli.model import LanguageModel
from vdrop_cli.settings.choices import Precision
from vdrop_cli.settings.train import Published
from vdrop_cli.sinks import read_log
from vdrop_cli.tasks import LanguageModelling, Sentiment


def test_a_run_whose_checkpoints_are_damaged_is_told_and_no_reason_to_stop(
    tmp_path: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(*TINY, *text, f"outputs={tmp_path}")
    training = Training(
        "none", config, LanguageModelling(config.task, corpora.load(config.data), torch.device("cpu"))
    )
    training.folder.mkdir(parents=True)
    checkpoint.path_of(training.folder, 1).write_bytes(b"damaged")
    assert training.epochs_done == 0.0
    assert f"{training.folder} holds no checkpoint that can be used" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["language_model", "sentiment"])
def test_what_is_to_be_done_is_told_with_its_time_until_it_is_done(
    task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: list[str],
    rated: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(*TINY, *text) if task == "language_model" else settings(*TINY_SENTIMENT, *rated)
    training = Maker(Precision.fp32, "outputs").training("it", config, 3)
    passes = Evaluation("by passes", Published("a row", mc_samples=2), [training])
    assert training.settings.seed == 3 and not passes.is_finished
    announce([training], [passes], [])
    told = capsys.readouterr().err
    assert re.search(
        r"it seed 3: \d+:\d\d \(0 of 1 epochs are done\)\n  by passes seed 3: \d+:\d\d\n  together: "
        r"\d+:\d\d\n",
        told,
    )
    with pytest.raises(RunError, match=r"-s3 is not finished, nor are 1 others; the same command resumes"):
        require_all([training], [passes])
    train.run(training.settings)
    assert training.is_finished
    with pytest.raises(RunError, match=r"^by passes seed 3 is not finished; "):
        require_all([training], [passes])
    assert [argument.split("=")[0] for argument in passes.arguments] == [
        "checkpoint",
        "stored_data",
        "mc_samples",
        "device",
        "precision",
    ]
    assert settings(*replace(passes, mc_batch=7).arguments, command="eval").mc_batch == 7
    together = replace(passes, trainings=[training] * 2, mc_batch=7)
    assert settings(*together.arguments, command="eval").mc_batch is None, "an ensemble has no passes"


def test_when_the_time_is_up_what_runs_is_stopped_and_saved_and_nothing_else_begins(
    tmp_path: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A real process, which has minutes of training before it."""
    config = settings(*TINY, *text, f"outputs={tmp_path}", "schedule.epochs=100000")
    arguments = [change for change in (*TINY, *text) if not change.startswith("schedule.epochs")]
    commands = Commands("12s")
    commands.vdrop("train", *arguments, f"outputs={tmp_path}", "schedule.epochs=100000")
    assert commands.time_is_up and "until=12s has passed; stopping what runs" in capsys.readouterr().err
    training = Maker(Precision.fp32, str(tmp_path)).training("it", config, config.seed)
    last = [
        record["epoch"] for record in read_log(training.folder / "log.jsonl") if record["kind"] == "epoch"
    ][-1]
    assert last <= training.epochs_done < last + 1 and training.epochs_done > 0 and not training.is_finished
    commands.vdrop("train", *arguments, "outputs=nothing-begins")
    assert capsys.readouterr().err == ""


def test_a_text_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rated: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    maker, loaded = Maker(Precision.fp32, "outputs"), []
    load = tasks.load
    monkeypatch.setattr(tasks, "load", lambda *of: loaded.append(of) or load(*of))
    for more in ([], ["dropout=none"], ["task.protocol=clean"]):
        maker.training("it", settings(*TINY_SENTIMENT, *rated, *more), 1)
    assert len(loaded) == 2, "each protocol splits it anew"


def test_reading_costs_in_proportion_to_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rated: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    training = Maker(Precision.fp32, "outputs").training("it", settings(*TINY_SENTIMENT, *rated), 1)
    cost, task = Cost(training), training.task
    assert isinstance(task, Sentiment)
    words = sum(task.parts["train"].lengths) + sum(task.parts["test"].lengths)
    assert cost.reading(task.parts.values()) == pytest.approx(cost.a_word * words)
    assert cost.mc(10, None) == pytest.approx(10 * cost.mc(1, None)) and cost.epoch > 0


def test_the_time_of_passes_is_measured_with_as_many_as_run_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cost = Cost(Maker(Precision.fp32, "outputs").training("it", settings(*TINY, *text), 1))
    batches: list[int] = []
    zero_state = LanguageModel.zero_state
    monkeypatch.setattr(
        LanguageModel, "zero_state", lambda model, batch: batches.append(batch) or zero_state(model, batch)
    )
    for samples, mc_batch in ((1000, None), (1000, 7), (5, 7)):
        cost.mc(samples, mc_batch)
    assert batches == [50, 7, 5]
