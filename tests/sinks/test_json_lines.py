"""`log.jsonl` as a run writes and resumes it."""

import json
import os
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sinks.examples import EPOCH, RESULT, step, write_log
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.sinks.json_lines import JsonLines
from vdrop_cli.sinks.log_reader import lines_from_end, log_until, read_log
from vdrop_cli.sinks.records import Saving, Start, to_dict


def test_the_log_holds_the_start_every_nth_step_and_every_epoch(tmp_path: Path) -> None:
    with JsonLines(tmp_path, log_every=3, epochs=0, step=0) as sink:
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


def test_after_an_interruption_the_log_continues_at_the_checkpoint(tmp_path: Path) -> None:
    """Steps beyond it will be made again, so they are taken out; a last line that was cut off is too."""
    with JsonLines(tmp_path, log_every=1, epochs=0, step=0) as sink:
        for record in (Start({}, "f", 0, 0, {}), *map(step, range(1, 7)), EPOCH, step(7), step(8)):
            sink(record)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "ep')
    with JsonLines(tmp_path, log_every=1, epochs=1, step=6) as sink:
        sink(step(7))
    assert [line.get("step") for line in read_log(tmp_path / "log.jsonl")] == [0, 1, 2, 3, 4, 5, 6, 6, 7]
    with JsonLines(tmp_path, log_every=1, epochs=0, step=0):
        assert read_log(tmp_path / "log.jsonl") == []  # from the start: an empty log


def test_a_log_without_chains_is_read_and_resumed(tmp_path: Path) -> None:
    path = write_log(tmp_path)
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
    path = write_log(tmp_path, every)
    before = read_log(path)
    with path.open("a") as file:
        file.write('{"kind": "error", "error": "x", "epoch": 3, "step": 18}\n{"kind": "st')
    with JsonLines(tmp_path, every, epochs, last) as sink:
        remaining = read_log(path)
        limit = {"start": ("step", last - 1), "step": ("step", last), "epoch": ("epoch", epochs)}
        assert remaining == [r for r in before if r[limit[r["kind"]][0]] <= limit[r["kind"]][1]]
        sink(Start({"log_every": every}, "f", epochs, last, {}))
        for number in range(last + 1, 6 * epochs + 7):
            sink(step(number))
        sink(replace(EPOCH, epoch=epochs + 1, step=6 * epochs + 6))
    steps = [record["step"] for record in read_log(path) if record["kind"] == "step"]
    assert steps == [number for number in range(1, 6 * epochs + 7) if number % every == 0]


def test_resuming_reads_only_the_end_of_a_long_log(tmp_path: Path) -> None:
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
                json.dumps({"kind": "epoch", **to_dict(replace(EPOCH, epoch=epoch, step=1000 * epoch))})
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
        lines, read = lines_from_end(file), file.tell()
        assert (
            json.loads(next(lines)[1])["step"] == 99_500
            and path.stat().st_size - file.tell() < 2**18
            and read == 0
        )
    with log as sink:
        sink(step(99_501))
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 99_501


def test_a_missing_log_is_replaced_by_a_new_one_that_says_where_it_begins(
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
    for _ in range(2):  # its processes are killed before a further checkpoint
        with JsonLines(tmp_path, 1, 2, 12) as sink:
            assert [record["step"] for record in read_log(sink.path)] == [12]
            assert log_until(sink.path, 2, 12) == sink.path.read_bytes()
            for record in (Start({}, "f", 2, 12, {}), step(13)):
                sink(record)


def test_a_fifo_or_link_in_place_of_a_log_is_never_opened(tmp_path: Path) -> None:
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
def test_a_log_that_is_removed_or_replaced_during_the_run_is_restored(
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
    assert capsys.readouterr().err.count("restored") == 1
    aside = tmp_path / "log.jsonl.replaced-1"
    assert aside.read_text() == "mine\n" if how == "replaced" else aside.is_dir() == (how != "removed")


def test_a_log_that_is_emptied_during_the_run_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with JsonLines(tmp_path, 1, 0, 0) as sink:
        for record in (Start({}, "f", 0, 0, {}), step(1)):
            sink(record)
        os.truncate(sink.path, 0)
        for record in (step(2), Saving(), step(3), Saving()):
            sink(record)
    assert capsys.readouterr().err.count("was changed during the run") == 1


def test_an_infinite_metric_is_null_in_the_log(tmp_path: Path) -> None:
    with JsonLines(tmp_path, 1, 0, 0) as sink:
        sink(replace(EPOCH, metrics={"train_ppl_dropout": float("inf"), "valid_ppl_batched": 9.0}))
    assert "Infinity" not in sink.path.read_text()
    (epoch,) = read_log(sink.path)
    assert (epoch["train_ppl_dropout"], epoch["valid_ppl_batched"]) == (None, 9.0)


def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    log = JsonLines(tmp_path, log_every=1, epochs=0, step=0)
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(RunError, match=r"log\.jsonl cannot be written"):
        log.__enter__()
