"""Those who listen to a run."""

import json
from pathlib import Path

import pytest

from vdrop_cli import sinks
from vdrop_cli.config import RunError
from vdrop_cli.sinks import Epoch, JsonLines, Progress, Record, Result, Saving, Start, Step, TensorBoard, duration, flat, ppl, read_log


def step(number: int) -> Step:
    return Step(epoch=1, step=number, loss=2.0, grad_norm=3.0, lr=1.0, words_per_second=1000.0)


def measures(loss: float) -> dict[str, float]:
    return {"train_ppl": ppl(loss)}


EPOCH = Epoch(1, 6, 2.0, {"train_ppl": 7.4, "valid_ppl_batched": 99.0}, 1.0, 1000.0, 61.0)
RESULT = Result(1, 1, {"train_ppl": 5.0, "test_ppl": 9.0}, 61.0)


def test_the_log_holds_the_start_one_step_in_so_many_and_every_epoch(tmp_path: Path) -> None:
    with JsonLines(tmp_path, every=3, epochs=0, step=0) as sink:
        for record in (Start({}, "f", 0, 0, {}), *map(step, range(1, 8)), EPOCH, RESULT):
            sink(record)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["kind"], line.get("step")) for line in lines] == [
        ("start", 0),
        ("step", 3),
        ("step", 6),
        ("epoch", 6),
        ("result", None),
    ]
    assert lines[1] == {"kind": "step", "epoch": 1, "step": 3, "loss": 2.0, "grad_norm": 3.0, "lr": 1.0, "words_per_second": 1000.0}


def test_after_an_interruption_the_log_goes_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    """Steps beyond it will be made again, so they are taken out; a last line that was cut off is too."""
    with JsonLines(tmp_path, every=1, epochs=0, step=0) as sink:
        for record in (Start({}, "f", 0, 0, {}), *map(step, range(1, 7)), EPOCH, step(7), step(8)):
            sink(record)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "ep')
    with JsonLines(tmp_path, every=1, epochs=1, step=6) as sink:
        sink(step(7))
    assert [line.get("step") for line in read_log(tmp_path / "log.jsonl")] == [0, 1, 2, 3, 4, 5, 6, 6, 7]
    with JsonLines(tmp_path, every=1, epochs=0, step=0):
        assert read_log(tmp_path / "log.jsonl") == []  # from the start: an empty log


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own reader
def test_tensorboard_gets_the_steps_of_the_log_the_epochs_and_the_settings_with_the_result(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path, {"model": {"layers": 2}, "seed": 1, "data": {"dir": None}}, 3, 0, measures) as sink:
        for record in (Start({}, "f", 0, 0, {}), *map(step, range(1, 8)), EPOCH, RESULT):
            sink(record)
    assert len(list(tmp_path.glob("events.*"))) == 1, "all in one folder"
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"step/{name}" for name in ("loss", "train_ppl", "grad_norm", "lr", "words_per_second")} <= tags
    assert {f"epoch/{name}" for name in ("train_loss", "train_ppl", "valid_ppl_batched", "words_per_second")} <= tags
    assert [scalar.step for scalar in events.Scalars("step/loss")] == [3, 6]
    assert events.Scalars("result/test_ppl")[0].value == pytest.approx(9.0)
    assert "_hparams_/session_start_info" in events.summary_metadata


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own reader
def test_what_was_told_before_a_checkpoint_is_on_disk_by_then(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path, {}, 1, 0, measures) as board, JsonLines(tmp_path, every=1, epochs=0, step=0) as log:
        for record in (*map(step, range(1, 7)), Saving()):
            board(record)
            log(record)
        assert len(EventAccumulator(str(tmp_path)).Reload().Scalars("step/loss")) == 6
        assert len(read_log(tmp_path / "log.jsonl")) == 6


def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    log = JsonLines(tmp_path, every=1, epochs=0, step=0)
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(RunError, match=r"log\.jsonl cannot be written"):
        log.__enter__()


def test_without_a_terminal_progress_is_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "SECONDS_BETWEEN_LINES", 0)
    with Progress(6, 1, 0, measures, terminal=False) as sink:
        for record in (step(1), EPOCH):
            sink(record)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("epoch 1 step 1/6: train_ppl 7.3891, 1,000 words/s, 0:0") and first.endswith(" left")
    assert second == "epoch 1/1: train_ppl 7.4, valid_ppl_batched 99, lr 1, 1,000 words/s, 1:01"


def test_on_a_terminal_it_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, 1, 0, measures, terminal=True) as sink:
        records: list[Record] = [step(1), step(2), EPOCH]
        for record in records:
            sink(record)
        sink.bar.refresh()
    shown = capsys.readouterr().err
    assert "2/2" in shown and "train_ppl 7.3891, 1,000 words/s" in shown and "valid_ppl_batched 99" in shown


def test_what_is_only_counted_is_told_in_plain_lines_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "SECONDS_BETWEEN_LINES", 0)
    with sinks.counting(4000, 0, "word") as count:
        for _ in range(2):
            count(2000)
    assert capsys.readouterr().err.splitlines() == ["2,000 of 4,000 words, 0:00 left", "4,000 of 4,000 words, 0:00 left"]


def test_small_helpers() -> None:
    assert flat({"a": {"b": 1, "c": None}, "d": "x"}) == {"a.b": 1, "d": "x"}
    assert [duration(s) for s in (0, 59.6, 61, 3_725)] == ["0:00", "1:00", "1:01", "1:02:05"]
    assert ppl(1000) == float("inf") and ppl(0) == 1
