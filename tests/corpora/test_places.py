"""Where corpora are looked for, and how they are stored."""

from pathlib import Path

import pytest

from vdrop_cli.corpora import places
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.data import VaderSnippets

FILES = ["a.txt", "sub/b.txt"]


@pytest.mark.usefixtures("elsewhere")
def test_the_first_place_that_has_all_files_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = VaderSnippets()
    monkeypatch.setenv("VDROP_DATA", str(tmp_path / "root"))
    assert places.local(data, "name", FILES) is None
    folder = places.store("name", {file: file.encode() for file in FILES})
    assert folder == Path("data/name") and not list(Path().rglob("*.tmp"))
    assert places.local(data, "name", FILES) == ("data/name", folder)
    (tmp_path / "root" / "name" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "name" / "a.txt").touch()
    assert places.local(data, "name", FILES) == ("data/name", folder), "a file is missing in the first place"
    (tmp_path / "root" / "name" / "sub" / "b.txt").touch()
    assert places.local(data, "name", FILES) == ("VDROP_DATA", tmp_path / "root" / "name")


@pytest.mark.usefixtures("elsewhere")
def test_a_folder_that_was_named_is_the_only_one(tmp_path: Path) -> None:
    places.store("name", {file: b"" for file in FILES})
    (tmp_path / "a.txt").touch()
    with pytest.raises(
        ConfigError,
        match=r"^data\.dir=.* has no sub/b\.txt; set data\.dir to a folder with a\.txt and sub/b\.txt",
    ):
        places.local(VaderSnippets(dir=str(tmp_path)), "name", FILES)


@pytest.mark.usefixtures("elsewhere")
def test_a_folder_that_cannot_be_written_is_named() -> None:
    Path("data").write_text("a file")
    with pytest.raises(ConfigError, match=r"^data/name cannot be written"):
        places.store("name", {"a.txt": b""})


@pytest.mark.usefixtures("elsewhere")
def test_what_a_user_has_there_is_not_overwritten() -> None:
    """As one part of a corpus of one's own, of which the other parts lack."""
    (folder := Path("data/name/sub")).mkdir(parents=True)
    (folder / "b.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"data/name/sub/b\.txt was not written by vdrop, .*; move it away"):
        places.store("name", {file: b"mine, and more" for file in FILES})
    assert (folder / "b.txt").read_text() == "mine" and not Path("data/name/a.txt").exists()
    places.store("name", {"a.txt": b"1", "sub/b.txt": b"mine"})
    assert Path("data/name/a.txt").read_bytes() == b"1"
