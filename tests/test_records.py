"""Committed records: the same command still gives their losses. On the real corpus, and the kind of machine they were made on."""

import json
from itertools import islice
from pathlib import Path
from statistics import fmean, median

import pytest
import torch

from vdrop_cli import environment, runs, tasks
from vdrop_cli.commands.train import Run
from vdrop_cli.runs import Finished

RECORDS = Path(__file__).parent.parent / "outputs" / "record"
pytestmark = pytest.mark.skipif(not RECORDS.exists(), reason="a source distribution holds no records")
SMALL, STEPS, STEPS_OF_LARGE = 200, 100, 10  # units, and how many steps are made again
SAME = ("device", "torch", "precision", "backend", "fp32_products")  # of the environment, for losses to be the same


def steps_of(run: Finished) -> int:
    """So many that they take seconds."""
    return STEPS if run.train.model.hidden_size <= SMALL else STEPS_OF_LARGE


def records() -> list[Finished]:
    """That say what they were made with and hold a loss of these steps; of large ones the first seed."""
    found = [run for run in runs.below(RECORDS) if "precision" in run.environment and run.train.log_every <= steps_of(run)]
    first = {run.folder.parent: run for run in reversed(found)}
    return [run for run in found if run.train.model.hidden_size <= SMALL or run is first[run.folder.parent]]


@pytest.mark.parametrize("record", records(), ids=lambda record: record.folder.relative_to(RECORDS).as_posix())
def test_a_record_is_still_what_its_command_gives(record: Finished, real_data: Path, tmp_path: Path) -> None:
    config = record.train
    device, threads = torch.device("cpu"), torch.get_num_threads()
    environment.make_ready(device)
    here = environment.describe(device, config.backend.name, config.precision.name)
    if any(here[name] != record.environment[name] for name in SAME):
        pytest.skip(f"made with {', '.join(str(record.environment[name]) for name in SAME)}")
    torch.set_num_threads(record.environment["threads"])
    try:
        run = Run(config, tasks.load(config, device), tmp_path)
        losses = {step.step: step.loss for step in islice(run.train_epoch(), steps_of(record))}
    finally:
        torch.set_num_threads(threads)
    recorded = {told["step"]: told["loss"] for told in record.log if told["kind"] == "step" and told["step"] <= steps_of(record)}
    recorded = {step: loss for step, loss in recorded.items() if step in losses}  # an epoch may be shorter
    assert len(recorded) == len(losses) // config.log_every > 0
    assert {step: losses[step] for step in recorded} == pytest.approx(recorded, rel=1e-4), (
        "This record no longer reproduces. If a change was meant to alter training, make its record anew; if not, it is a bug."
    )


def of_window(run: Finished, window: str) -> float:
    """Mean loss of the steps from-to, in nats a word."""
    first, last = map(int, window.split("-"))
    losses = {told["step"]: told["loss"] for told in run.log if told["kind"] == "step"}
    return fmean(losses[step] for step in range(first, last + 1))


def test_the_table_of_the_authors_run_is_what_its_records_hold() -> None:
    """In findings.md: a column for theirs, then one for each record, by seed."""
    theirs = json.loads((RECORDS / "authors_1250" / "theirs.json").read_text())
    found = runs.below(RECORDS / "authors_1250")
    lines = (RECORDS / "findings.md").read_text().splitlines()
    table = {name: values for name, *values in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|"))}
    assert len(found) == 3 and table["seed"] == ["theirs", *(str(run.train.seed) for run in found)]
    for window, loss in theirs["loss"].items():
        assert table[f"loss, steps {window}"] == [f"{value:.2f}" for value in (loss, *(of_window(run, window) for run in found))]
    for epoch, ppl in theirs["valid_ppl_as_published"].items():
        measured = [[f"{told['valid_ppl_as_published']:.1f}" for told in run.epochs if str(told["epoch"]) == epoch] for run in found]
        assert table[f"validation, epoch {epoch}"] == [str(ppl), *("".join(value) or "–" for value in measured)]


def test_the_table_of_first_epochs_is_what_its_records_hold() -> None:
    """In findings.md: a row for each medium one, with the time of its 39 epochs at the speed of the first."""
    found = runs.below(RECORDS / "medium_first_epoch")
    lines = (RECORDS / "findings.md").read_text().splitlines()
    assert len(found) == 6 and all(run.train.schedule.epochs == run.result["epochs"] == 1 for run in found)
    for run in found:
        assert run.train.published is not None
        steps = [told for told in run.log if told["kind"] == "step"]
        speed, words = median(told["words_per_second"] for told in steps), run.epochs[0]["step"] * 20 * 35
        hours = 39 * words / speed / 3600
        assert f"| {run.train.published.row} | {run.result['valid_ppl']:.1f} | {speed:,.0f} | {hours:.1f} |" in lines


def test_records_hold_what_they_are_to() -> None:
    for run in runs.below(RECORDS):
        assert run.log[0]["kind"] == "start" and run.log[-1] == {"kind": "result", **run.result}, run.folder
        assert json.loads((run.folder / "result.json").read_text()) == run.result
        assert [epoch["epoch"] for epoch in run.epochs] == list(range(1, run.result["epochs"] + 1))
