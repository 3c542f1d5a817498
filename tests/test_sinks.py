"""Those who listen to a run."""

import json
import os
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vdrop_cli import sinks
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.files import Damaged
from vdrop_cli.sinks import (
    Epoch,
    JsonLines,
    Progress,
    Record,
    Result,
    Saving,
    Start,
    Step,
    TensorBoard,
    duration,
    events_until,
    flat,
    flattened,
    log_until,
    ppl,
    read_log,
)


def step(number: int) -> Step:
    return Step(epoch=1, step=number, loss=2.0, grad_norm=3.0, lr=1.0, words_per_second=1000.0)


def measures(loss: float) -> dict[str, float]:
    return {"train_ppl_dropout": ppl(loss)}


EPOCH = Epoch(1, 6, 2.0, {"valid_ppl_batched": 99.0, "train_ppl_dropout": 7.4}, 1.0, 1000.0, 61.0)
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
    assert lines[1] == {
        "kind": "step",
        "epoch": 1,
        "step": 3,
        "loss": 2.0,
        "grad_norm": 3.0,
        "lr": 1.0,
        "words_per_second": 1000.0,
    }


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
def test_tensorboard_gets_the_steps_of_the_log_the_epochs_and_the_settings_with_the_result(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(
        tmp_path, {"model": {"layers": 2}, "seed": 1, "data": {"dir": None}}, 3, 0, measures
    ) as sink:
        for record in (Start({}, "f", 0, 0, {}), *map(step, range(1, 8)), EPOCH, RESULT):
            sink(record)
    assert len(list(tmp_path.glob("events.*"))) == 1, "all in one folder"
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        f"step/{name}" for name in ("loss", "train_ppl_dropout", "grad_norm", "lr", "words_per_second")
    } <= tags
    assert {
        f"epoch/{name}"
        for name in ("train_loss", "train_ppl_dropout", "valid_ppl_batched", "words_per_second")
    } <= tags
    assert [scalar.step for scalar in events.Scalars("step/loss")] == [3, 6]
    assert events.Scalars("result/test_ppl")[0].value == pytest.approx(9.0)
    assert "_hparams_/session_start_info" in events.summary_metadata


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own reader
def test_events_until_a_step_are_whole_and_without_the_result(tmp_path: Path) -> None:
    """Of a file that is damaged, those before the damage."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path, {"seed": 1}, 1, 0, measures) as sink:
        for record in (*map(step, range(1, 7)), EPOCH, *map(step, range(7, 10)), RESULT):
            sink(record)
    (path,) = tmp_path.glob("events.*")
    whole = path.read_bytes()
    for until, steps, kinds in ((6, 6, {"step", "epoch"}), (5, 5, {"step"}), (99, 9, {"step", "epoch"})):
        path.write_bytes(events_until(whole, until))
        events = EventAccumulator(str(tmp_path)).Reload()
        assert len(events.Scalars("step/loss")) == steps
        assert {
            tag.partition("/")[0] for tag in (*events.Tags()["scalars"], *events.summary_metadata)
        } == kinds
    assert events_until(path.read_bytes(), 99) == path.read_bytes() != whole
    assert events_until(b"", 6) == events_until(b"\xff" * 999, 6) == b""
    for size in range(0, len(whole), 97):
        assert events_until(whole, 6).startswith(events_until(whole[:size], 6))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own reader
def test_what_was_told_before_a_checkpoint_is_on_disk_by_then(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with (
        TensorBoard(tmp_path, {}, 1, 0, measures) as board,
        JsonLines(tmp_path, every=1, epochs=0, step=0) as log,
    ):
        for record in (*map(step, range(1, 7)), Saving()):
            board(record)
            log(record)
        assert len(EventAccumulator(str(tmp_path)).Reload().Scalars("step/loss")) == 6
        assert len(read_log(tmp_path / "log.jsonl")) == 6


def written(folder: Path, every: int = 1) -> Path:
    """The log of a run of three epochs of six steps, stopped after step 15 and resumed from there, up to the
    third epoch's end.
    """
    start = Start({"log_every": every}, "f", 0, 0, {})
    with JsonLines(folder, every, 0, 0) as sink:
        for record in (
            start,
            *map(step, range(1, 7)),
            EPOCH,
            *map(step, range(7, 13)),
            replace(EPOCH, epoch=2, step=12),
        ):
            sink(record)
        for record in map(step, range(13, 16)):
            sink(record)
    with JsonLines(folder, every, 2, 15) as sink:
        for record in (
            replace(start, epoch=2, step=15),
            *map(step, range(16, 19)),
            replace(EPOCH, epoch=3, step=18),
        ):
            sink(record)
    return folder / "log.jsonl"


def place(lines: list[str], *parts: str) -> int:
    return next(n for n, line in enumerate(lines) if all(part in line for part in parts))


def without(lines: list[str], number: int) -> list[str]:
    return lines[:number] + lines[number + 1 :]


DAMAGES: dict[str, Callable[[list[str]], list[str]]] = {
    "cut at its end": lambda lines: lines[:-1],
    "cut in its last epoch": lambda lines: lines[:-3],
    "a step taken out": lambda lines: without(lines, place(lines, '"step": 14,')),
    "an epoch taken out": lambda lines: without(lines, place(lines, '"kind": "epoch"', '"epoch": 2,')),
    "reordered": lambda lines: [*lines[:-3], lines[-2], lines[-3], lines[-1]],
    "an epoch with another number": lambda lines: [
        line.replace('"epoch": 3, "step": 18', '"epoch": 4, "step": 18') for line in lines
    ],
    "an epoch with another loss": lambda lines: [
        *lines[:-1],
        lines[-1].replace('"train_loss": 2.0', '"train_loss": 1.9'),
    ],
    "an epoch without its chain": lambda lines: [*lines[:-1], re.sub(r', "chain": "\w+"', "", lines[-1])],
    "a loss of another type": lambda lines: [
        *lines[:-2],
        lines[-2].replace('"loss": 2.0', '"loss": "2.0"'),
        lines[-1],
    ],
    "a loss that is no number": lambda lines: [
        *lines[:-2],
        lines[-2].replace('"loss": 2.0', '"loss": NaN'),
        lines[-1],
    ],
    "deep nesting": lambda lines: [*lines[:-2], "[" * 100_000, lines[-1]],
    "no record": lambda lines: [*lines[:-2], "[1]", lines[-1]],
    "no known kind": lambda lines: [*lines[:-2], '{"kind": ["step"]}', lines[-1]],
    "emptied": lambda lines: [],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_log_is_refused_on_resuming_and_left_as_it_is(damage: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    changed = "".join(f"{line}\n" for line in DAMAGES[damage](path.read_text().splitlines()))
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(ConfigError, match=r"log\.jsonl .*move it away"):
        JsonLines(tmp_path, 1, 3, 18)
    with pytest.raises(Damaged):
        log_until(path, 3, 18)
    assert path.read_text() == changed


def test_a_log_until_the_end_of_an_epoch_is_what_stood_there_then(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    for epochs, last in (
        (1, '"epoch": 1, "step": 6'),
        (2, '"epoch": 2, "step": 12'),
        (3, '"epoch": 3, "step": 18'),
    ):
        content = log_until(path, epochs, 6 * epochs)
        assert content is not None and whole.startswith(content)
        assert content.splitlines()[-1].decode().startswith('{"kind": "epoch", ' + last)
    assert content == whole
    first, *others = whole.split(b'"valid_ppl_batched": 99.0', 1)
    path.write_bytes(b'"valid_ppl_batched": 9.0'.join([first, *others]))
    with pytest.raises(Damaged, match="epoch 1, or one before it, is not as it was written"):
        log_until(path, 3, 18)
    assert log_until(tmp_path / "nowhere", 1, 6) is None


def test_a_log_that_is_cut_within_an_epoch_is_refused_on_resuming(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(ConfigError, match="steps after step 16 are missing"):
        JsonLines(tmp_path, 1, 2, 17)
    JsonLines(tmp_path, 1, 2, 16)


@pytest.mark.parametrize(
    "damage", sorted(DAMAGES.keys() - {"emptied", "cut at its end", "cut in its last epoch"})
)
def test_a_damaged_log_is_refused_where_it_is_read(damage: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    assert len(read_log(path)) == 23
    path.write_text("".join(f"{line}\n" for line in DAMAGES[damage](path.read_text().splitlines())))
    with pytest.raises(ConfigError, match=r"log\.jsonl"):
        read_log(path)


def test_an_early_epoch_that_was_changed_is_noticed_by_the_later_ones(tmp_path: Path) -> None:
    path = written(tmp_path)
    first, *others = path.read_text().split('"valid_ppl_batched": 99.0', 1)
    path.write_text('"valid_ppl_batched": 9.0'.join([first, *others]))
    with pytest.raises(ConfigError, match="epoch 1, or one before it, is not as it was written"):
        read_log(path)


def test_a_log_of_before_the_chain_is_read_and_resumed(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(re.sub(r', "chain": "\w+"', "", path.read_text()))
    with JsonLines(tmp_path, 1, 3, 18) as sink:
        for record in (
            *map(step, range(19, 25)),
            replace(EPOCH, epoch=4, step=24),
            replace(EPOCH, epoch=5, step=24),
        ):
            sink(record)
    assert [("chain" in record) for record in read_log(path) if record["kind"] == "epoch"] == [
        False,
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("every", [1, 2, 4, 7])
@pytest.mark.parametrize(
    ("epochs", "last"), [(0, 3), (1, 6), (1, 7), (2, 12), (2, 14), (2, 15), (2, 17), (3, 18)]
)
def test_a_log_is_cut_where_the_checkpoint_is(epochs: int, last: int, every: int, tmp_path: Path) -> None:
    """Whatever comes after it is made again, a last line that was cut off and an error too."""
    path = written(tmp_path, every)
    before = read_log(path)
    with path.open("a") as file:
        file.write('{"kind": "error", "error": "x", "epoch": 3, "step": 18}\n{"kind": "st')
    with JsonLines(tmp_path, every, epochs, last) as sink:
        found = read_log(path)
        limit = {"start": ("step", last - 1), "step": ("step", last), "epoch": ("epoch", epochs)}
        assert found == [r for r in before if r[limit[r["kind"]][0]] <= limit[r["kind"]][1]]
        sink(Start({"log_every": every}, "f", epochs, last, {}))
        for number in range(last + 1, 6 * epochs + 7):
            sink(step(number))
        sink(replace(EPOCH, epoch=epochs + 1, step=6 * epochs + 6))
    steps = [record["step"] for record in read_log(path) if record["kind"] == "step"]
    assert steps == [number for number in range(1, 6 * epochs + 7) if number % every == 0]


def test_resuming_reads_the_end_of_a_long_log_alone(tmp_path: Path) -> None:
    line = json.dumps(
        {
            "kind": "step",
            "epoch": 1,
            "step": 0,
            "loss": 2.0,
            "grad_norm": 3.0,
            "lr": 1.0,
            "words_per_second": 1000.0,
        }
    )
    path = tmp_path / "log.jsonl"
    with path.open("w") as file:
        for epoch in range(1, 101):
            file.write(
                "".join(
                    line.replace('"step": 0', f'"step": {1000 * (epoch - 1) + n}') + "\n"
                    for n in range(1, 1001)
                )
            )
            file.write(
                json.dumps({"kind": "epoch", **flattened(replace(EPOCH, epoch=epoch, step=1000 * epoch))})
                + "\n"
            )
    size, inode = path.stat().st_size, path.stat().st_ino
    tracemalloc.start()
    try:
        log = JsonLines(tmp_path, 1, 99, 99_500)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 10 * 2**20 and peak < 2**20
    assert path.stat().st_ino == inode, "it is appended to, not written again"
    with path.open("rb") as file:
        lines, read = sinks.lines_from_end(file), file.tell()
        assert (
            json.loads(next(lines)[1])["step"] == 99_500
            and path.stat().st_size - file.tell() < 2**18
            and read == 0
        )
    with log as sink:
        sink(step(99_501))
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 99_501


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_lines_from_the_end_are_those_from_the_beginning(block: int, tmp_path: Path) -> None:
    for content in (b"", b"\n", b"a", b"a\n", b"a\n\nbc\nd", b"\n\n", b"x" * 100 + b"\n" + b"y" * 70 + b"\n"):
        (tmp_path / "f").write_bytes(content)
        with (tmp_path / "f").open("rb") as file:
            found = list(sinks.lines_from_end(file, block))[::-1]
        assert b"".join(line for _, line in found) == content
        assert [line for _, line in found] == content.splitlines(keepends=True)
        assert all(content[begin : begin + len(line)] == line for begin, line in found)


def test_a_log_that_is_not_there_begins_anew_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with JsonLines(tmp_path, 1, 2, 12) as sink:
        for record in (
            Start({}, "f", 2, 12, {}),
            *map(step, range(13, 19)),
            replace(EPOCH, epoch=3, step=18),
        ):
            sink(record)
    assert "a new log begins after epoch 2, step 12" in capsys.readouterr().err
    assert [
        record.get("epoch") for record in read_log(tmp_path / "log.jsonl") if record["kind"] != "step"
    ] == [2, 3]
    with JsonLines(tmp_path, 1, 3, 18):
        assert len(read_log(tmp_path / "log.jsonl")) == 8


def test_what_stands_in_place_of_a_log_is_never_followed_or_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_log(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        JsonLines(tmp_path, 1, 1, 6)
    path.unlink()
    (tmp_path / "mine").write_text("mine")
    path.symlink_to("mine")
    with pytest.raises(RunError, match=r"log\.jsonl cannot be written"):
        JsonLines(tmp_path, 1, 1, 6)
    JsonLines(tmp_path, 1, 0, 0)
    assert (tmp_path / "mine").read_text() == "mine"
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="it is a folder"):
        read_log(path)


@pytest.mark.parametrize("how", ["removed", "replaced", "replaced by a folder"])
def test_a_log_that_is_taken_away_while_it_is_written_is_put_back(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.jsonl"
    with JsonLines(tmp_path, 1, 0, 0) as sink:
        for record in (Start({}, "f", 0, 0, {}), *map(step, range(1, 4))):
            sink(record)
        path.unlink()
        if how == "replaced":
            path.write_text("mine\n")
        elif how == "replaced by a folder":
            path.mkdir()
        for record in (step(4), Saving(), step(5), Saving()):
            sink(record)
    assert [record["step"] for record in read_log(path)] == [0, 1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("put back") == 1
    aside = tmp_path / "log.jsonl.replaced-1"
    assert aside.read_text() == "mine\n" if how == "replaced" else aside.is_dir() == (how != "removed")


def test_a_log_that_is_emptied_while_it_is_written_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with JsonLines(tmp_path, 1, 0, 0) as sink:
        for record in (Start({}, "f", 0, 0, {}), step(1)):
            sink(record)
        os.truncate(sink.path, 0)
        for record in (step(2), Saving(), step(3), Saving()):
            sink(record)
    assert capsys.readouterr().err.count("was changed while the run wrote to it") == 1


def test_an_infinite_metric_is_null_in_the_log(tmp_path: Path) -> None:
    with JsonLines(tmp_path, 1, 0, 0) as sink:
        sink(replace(EPOCH, metrics={"train_ppl_dropout": float("inf"), "valid_ppl_batched": 9.0}))
    assert "Infinity" not in sink.path.read_text()
    (epoch,) = read_log(sink.path)
    assert (epoch["train_ppl_dropout"], epoch["valid_ppl_batched"]) == (None, 9.0)


def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    log = JsonLines(tmp_path, every=1, epochs=0, step=0)
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(RunError, match=r"log\.jsonl cannot be written"):
        log.__enter__()


def test_without_a_terminal_progress_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "SECONDS_BETWEEN_LINES", 0)
    with Progress(6, 1, 0, measures, terminal=False) as sink:
        for record in (step(1), EPOCH):
            sink(record)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "epoch 1 step 1/6: train_ppl_dropout 7.3891, 1,000 words/s, 0:0"
    ) and first.endswith(" left")
    assert second == "epoch 1/1: valid_ppl_batched 99, train_ppl_dropout 7.4, lr 1, 1,000 words/s, 1:01"


def test_on_a_terminal_it_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, 1, 0, measures, terminal=True) as sink:
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


def test_what_is_only_counted_is_told_in_plain_lines_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "SECONDS_BETWEEN_LINES", 0)
    with sinks.counting(4000, 0, "word") as count:
        for _ in range(2):
            count(2000)
    assert capsys.readouterr().err.splitlines() == [
        "2,000 of 4,000 words, 0:00 left",
        "4,000 of 4,000 words, 0:00 left",
    ]


def test_small_helpers() -> None:
    assert flat({"a": {"b": 1, "c": None}, "d": "x"}) == {"a.b": 1, "d": "x"}
    assert [duration(s) for s in (0, 59.6, 61, 3_725)] == ["0:00", "1:00", "1:01", "1:02:05"]
    assert ppl(1000) == float("inf") and ppl(0) == 1
