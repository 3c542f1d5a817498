"""Progress at the terminal."""

import re
import time

import pytest

from tests.sinks.examples import EPOCH, RESULT, loss_metrics, step
from vdrop_cli.sinks import terminal
from vdrop_cli.sinks.records import Evaluating, Record
from vdrop_cli.sinks.terminal import Progress, phase, time_in_words


def test_without_a_terminal_progress_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BEFORE_FIRST_LINE", 0)
    with Progress(6, 1, 0, loss_metrics, terminal=False) as sink:
        for record in (step(1), step(2), EPOCH):
            sink(record)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "epoch 1 step 1/6: train_ppl_dropout 7.3891, 1,000 words/s, about 0 s left"
    assert second == "epoch 1/1: valid_ppl_batched 99, train_ppl_dropout 7.4, lr 1, 1,000 words/s, 01:01"


def test_the_first_line_comes_early_and_estimates_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 21 s here: the first line comes after one, the next ones after two more each."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress(361, 1, 0, loss_metrics, terminal=False) as sink:
        for number in range(1, 6):
            clock[0] += 21
            sink(step(number))
    lines = capsys.readouterr().err.splitlines()
    steps = [int(match[1]) for match in (re.search(r"step (\d+)/361", line) for line in lines) if match]
    assert steps == [1, 3, 5] and lines[0].endswith("about 2 h 6 min left")


def test_on_a_terminal_it_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """Which is closed after the last step; what is printed later is below it."""
    with Progress(2, 1, 0, loss_metrics, terminal=True) as sink:
        records: list[Record] = [step(1), step(2)]
        for record in records:
            sink(record)
        shown = capsys.readouterr().err
        assert "2/2" in shown and shown.endswith("train_ppl_dropout 7.3891, 1,000 words/s]\n")
        for record in (EPOCH, Evaluating(), RESULT):
            sink(record)
    shown = capsys.readouterr().err
    assert "valid_ppl_batched 99" in shown and "2/2" not in shown


def test_an_early_stop_closes_the_bar_too(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(4, 2, 0, loss_metrics, terminal=True) as sink:
        for record in (step(1), step(2), EPOCH):
            sink(record)
        capsys.readouterr()
        sink(Evaluating())
        assert "2/4" in capsys.readouterr().err
        sink(RESULT)
    assert "2/4" not in capsys.readouterr().err


def test_an_evaluation_that_takes_long_has_lines_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BEFORE_PHASE", 0)
    with Progress(2, 1, 0, loss_metrics, terminal=False) as sink:
        sink(Evaluating())
        time.sleep(0.1)
        sink(RESULT)
    assert capsys.readouterr().err.splitlines() == ["evaluating …", "evaluating took 0 s"]


def test_short_work_has_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("loading"):
        pass
    with pytest.raises(ValueError, match=r"^mistake$"), phase("loading"):
        raise ValueError("mistake")
    assert capsys.readouterr().err == ""


def test_work_that_fails_late_does_not_say_how_long_it_took(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BEFORE_PHASE", 0)
    with pytest.raises(ValueError, match=r"^mistake$"), phase("loading"):
        time.sleep(0.1)
        raise ValueError("mistake")
    assert capsys.readouterr().err == "loading …\n"


def test_a_progress_bar_without_a_terminal_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BEFORE_FIRST_LINE", 0)
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0)
    with terminal.progress_bar(4000, 0, "word") as count:
        for _ in range(2):
            count(2000)
    assert capsys.readouterr().err.splitlines() == [
        "2,000 of 4,000 words, about 0 s left",
        "4,000 of 4,000 words, about 0 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3599.6, "1 h 0 min"), (22525, "6 h 15 min")],
)
def test_times_are_readable(seconds: float, text: str) -> None:
    assert time_in_words(seconds) == text
