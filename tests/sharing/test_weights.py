"""`vdrop export`: what another program reads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, settings
from vdrop_cli import checkpoint, files
from vdrop_cli.commands import export, train
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.compose import restore

safe_open = pytest.importorskip("safetensors").safe_open
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file


def test_the_weights_are_those_of_the_checkpoint_and_the_settings_are_with_them(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text))
    folder = next(Path().rglob("result.json")).parent
    original = checkpoint.load(checkpoint.all_in(folder)[0])
    for more, target in (
        ([], folder / "checkpoint-0001.safetensors"),
        (["file=there.safetensors"], Path("there.safetensors")),
    ):
        export.run(settings(f"checkpoint={folder}", *more, command="export"))
        weights = load_file(target)
        assert weights.keys() == original.model.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in original.model.items())
        with safe_open(target, "pt") as file:
            metadata = file.metadata()
        assert restore(json.loads(metadata["config"])) == original.train and metadata["epoch"] == "1"


def test_it_is_whole_whatever_the_weights_memory_is_like(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that share memory or are not in order; a vocabulary beside them; names that are not the model's
    are refused.
    """
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text))
    (path,) = Path().rglob("checkpoint-0001.pt")
    original = checkpoint.load(path)
    changed = original.model | {
        "head_weight": original.model["embedding"],
        "layers.weight_hh_l0": original.model["layers.weight_hh_l0"].t().contiguous().t(),
    }
    assert not changed["layers.weight_hh_l0"].is_contiguous()
    files.write_tensors(
        Path("shared.pt"), {"format": checkpoint.FORMAT, **vars(replace(original, model=changed))}
    )
    export.run(settings("checkpoint=shared.pt", command="export"))
    weights = load_file("shared.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in changed.items())
    with safe_open("shared.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["vocabulary"]) == original.learned["vocabulary"] and len(
        original.learned["vocabulary"]
    ) == len(weights["embedding"])
    assert json.loads(metadata["line_end"]) == "<eos>" and all(
        isinstance(value, str) for value in metadata.values()
    )
    for wrong in (
        {f"{name}_": weight for name, weight in original.model.items()},
        original.model | {"embedding": original.model["embedding"][1:]},
    ):
        files.write_tensors(
            Path("wrong.pt"), {"format": checkpoint.FORMAT, **vars(replace(original, model=wrong))}
        )
        with pytest.raises(ConfigError, match=r"^checkpoint=wrong\.pt cannot be used: "):
            export.run(settings("checkpoint=wrong.pt", command="export"))
        assert not Path("wrong.safetensors").exists()


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_written(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text))
    (path,) = Path().rglob("checkpoint-0001.pt")
    before = path.read_bytes()
    for file in ("''", ".", "/", "..", str(path.parent)):
        with pytest.raises(ConfigError, match="file must name a file, not a folder"):
            export.run(settings(f"checkpoint={path}", f"file={file}", command="export"))
    with pytest.raises(ConfigError, match="another one than the checkpoint"):
        export.run(settings(f"checkpoint={path.parent}", f"file={path}", command="export"))
    assert path.read_bytes() == before
    export.run(settings(f"checkpoint={path}", "file=new/a.safetensors", command="export"))
    assert Path("new/a.safetensors").is_file()


def test_only_what_it_has_written_is_overwritten(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text))
    (path,) = Path().rglob("checkpoint-0001.pt")
    save_file({"w": torch.zeros(2)}, "theirs.safetensors")
    for name, content in (
        ("mine.txt", b"mine"),
        ("short", b"\x05"),
        ("list", (2).to_bytes(8, "little") + b"[]"),
    ):
        Path(name).write_bytes(content)
    for name in ("mine.txt", "short", "list", "theirs.safetensors"):
        before = Path(name).read_bytes()
        with pytest.raises(ConfigError, match=rf"{name} was not written by vdrop, .*; choose another file="):
            export.run(settings(f"checkpoint={path}", f"file={name}", command="export"))
        assert Path(name).read_bytes() == before
    Path("empty").touch()
    Path("link").symlink_to("empty")
    for name in ("empty", "empty", "link"):
        export.run(settings(f"checkpoint={path}", f"file={name}", command="export"))
    assert Path("link").is_symlink() and load_file("empty").keys() == checkpoint.load(path).model.keys()


@pytest.mark.parametrize("word", ["é" * 6_000_000, "half \ud800"])
def test_what_it_has_written_is_its_own_whatever_the_vocabulary(
    word: str, text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long: words are written as they are, but for what is no character."""
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text))
    original = checkpoint.load(next(Path().rglob("checkpoint-0001.pt")))
    vocabulary = [word, *original.learned["vocabulary"][1:]]
    files.write_tensors(
        Path("a.pt"),
        {
            "format": checkpoint.FORMAT,
            **vars(replace(original, learned=original.learned | {"vocabulary": vocabulary})),
        },
    )
    for _ in range(2):
        export.run(settings("checkpoint=a.pt", command="export"))
    with safe_open("a.safetensors", "pt") as file:
        stored_vocabulary = file.metadata()["vocabulary"]
    assert json.loads(stored_vocabulary) == vocabulary and len(stored_vocabulary) < 1.1 * len(word) + 1000


def test_without_a_checkpoint_it_says_so() -> None:
    with pytest.raises(ConfigError, match="checkpoint must be"):
        settings(command="export")
    with pytest.raises(ConfigError, match="checkpoint=nowhere does not exist"):
        export.run(settings("checkpoint=nowhere", command="export"))
