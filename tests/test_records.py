"""Committed records: the same command still gives their losses. On the real corpus, and the kind of machine they were made on."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from vdrop_cli import corpora, environment, runs
from vdrop_cli.commands.train import Run
from vdrop_cli.runs import Finished
from vdrop_cli.tasks import LanguageModelling

RECORDS = Path(__file__).parent.parent / "outputs" / "record"
STEPS = 100
SAME = ("device", "torch", "precision", "backend", "fp32_products")  # of the environment, for losses to be the same


def records() -> list[Finished]:
    """Small ones, of which a hundred steps take seconds, and that say what they were made with."""
    found = runs.below(RECORDS)
    return [run for run in found if run.train.model.hidden_size <= 200 and "precision" in run.environment]


@pytest.mark.parametrize("record", records(), ids=lambda record: record.folder.relative_to(RECORDS).as_posix())
def test_a_record_is_still_what_its_command_gives(record: Finished, real_data: Path, tmp_path: Path) -> None:
    config = record.train
    device, threads = torch.device("cpu"), torch.get_num_threads()
    corpus = corpora.load(config.data)
    environment.make_ready(device)
    here = environment.describe(device, config.backend.name, config.precision.name)
    if any(here[name] != record.environment[name] for name in SAME):
        pytest.skip(f"made with {', '.join(str(record.environment[name]) for name in SAME)}")
    torch.set_num_threads(record.environment["threads"])
    try:
        run = Run(config, LanguageModelling(config.task, corpus, device), tmp_path)
        losses = {step.step: step.loss for step in islice(run.train_epoch(), STEPS)}
    finally:
        torch.set_num_threads(threads)
    recorded = {told["step"]: told["loss"] for told in record.log if told["kind"] == "step" and told["step"] <= STEPS}
    assert len(recorded) == STEPS // config.log_every
    assert {step: losses[step] for step in recorded} == pytest.approx(recorded, rel=1e-4), (
        "This record no longer reproduces. If a change was meant to alter training, make its record anew; if not, it is a bug."
    )


def test_records_hold_what_they_are_to() -> None:
    for run in runs.below(RECORDS):
        assert run.log[0]["kind"] == "start" and run.log[-1] == {"kind": "result", **run.result}, run.folder
        assert json.loads((run.folder / "result.json").read_text()) == run.result
        assert [epoch["epoch"] for epoch in run.epochs] == list(range(1, run.result["epochs"] + 1))
