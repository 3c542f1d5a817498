"""Progress at the terminal."""

import pytest

from tests.sinks.examples import EPOCH, loss_metrics, step
from vdrop_cli.sinks import terminal
from vdrop_cli.sinks.records import Record
from vdrop_cli.sinks.terminal import Progress


def test_without_a_terminal_progress_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0)
    with Progress(6, 1, 0, loss_metrics, terminal=False) as sink:
        for record in (step(1), EPOCH):
            sink(record)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "epoch 1 step 1/6: train_ppl_dropout 7.3891, 1,000 words/s, 0:0"
    ) and first.endswith(" left")
    assert second == "epoch 1/1: valid_ppl_batched 99, train_ppl_dropout 7.4, lr 1, 1,000 words/s, 1:01"


def test_on_a_terminal_it_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, 1, 0, loss_metrics, terminal=True) as sink:
        records: list[Record] = [step(1), step(2), EPOCH]
        for record in records:
            sink(record)
        sink.bar.refresh()
    shown = capsys.readouterr().err
    assert (
        "2/2" in shown
        and "train_ppl_dropout 7.3891, 1,000 words/s" in shown
        and "valid_ppl_batched 99" in shown
    )


def test_a_progress_bar_without_a_terminal_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0)
    with terminal.progress_bar(4000, 0, "word") as count:
        for _ in range(2):
            count(2000)
    assert capsys.readouterr().err.splitlines() == [
        "2,000 of 4,000 words, 0:00 left",
        "4,000 of 4,000 words, 0:00 left",
    ]
