"""The folder of an export: what it holds, and what it does not overwrite."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import settings
from tests.sharing.exports import language_model, model_of_ratings
from vdrop_cli import checkpoint, stored
from vdrop_cli.commands import export
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.compose import restore
from vdrop_cli.sharing import weights

safe_open = pytest.importorskip("safetensors").safe_open
NAMES = ["README.md", "config.json", "model.safetensors", "vocabulary.json"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def exported(run: Path, folder: str = "shared") -> None:
    export.run(settings(f"checkpoint={run}", f"folder={folder}", command="export"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("task", ["language_model", "sentiment"])
def test_the_folder_holds_all_that_the_checkpoint_knows(
    task: str, text: list[str], rated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = language_model(text) if task == "language_model" else model_of_ratings(rated)
    exported(run, "deep/shared")
    folder = Path("deep/shared")
    assert list(contents(folder)) == NAMES and f"{folder}: " in capsys.readouterr().out
    snapshot = checkpoint.load(checkpoint.all_in(run)[0])
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    assert config["learned"] | {"vocabulary": vocabulary} == snapshot.learned
    settings_shared = restore(config["settings"])
    assert settings_shared.identity(config["corpus"]) == snapshot.train.identity(snapshot.corpus)
    assert (config["task"], config["epoch"], config["batch"]) == (task, 1, 0)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.keys() and json.loads(file.metadata()["config"]) == config["settings"]


def test_the_settings_are_strict_json(text: list[str]) -> None:
    """JSON has no infinity."""
    run = language_model(text, "schedule.clip=inf", "checkpoint.minutes=inf")
    exported(run)
    config = stored.read_json(Path("shared/config.json"))
    assert restore(config["settings"]).schedule == checkpoint.load(checkpoint.all_in(run)[0]).train.schedule
    exported(run)


def test_an_export_is_replaced_by_another_and_other_files_stay(runs: tuple[Path, Path]) -> None:
    first, second = runs
    exported(first)
    Path("shared/LICENSE").write_text("mine")
    before = contents(Path("shared"))
    exported(first)
    again = contents(Path("shared"))
    assert weights.are_equal(again.pop("model.safetensors"), before["model.safetensors"])
    assert again == {name: before[name] for name in again}
    exported(second)
    after = contents(Path("shared"))
    assert after["LICENSE"] == b"mine"
    assert all(after[name] != before[name] for name in NAMES if name != "vocabulary.json")


def test_an_edited_card_stays_with_its_weights_and_is_not_put_beside_others(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = runs
    exported(first)
    card = Path("shared/README.md")
    card.write_text(card.read_text() + "Licence: MIT\n")
    edited = contents(Path("shared"))
    capsys.readouterr()
    exported(first)
    assert contents(Path("shared"))["README.md"] == edited["README.md"]
    assert f"{card} was edited" in capsys.readouterr().err
    edited = contents(Path("shared"))
    with pytest.raises(ConfigError, match=rf"^{card} was edited for other weights"):
        exported(second)
    assert contents(Path("shared")) == edited
    Path("shared/model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"^{card} was edited for other weights"):
        exported(first)
    Path("shared/model.safetensors").unlink()
    with pytest.raises(ConfigError, match=rf"^{card} was edited for other weights"):
        exported(first)
    card.unlink()
    exported(second)
    assert "seed 2" in card.read_text()


def test_only_an_export_is_overwritten(run: Path) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    for name, config in (("theirs", '{"model_type": "bert"}'), ("list", "[]"), ("text", "settings")):
        Path(name).mkdir()
        Path(name, "config.json").write_text(config)
    Path("file").write_text("mine")
    exported(run, "weights")
    Path("weights/model.safetensors").write_bytes(b"mine")
    exported(run, "words")
    Path("words/vocabulary.json").write_text('{"a": 1}')
    for name in ("mine", "theirs", "list", "text", "weights", "words", "file"):
        before = Path(name).read_bytes() if name == "file" else contents(Path(name))
        with pytest.raises(ConfigError, match=rf"{name}.*; choose another folder="):
            exported(run, name)
        assert before == (Path(name).read_bytes() if name == "file" else contents(Path(name)))
