"""The average of weights: by hand, in training, in evaluation and in an export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import TINY, TINY_SENTIMENT, settings
from vdrop_cli import checkpoint
from vdrop_cli.averaging import Average, average_begins
from vdrop_cli.commands import eval as evaluation
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError
from vdrop_cli.sinks import read_log

MEAN = ["schedule.average_decay=1", "schedule.average_from=1"]


def averaged(decay: float, values: list[float]) -> float:
    model = nn.Linear(1, 1, bias=False)
    average = Average(model, decay)
    for value in values:
        nn.init.constant_(model.weight, value)
        average.update()
    with average.in_model():
        inside = model.weight.item()
    assert model.weight.item() == values[-1] and average.count == len(values)
    return inside


def test_every_update_counts_the_same_with_decay_1_and_fades_below() -> None:
    """With decay 0.6 the third update counts 0.4, the two before it the mean's 0.3 each."""
    assert averaged(1, [2.0, 4, 9]) == pytest.approx(5)
    assert averaged(0.6, [2.0, 4, 9]) == pytest.approx(0.6 * 3 + 0.4 * 9)
    assert averaged(0.6, [2.0, 4, 9, 1]) == pytest.approx(0.6 * (0.6 * 3 + 0.4 * 9) + 0.4)


def test_before_the_first_update_the_model_is_as_it_is() -> None:
    model = nn.Linear(1, 1)
    average = Average(model, 1)
    with average.in_model():
        nn.init.constant_(model.weight, 7)
    assert model.weight.item() == 7 and average.state_dict() == {}


def test_the_average_begins_when_validation_stops_getting_better() -> None:
    """Merity et al. 2018: worse than the best of all but the last two before, with a trigger of two epochs.

    The sixth of these, 5, is not worse than the best of 9 5 6; the last of the second list is worse than the
    best of 9 5 6 4.
    """
    schedule = settings("schedule.average_decay=1", "schedule.average_trigger=2").schedule
    first = [9.0, 5, 6, 4, 4.5, 5]
    assert not any(average_begins(schedule, [*first, 3.0][:epoch]) for epoch in range(8))
    begun = [average_begins(schedule, [*first, 4.2, 1.0][:epoch]) for epoch in range(9)]
    assert begun == [False] * 7 + [True] * 2, "and does not end when it gets better again"
    fixed = settings("schedule.average_decay=1", "schedule.average_from=3").schedule
    assert [average_begins(fixed, first[:epoch]) for epoch in range(6)] == [False] * 3 + [True] * 3
    assert not average_begins(settings().schedule, first)


@pytest.fixture
def finished(text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of three epochs, the last two of which are averaged."""
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text, *MEAN, "schedule.epochs=3", "schedule.lr=4"))
    (folder,) = Path("outputs/train").glob("*/*")
    return folder


def test_validation_and_result_are_of_the_average_and_the_weights_stand_beside(finished: Path) -> None:
    newest = checkpoint.load(checkpoint.all_in(finished)[0])
    result = json.loads((finished / "result.json").read_text())
    epochs = [record for record in read_log(finished / "log.jsonl") if record["kind"] == "epoch"]
    assert newest.averaged == epochs[-1]["step"] - epochs[0]["step"]
    assert "valid_ppl_batched_raw" not in epochs[0]
    for number in (1, 2):
        assert epochs[number]["valid_ppl_batched"] != epochs[number]["valid_ppl_batched_raw"]
    assert newest.validations == [epoch["valid_ppl_batched"] for epoch in epochs]
    for metric in ("valid_ppl", "test_ppl", "valid_ppl_batched"):
        assert result[metric] < result[f"{metric}_raw"], "at a large rate the average is better"
    assert result["valid_ppl_batched"] == pytest.approx(newest.validations[-1])
    assert result["averaged"] == newest.averaged


def evaluated(folder: Path) -> dict[str, Any]:
    """The metrics of `vdrop eval`."""
    evaluation.run(settings(f"checkpoint={folder}", "stored_data=true", command="eval"))
    (path,) = folder.glob("eval-*.json")
    metrics: dict[str, Any] = json.loads(path.read_text())["metrics"]
    path.unlink()
    return metrics


def test_an_evaluation_is_of_the_average(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    path = checkpoint.all_in(finished)[0]
    newest = checkpoint.load(path)
    assert evaluated(finished)["test_ppl"] == pytest.approx(result["test_ppl"], rel=1e-6)
    newest.average, newest.averaged = {}, 0
    checkpoint.save(newest, finished)
    assert evaluated(finished)["test_ppl"] == pytest.approx(result["test_ppl_raw"], rel=1e-6)


def test_an_average_does_not_change_what_is_trained(finished: Path, text: list[str]) -> None:
    train.run(settings(*TINY, *text, "schedule.epochs=3", "schedule.lr=4", "outputs=plain"))
    (plain,) = Path("plain/train").glob("*/*")
    one, other = (checkpoint.load(checkpoint.all_in(folder)[0]) for folder in (finished, plain))
    assert all(torch.equal(tensor, other.model[name]) for name, tensor in one.model.items())
    assert other.average == {} and not torch.equal(one.average["embedding"], one.model["embedding"])


def test_ratings_have_averages_too(rated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the best epoch, which the clean protocol reports, and which is not the last one."""
    monkeypatch.chdir(tmp_path)
    options = ["schedule.average_decay=0.9", "schedule.average_from=0", "schedule.epochs=3"]
    train.run(settings(*TINY_SENTIMENT, *rated, "task.protocol=clean", "schedule.lr=0.1", *options))
    (folder,) = Path("outputs/train").glob("*/*")
    result = json.loads((folder / "result.json").read_text())
    assert result["epoch"] < 3 and result["test_rmse"] != result["test_rmse_raw"]
    assert evaluated(folder)["test_rmse"] == pytest.approx(result["test_rmse"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["schedule.average_decay=1", "schedule.average_from=39"], "average_from must be below .*=39"),
        (["schedule.average_from=3"], "average_from must be null with schedule.average_decay=null, got 3"),
        ([*MEAN, "schedule.average_trigger=3"], "average_trigger must be 5 with schedule.average_from=1"),
        (
            ["schedule.average_decay=1", "schedule.epochs=7"],
            "average_trigger must be below 5, so that an average can begin within schedule.epochs=7, got 5",
        ),
        (["schedule.average_decay=0"], r"average_decay must be in \(0, 1\], or null, got 0.0"),
        (
            ["task=sentiment", "schedule.average_decay=1"],
            "average_from must be a number of epochs with task.protocol=paper, .* got null",
        ),
    ],
)
def test_an_average_that_cannot_be_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^schedule\.{message}"):
        settings(*options)
