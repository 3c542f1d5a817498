"""Checkpoints: what is saved is loaded, what is damaged is refused, which files stay."""

import errno
import gzip
import math
import os
import pickle
import random
import zipfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import IO, Any
from unittest.mock import Mock

import pytest
import torch

from tests.conftest import settings
from vdrop_cli import checkpoint, files, learned
from vdrop_cli.checkpoint import Checkpoint, TrainingState, Unusable
from vdrop_cli.errors import ConfigError
from vdrop_cli.learned import Words
from vdrop_cli.settings.fields import plain

LEARNED = learned.to_dict(Words.from_vocabulary(["a", "<eos>", "<unk>"]))


@cache
def configured(*overrides: str) -> dict[str, Any]:
    return plain(settings(*overrides))


def at_epoch(epoch: int, best: int = 1, *overrides: str, batch: int = 0) -> Checkpoint:
    model = {"w": torch.full((300,), float(epoch))}
    return Checkpoint(
        config=deepcopy(configured(*overrides)),
        corpus="fingerprint",
        environment={"torch": "2"},
        epoch=epoch,
        batch=batch,
        epoch_words=0,
        seconds=1.5,
        epoch_seconds=0.0,
        best_epoch=best,
        best=99.0,
        losses=[1.0] * batch,
        averaged=0,
        average={},
        validations=[99.0] * epoch,
        state=[],
        model=model,
        optimiser={"state": {}, "param_groups": []},
        learned=LEARNED,
    )


def test_a_checkpoint_is_a_whole_training_state(tmp_path: Path) -> None:
    """Each counter is an entry of the file, and none may lack."""
    checkpoint.save(at_epoch(3, 3, batch=2), tmp_path)
    path = checkpoint.path_of(tmp_path, 3, 2)
    content = files.read_tensors(path)
    counters = {"epoch", "batch", "seconds", "epoch_seconds", "epoch_words", "best_epoch", "best", "losses"}
    counters |= {"averaged", "validations"}
    assert {f.name for f in fields(TrainingState)} == counters < content.keys()
    progress = checkpoint.load(path).progress
    assert progress == TrainingState(3, 2, 1.5, 0.0, 0, 3, 99.0, [1.0, 1.0], 0, [99.0] * 3)
    progress.finish_epoch(98.0)
    assert progress == TrainingState(4, 0, 1.5, 0.0, 0, 3, 99.0, [], 0, [99.0, 99.0, 99.0, 98.0])
    for name in counters:
        files.write_tensors(path, {key: value for key, value in content.items() if key != name})
        with pytest.raises(Unusable, match="lacks a part"):
            checkpoint.load(path)
    average = torch.zeros(300)
    for wrong, reason in (
        ({"averaged": 1}, "it has no average of its updates"),
        ({"average": {"w": average}}, "or one of none"),
        ({"averaged": 1, "average": {"v": average}}, "the average of its weights is one of others"),
        ({"averaged": 1, "average": {"w": torch.full((300,), math.nan)}}, "an average is not finite"),
        ({"averaged": -1}, "its averaged is out of range"),
        ({"validations": [98.0]}, "its validations are not"),
        ({"validations": [99.0, 99.0, math.nan]}, "its validations are not"),
        ({"losses": [1.0, math.nan]}, "a loss is not a finite number"),
        ({"losses": [1.0]}, "it has another number of losses than of batches"),
    ):
        files.write_tensors(path, content | wrong)
        with pytest.raises(Unusable, match=reason):
            checkpoint.load(path)


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    checkpoint.save(at_epoch(3, 3), tmp_path)
    loaded = checkpoint.load(checkpoint.path_of(tmp_path, 3))
    assert vars(loaded) | {"model": None} == vars(at_epoch(3, 3)) | {"model": None}
    assert torch.equal(loaded.model["w"], torch.full((300,), 3.0))
    assert loaded.train == settings()


def test_the_newest_two_and_the_best_remain(tmp_path: Path) -> None:
    for epoch, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        checkpoint.save(at_epoch(epoch, best), tmp_path)
    assert [path.name for path in checkpoint.all_in(tmp_path)] == [
        "checkpoint-0005.pt",
        "checkpoint-0004.pt",
        "checkpoint-0002.pt",
    ]
    assert not list(tmp_path.glob("*.tmp"))


def test_the_best_that_the_one_before_the_newest_names_remains_with_it(tmp_path: Path) -> None:
    checkpoint.save(at_epoch(2, 2), tmp_path)
    for chunk in (5, 10):
        checkpoint.save(at_epoch(4, 2, batch=chunk), tmp_path, 2)
    checkpoint.save(at_epoch(5, 5), tmp_path, 2)
    assert [path.name for path in checkpoint.all_in(tmp_path)] == [
        "checkpoint-0005.pt",
        "checkpoint-0004-00010.pt",
        "checkpoint-0002.pt",
    ]
    checkpoint.save(at_epoch(5, 5, batch=5), tmp_path, 5)
    assert [path.name for path in checkpoint.all_in(tmp_path)] == [
        "checkpoint-0005-00005.pt",
        "checkpoint-0005.pt",
    ]


def test_a_damaged_newest_one_is_reported_and_the_one_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in (1, 2):
        checkpoint.save(at_epoch(epoch), tmp_path)
    path = checkpoint.path_of(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:-500])
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.epoch == 1
    assert "checkpoint-0002.pt is damaged" in capsys.readouterr().err


def test_what_is_written_stays_and_unusable_later_ones_go(tmp_path: Path) -> None:
    for epoch in (1, 2, 4, 5):
        checkpoint.save(at_epoch(epoch, 2), tmp_path)
    for epoch in (4, 5):
        checkpoint.path_of(tmp_path, epoch).write_bytes(b"damaged")
    checkpoint.save(at_epoch(2, 2, batch=7), tmp_path)
    assert [path.name for path in checkpoint.all_in(tmp_path)] == [
        "checkpoint-0002-00007.pt",
        "checkpoint-0002.pt",
    ]


def test_a_run_is_reported_from_its_last_epoch_or_with_early_stopping_from_its_best(tmp_path: Path) -> None:
    for name, overrides, expected in (("last", (), 3), ("best", ("dropout=none",), 2)):
        folder = tmp_path / name
        folder.mkdir()
        for epoch in (1, 2, 3):
            checkpoint.save(at_epoch(epoch, min(epoch, 2), *overrides), folder)
        assert checkpoint.find(str(folder)) == checkpoint.path_of(folder, expected)


def test_of_a_run_whose_newest_is_damaged_the_one_before_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in (1, 2):
        checkpoint.save(at_epoch(epoch), tmp_path)
    checkpoint.path_of(tmp_path, 2).write_bytes(b"damaged")
    assert checkpoint.find(str(tmp_path)) == checkpoint.path_of(tmp_path, 1)
    assert "checkpoint-0002.pt is damaged" in capsys.readouterr().err


def test_where_all_are_damaged_that_is_an_error_and_they_stay(tmp_path: Path) -> None:
    for epoch in (1, 2):
        checkpoint.save(at_epoch(epoch), tmp_path)
        checkpoint.path_of(tmp_path, epoch).write_bytes(b"damaged")
    for read in (checkpoint.newest, lambda folder: checkpoint.find(str(folder))):
        with pytest.raises(
            ConfigError, match="holds no checkpoint that can be used; train again with force=true"
        ):
            read(tmp_path)
    assert len(checkpoint.all_in(tmp_path)) == 2 and checkpoint.newest(tmp_path / "new") is None


def test_what_can_perhaps_be_read_later_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the run would resume from an older one, and remove it."""
    for epoch in (1, 2):
        checkpoint.save(at_epoch(epoch), tmp_path)
    path, open_regular = checkpoint.path_of(tmp_path, 2), files.open_regular

    def failing(asked: Path) -> IO[bytes]:
        if asked == path:
            raise OSError(errno.ESTALE, "Stale file handle")
        return open_regular(asked)

    monkeypatch.setattr(files, "open_regular", failing)
    with pytest.raises(ConfigError, match=r"checkpoint-0002\.pt cannot be read \(Stale file handle\)"):
        checkpoint.newest(tmp_path)
    monkeypatch.setattr(files, "open_regular", open_regular)
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9")):
        monkeypatch.setattr(torch, "load", Mock(side_effect=error))
        with pytest.raises(MemoryError):
            checkpoint.newest(tmp_path)


def test_checkpoints_within_an_epoch_lie_between_those_of_its_ends(tmp_path: Path) -> None:
    for epoch, chunk in ((1, 0), (1, 7), (1, 10), (2, 0), (2, 100_000)):
        checkpoint.save(at_epoch(epoch, batch=chunk), tmp_path)
    assert [path.name for path in checkpoint.all_in(tmp_path)] == [
        "checkpoint-0002-100000.pt",
        "checkpoint-0002.pt",
        "checkpoint-0001.pt",
    ]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and (newest.epoch, newest.batch) == (2, 100_000)
    assert checkpoint.find(str(tmp_path)).name == "checkpoint-0002-100000.pt"


class Payload:
    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (Path("payload-ran"),)


def test_what_is_not_a_checkpoint_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    part = tmp_path / "part"
    torch.save({"payload": Payload()}, part)
    with pytest.raises(ConfigError, match=r"damaged or not a checkpoint \(it does not end with a checksum"):
        checkpoint.load(part)
    files.write_tensors(part, {"payload": Payload()})  # crafted by someone who knows how
    with pytest.raises(ConfigError, match="damaged or not a checkpoint"):
        checkpoint.load(part)
    assert not (tmp_path / "payload-ran").exists()
    files.write_tensors(part, {"model": {}})
    with pytest.raises(ConfigError, match="was not written by this version of vdrop"):
        checkpoint.load(part)
    files.write_tensors(part, {"format": checkpoint.FORMAT, "model": {}})
    with pytest.raises(ConfigError, match="cannot be used: it lacks a part"):
        checkpoint.load(part)
    with pytest.raises(ConfigError, match="does not exist"):
        checkpoint.load(tmp_path / "nowhere")


NAN = torch.tensor([1.0, math.nan])
WRONG: dict[str, list[object]] = {
    "config": [
        *("abc", {"model": 3}, {}, {"model": [[]]}, torch.zeros(2), {"seed": torch.zeros(2)}),
        *(
            plain(settings()) | {name: value}
            for name, value in (("schedule", {"lr": 10**400}), ("schedule", {"clip": -(10**400)}))
        ),
        plain(settings()) | {"seed": 10**400},
    ],
    "corpus": [None, 3],
    "environment": [[], {"torch": {}}, {3: "x"}],
    "epoch": [None, -1, True, 1.0, 2**63, 10**80],
    "batch": [-1, 1, "0"],
    "seconds": [-1.0, math.nan, math.inf, 1],
    "epoch_seconds": [math.nan],
    "epoch_words": [-1],
    "best_epoch": [0, 2, -1],
    "best": [math.nan, math.inf, "x"],
    "losses": [["x"], [math.nan], [1.0], None],
    "state": [[1], [NAN], [torch.zeros(2, dtype=torch.float64)], {}],
    "model": [
        3,
        {"w": 1},
        {"w": NAN},
        {"w": torch.tensor([math.inf])},
        {"w": torch.zeros(2, dtype=torch.int64)},
        {3: torch.zeros(2)},
    ],
    "optimiser": [[], None],
    "learned": [
        *(
            torch.zeros(2),
            torch.zeros(1),
            LEARNED | {"line_end": torch.zeros(2)},
            LEARNED | {"vocabulary": [torch.zeros(2)] * 2},
        ),
        *(
            [],
            {},
            {"vocabulary": ["a", "a"], "line_end": None, "unknown": None},
            {"vocabulary": [3], "line_end": None, "unknown": None},
        ),
        *(
            LEARNED | {"line_end": None},
            LEARNED | {"unknown": "a"},
            LEARNED | {"mean": 1.0},
            {"vocabulary": ["a"]},
        ),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_in_a_checkpoint_is_refused_in_one_line_that_quotes_nothing_of_it(
    name: str, tmp_path: Path
) -> None:
    """With a checksum that fits, as of somebody who edits it, or of a program that went wrong."""
    for value in WRONG[name]:
        files.write_tensors(
            tmp_path / "part", {"format": checkpoint.FORMAT, **vars(at_epoch(1)), name: value}
        )
        with pytest.raises(ConfigError, match=r"^checkpoint=\S+part cannot be used: ") as refused:
            checkpoint.load(tmp_path / "part")
        assert str(refused.value).isprintable() and "weights_only" not in str(refused.value)


def test_a_metric_is_infinite_only_before_the_first_epoch_ends(tmp_path: Path) -> None:
    checkpoint.save(replace(at_epoch(0, 0, batch=2), best=math.inf), tmp_path)
    assert checkpoint.load(checkpoint.path_of(tmp_path, 0, 2)).best == math.inf


def test_stored_settings_are_never_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would send a secret to whatever address they name."""
    monkeypatch.setenv("SECRET", "hunter2")
    for data in (
        {"source": "hub", "name": "attacker/${oc.env:SECRET}", "column": "text"},
        {"source": "hub", "name": "attacker/name", "column": "${oc.env:SECRET}"},
        {"source": "hub", "${oc.env:SECRET}": "attacker/name", "column": "text"},
    ):
        checkpoint.save(replace(at_epoch(1), config=deepcopy(configured()) | {"data": data}), tmp_path)
        with pytest.raises(ConfigError, match="its settings are not those of a training run") as refused:
            checkpoint.load(checkpoint.path_of(tmp_path, 1))
        assert "hunter2" not in str(refused.value)


def test_a_checkpoint_under_the_name_of_another_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in (1, 2):
        checkpoint.save(at_epoch(epoch, epoch), tmp_path)
    checkpoint.path_of(tmp_path, 2).rename(checkpoint.path_of(tmp_path, 3))
    checkpoint.path_of(tmp_path, 4).mkdir()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.epoch == 1
    said = capsys.readouterr().err
    assert (
        "checkpoint-0003.pt cannot be used: it is of another epoch" in said
        and "checkpoint-0004.pt is damaged" in said
    )


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    content = vars(at_epoch(1))
    for other in ("vdrop checkpoint 4", "vdrop checkpoint 6", None):
        files.write_tensors(tmp_path / "other", {"format": other, **content})
        with pytest.raises(
            Unusable, match=r"^checkpoint=\S+other was not written by this version.*; train again$"
        ):
            checkpoint.load(tmp_path / "other")


def damages(content: bytes, times: int) -> Iterator[bytes]:
    """Yields 45 random damages `times` times, and 50 fixed ones: bits that flip, a missing end, zeros, other
    kinds of files, a payload.
    """
    source = random.Random(0)
    for _ in range(25 * times):
        flipped = bytearray(content)
        flipped[source.randrange(len(content))] ^= 1 << source.randrange(8)
        yield bytes(flipped)
    for _ in range(15 * times):
        yield content[: source.randrange(len(content))]
    for _ in range(5 * times):
        start = source.randrange(len(content))
        stop = min(start + source.randrange(1, 5000), len(content))
        yield content[:start] + bytes(stop - start) + content[stop:] if any(content[start:stop]) else b""
    archive, saved = BytesIO(), BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", b"b" * 1000)
    torch.save({"payload": Payload()}, saved)
    kinds = [
        b"",
        b"\x00" * 4096,
        b"not a checkpoint\n",
        b"\x89PNG\r\n\x1a\n" + content[:999],
        gzip.compress(content),
        archive.getvalue(),
    ]
    kinds += [
        pickle.dumps(Payload()),
        pickle.dumps(Payload(), 0),
        saved.getvalue(),
        b'{"format": "vdrop checkpoint 2"}',
    ]
    for kind in kinds:
        for tail in (b"", content[-files.TAIL :], files.MARK + b"0" * 64, content, b"\n"):
            yield kind + tail if kind + tail != content else kind


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.long)])
def test_damaged_checkpoints_are_refused_by_name_or_survived_through_the_one_before(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for epoch in (1, 2):
        checkpoint.save(at_epoch(epoch), tmp_path)
    path = checkpoint.path_of(tmp_path, 2)
    content, count = path.read_bytes(), 0
    for damaged in damages(content, times):
        path.write_bytes(damaged)
        count += 1
        with pytest.raises(ConfigError, match=f"checkpoint={path} is damaged or not a checkpoint"):
            checkpoint.load(path)
        newest = checkpoint.newest(tmp_path)
        assert newest is not None and newest.epoch == 1
        assert "checkpoint-0002.pt is damaged" in capsys.readouterr().err
    assert count == 45 * times + 50 and not (tmp_path / "payload-ran").exists()


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="is not a regular file"):
            checkpoint.load(path)


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder without"):
        checkpoint.find(str(tmp_path))


def test_run_folders_are_named_by_what_changes_the_numbers() -> None:
    base = checkpoint.run_folder(settings(), "f")
    assert base.parts[:3] == ("outputs", "train", "language_model-lstm_medium-variational")
    assert base.name.endswith("-s1") and len(base.name) == len("01234567-s1")
    for same in (
        "log_every=7",
        "outputs=elsewhere",
        "checkpoint.minutes=1",
        "checkpoint.epochs=3",
        "stuck.steps=9",
        "stuck.steps=9 stuck.loss=3",
        "force=true",
        "data.cache=null",
        "data.dir=/corpora",
    ):
        assert checkpoint.run_folder(settings(*same.split()), "f").name == base.name
    for other in (
        "model.init=0.06",
        "dropout.p_h=0.1",
        "schedule.lr=2",
        "task.bptt=7",
        "backend=reference",
        "schedule.epochs=1",
    ):
        assert checkpoint.run_folder(settings(other), "f").name != base.name
    assert checkpoint.run_folder(settings(), "g").name != base.name
    assert checkpoint.run_folder(settings("seed=2"), "f").name == base.name.replace("-s1", "-s2")


def test_epochs_are_numbers_not_words(tmp_path: Path) -> None:
    for epoch in (9_998, 9_999, 10_000):
        checkpoint.save(at_epoch(epoch, 9_998), tmp_path)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.epoch == 10_000
