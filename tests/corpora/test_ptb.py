"""Penn Treebank: the real files, and every way of not having them. Downloads are tried on servers of this
machine.
"""

import http.server
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdrop_cli import corpora
from vdrop_cli.corpora import ptb
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.data import HubText, PennTreebank


@pytest.fixture(autouse=True)
def nowhere(elsewhere: Path) -> None:
    pass


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the Hub nor the address answers."""
    monkeypatch.setattr(ptb, "HUB", HubText(name="./not-here", column="sentence"))
    monkeypatch.setattr(ptb, "URL", "http://127.0.0.1:1/ptb.{part}.txt")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_the_real_files_have_the_known_counts(real_data: Path) -> None:
    corpus = corpora.load_text(PennTreebank(dir=str(real_data / "ptb"), cache=None))
    assert {part: len(stream) for part, stream in corpus.parts.items()} == {
        "train": 929_589,
        "valid": 73_760,
        "test": 82_430,
    }
    assert len(corpus.vocabulary) == 10_000
    assert corpus.vocabulary[:3] == ["aer", "banknote", "berlitz"] and corpus.vocabulary[24] == "<eos>"
    assert max(int(stream.max()) for stream in corpus.parts.values()) == 9_999


def test_vdrop_data_is_the_folder_above(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDROP_DATA", str(real_data))
    assert ptb.read(PennTreebank()).origin == str(real_data / "ptb")


def test_a_changed_file_is_named(real_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ptb"
    shutil.copytree(real_data / "ptb", folder, copy_function=shutil.copyfile)
    with (folder / "ptb.valid.txt").open("ab") as file:
        file.write(b" one more word \n")
    with pytest.raises(
        ConfigError,
        match=r"data\.dir: .*ptb\.valid\.txt is not Mikolov's Penn Treebank: MD5 .* expected aa0affc0",
    ):
        corpora.load_text(PennTreebank(dir=str(folder), cache=None))


def test_a_folder_without_the_files_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    (tmp_path / "ptb.train.txt").touch()
    with pytest.raises(ConfigError, match=r"data\.dir=.* has no ptb\.valid\.txt; set data\.dir"):
        ptb.read(PennTreebank(dir=str(tmp_path)))


@pytest.mark.usefixtures("unreachable")
def test_when_nothing_can_be_reached_the_ways_out_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        ptb.read(PennTreebank())
    for way in ("data.dir=", "VDROP_DATA=", "data/ptb", "data=pydoc", "the Hub", "127.0.0.1"):
        assert way in str(caught.value)


@pytest.fixture
def server(real_data: Path) -> Iterator[str]:
    """The files at an address of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(real_data / "ptb"))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/ptb.{{part}}.txt"
        running.shutdown()
        thread.join()


@pytest.mark.usefixtures("unreachable")
def test_the_files_are_fetched_by_address_verified_and_stored(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptb, "URL", server)
    raw = ptb.read(PennTreebank())
    assert server in raw.origin
    monkeypatch.setattr(ptb, "URL", "http://127.0.0.1:1/{part}")
    assert ptb.read(PennTreebank()).parts == raw.parts  # the second time from data/ptb


@pytest.mark.usefixtures("unreachable")
def test_the_hubs_copy_becomes_the_original_to_the_byte(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub has the sentences stripped, as parquet; here the same in a folder, read by the same library."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    for part, split in (("train", "train"), ("valid", "validation"), ("test", "test")):
        lines = (real_data / "ptb" / f"ptb.{part}.txt").read_text().splitlines()
        datasets.Dataset.from_dict({"sentence": [line.strip() for line in lines]}).to_parquet(
            str(folder / f"{split}.parquet")
        )
    monkeypatch.setattr(ptb, "HUB", HubText(name=str(folder), column="sentence"))
    raw = ptb.read(PennTreebank())
    assert "the Hub" in raw.origin
    assert raw.parts["train"] == (real_data / "ptb" / "ptb.train.txt").read_bytes()


@pytest.mark.usefixtures("unreachable")
def test_something_else_at_the_address_is_refused_and_not_stored(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptb, "URL", server.replace("{part}", "test"))
    with pytest.raises(ConfigError, match=r"train part from http.*is not Mikolov's"):
        ptb.read(PennTreebank())
    assert not Path("data").exists()


@pytest.mark.usefixtures("unreachable")
def test_a_folder_that_cannot_be_written_is_named(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptb, "URL", server)
    Path("data").write_text("in the way")
    with pytest.raises(ConfigError, match="data/ptb cannot be written"):
        ptb.read(PennTreebank())


@pytest.mark.usefixtures("unreachable")
def test_a_connection_that_ends_too_soon_is_a_refusal_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that promises more than it sends."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listening.accept()
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort")
        connection.close()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    monkeypatch.setattr(ptb, "URL", f"http://127.0.0.1:{listening.getsockname()[1]}/{{part}}")
    with pytest.raises(ConfigError, match="IncompleteRead"):
        ptb.read(PennTreebank())
    thread.join()
    listening.close()
