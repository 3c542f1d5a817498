"""Checkpoints: what goes in comes out, what is damaged is refused, what is kept."""

import pickle
from pathlib import Path

import pytest
import torch

from tests.conftest import settings
from vdrop_cli import checkpoint
from vdrop_cli.checkpoint import Checkpoint
from vdrop_cli.config import ConfigError, Precision, plain


def at_epoch(epoch: int, best: int = 1, *overrides: str) -> Checkpoint:
    model = {"w": torch.full((300,), float(epoch))}
    return Checkpoint(plain(settings(*overrides)), "fingerprint", epoch, 1.5, best, 99.0, model)


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    checkpoint.save(at_epoch(3, 3), tmp_path)
    found = checkpoint.load(checkpoint.path_of(tmp_path, 3))
    assert vars(found) | {"model": None} == vars(at_epoch(3, 3)) | {"model": None}
    assert torch.equal(found.model["w"], torch.full((300,), 3.0))
    assert found.train == settings()


def test_one_from_before_there_was_a_choice_of_precision_is_fp32(tmp_path: Path) -> None:
    old = at_epoch(1)
    del old.config["precision"]
    checkpoint.save(old, tmp_path)
    assert checkpoint.load(checkpoint.path_of(tmp_path, 1)).train.precision is Precision.fp32


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    for epoch, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        checkpoint.save(at_epoch(epoch, best), tmp_path)
    assert [path.name for path in checkpoint.all_in(tmp_path)] == ["checkpoint-0005.pt", "checkpoint-0004.pt", "checkpoint-0002.pt"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_damaged_newest_one_is_reported_and_the_one_before_it_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for epoch in (1, 2):
        checkpoint.save(at_epoch(epoch), tmp_path)
    path = checkpoint.path_of(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:-500])
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.epoch == 1
    assert "checkpoint-0002.pt is damaged" in capsys.readouterr().err


def test_a_run_is_reported_from_its_last_epoch_or_with_early_stopping_from_its_best(tmp_path: Path) -> None:
    for name, overrides, expected in (("last", (), 3), ("best", ("dropout=none",), 2)):
        folder = tmp_path / name
        folder.mkdir()
        for epoch in (1, 2, 3):
            checkpoint.save(at_epoch(epoch, min(epoch, 2), *overrides), folder)
        assert checkpoint.find(str(folder)) == checkpoint.path_of(folder, expected)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("payload-ran"),)  # type: ignore[return-value]


def test_what_is_not_a_checkpoint_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = tmp_path / "checkpoint-0001.pt"
    checkpoint.save(at_epoch(1), tmp_path)
    content = whole.read_bytes()
    contents = {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "text": b"not a checkpoint\n",
        "pickle": pickle.dumps(Payload()),
    }
    for name, damaged in contents.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"checkpoint={tmp_path / name} is damaged or not a checkpoint"):
            checkpoint.load(tmp_path / name)
    torch.save({"payload": Payload()}, tmp_path / "crafted")
    with pytest.raises(ConfigError, match="damaged or not a checkpoint"):
        checkpoint.load(tmp_path / "crafted")
    assert not (tmp_path / "payload-ran").exists()
    torch.save({"model": {}}, tmp_path / "other")
    with pytest.raises(ConfigError, match="was not written by this version of vdrop"):
        checkpoint.load(tmp_path / "other")
    torch.save({"format": checkpoint.FORMAT, "model": {}}, tmp_path / "part")
    with pytest.raises(ConfigError, match="lacks a part"):
        checkpoint.load(tmp_path / "part")
    for change in ({"config": "abc"}, {"config": {"model": 3}}, {"model": 3}, {"model": {"w": 1}}, {"epoch": None}):
        torch.save({"format": checkpoint.FORMAT, **vars(at_epoch(1)), **change}, tmp_path / "part")
        with pytest.raises(ConfigError, match="holds something else"):
            checkpoint.load(tmp_path / "part")
    with pytest.raises(ConfigError, match="is not there"):
        checkpoint.load(tmp_path / "nowhere")


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder without"):
        checkpoint.find(str(tmp_path))


def test_run_folders_are_named_by_what_changes_the_numbers() -> None:
    base = checkpoint.run_folder(settings(), "f")
    assert base.parts[:3] == ("outputs", "train", "language_model-lstm_medium-variational")
    assert base.name.endswith("-s1") and len(base.name) == len("01234567-s1")
    for same in ("log_every=7", "outputs=elsewhere", "force=true", "data.cache=null", "data.dir=/corpora"):
        assert checkpoint.run_folder(settings(same), "f").name == base.name
    for other in ("model.init=0.06", "dropout.p_h=0.1", "schedule.lr=2", "task.bptt=7", "backend=reference", "schedule.epochs=1"):
        assert checkpoint.run_folder(settings(other), "f").name != base.name
    assert checkpoint.run_folder(settings(), "g").name != base.name
    assert checkpoint.run_folder(settings("seed=2"), "f").name == base.name.replace("-s1", "-s2")


def test_epochs_are_numbers_not_words(tmp_path: Path) -> None:
    for epoch in (9_998, 9_999, 10_000):
        checkpoint.save(at_epoch(epoch, 9_998), tmp_path)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.epoch == 10_000
