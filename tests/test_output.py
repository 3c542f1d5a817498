"""Standard output and error: what cannot be shown there ends no command, and the exit code says that it was
lost.
"""

import errno
import io
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from tests.conftest import TINY
from vdrop_cli import cli, files, output
from vdrop_cli.sinks import read_log


def opened(path: str, encoding: str = "utf-8") -> io.TextIOWrapper:
    return open(path, "w", encoding=encoding)


class Broken(io.RawIOBase):
    """A file or a pipe that cannot be written."""

    def __init__(self, number: int) -> None:
        self.number = number

    def writable(self) -> bool:
        return True

    def write(self, content: object) -> int:
        raise OSError(self.number, "no")


class BrokenText(io.TextIOWrapper):
    """A text stream on it that is silent when it is closed: Python 3.13 warns of errors in finalizers."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def broken(number: int) -> io.TextIOWrapper:
    return BrokenText(io.BufferedWriter(Broken(number), 100), encoding="utf-8", line_buffering=True)


def run(*arguments: str) -> int:
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vdrop", *arguments])
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EPIPE, 141)])
@pytest.mark.parametrize("channel", ["stdout", "stderr"])
def test_training_and_evaluation_end_well_whoever_reads(
    channel: str,
    number: int,
    code: int,
    text: list[str],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Results are in their files; the exit code shows that the table on standard output was lost."""
    for command in ("train", "eval"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, channel, broken(number))
            arguments = (
                [*TINY, *text]
                if command == "train"
                else [f"checkpoint={next(here.rglob('*.pt'))}", "stored_data=true", "device=cpu"]
            )
            assert run(command, *arguments) == (code if channel == "stdout" else 0)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert said.err.count("standard output cannot be written") == (
            channel == "stdout" and number == errno.ENOSPC
        )
        assert channel == "stdout" or "test_ppl" in said.out
    (result,) = here.rglob("result.json")
    assert [record["kind"] for record in read_log(result.with_name("log.jsonl"))][-2:] == ["epoch", "result"]
    assert result.with_name("eval-0001-standard.json").is_file()


def test_an_evaluation_that_can_neither_be_written_nor_shown_says_why(
    text: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", *TINY, *text) == 0
    monkeypatch.setattr(files, "flush_folder", lambda folder: broken(errno.EIO).write("\n"))
    for shown in (True, False):
        if not shown:
            monkeypatch.setattr(sys, "stdout", broken(errno.ENOSPC))
        capsys.readouterr()
        assert run("eval", f"checkpoint={next(here.rglob('*.pt'))}", "stored_data=true", "device=cpu") == 1
        said = capsys.readouterr()
        assert "eval-0001-standard.json cannot be written (no); make room, or check the disk" in said.err
        assert ("test_ppl" in said.out) == ("the results are above" in said.err) == shown
        assert said.err.count("standard output cannot be written") == (not shown)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["data", "data=pydoc", "data.cache=null"],
        ["completion"],
        ["train", "--cfg", "job"],
    ],
)
@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EPIPE, 141)])
def test_lost_output_changes_the_exit_code(
    number: int,
    code: int,
    arguments: list[str],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", broken(number))
    assert run(*arguments) == code
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == (1 if number == errno.ENOSPC else 0) and all(
        "standard output cannot be written" in line for line in errors
    )


def test_a_mistake_has_its_exit_code_whoever_reads(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", broken(errno.ENOSPC))
    monkeypatch.setattr(sys, "stderr", broken(errno.EPIPE))
    assert run("train", "model.layers=two") == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_no_encoding_of_a_terminal_is_an_error(
    encoding: str,
    text: list[str],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    streams = {"stdout": opened("out", encoding), "stderr": opened("err", encoding)}
    with monkeypatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        assert run("--help") == 0
        assert run("train", *TINY, *text) == 0
        assert (
            run(
                "eval",
                f"checkpoint={next(here.rglob('*.pt'))}",
                "stored_data=true",
                "device=cpu",
                "mc_samples=2",
            )
            == 0
        )
        assert run("train", "data.train=…") == 2
    for stream in streams.values():
        stream.close()
    assert "\\u2026" in (here / "out").read_text(encoding) and "test_ppl_mc2" in (here / "out").read_text(
        encoding
    )
    assert len(list(here.rglob("eval-*.json"))) == 1


def test_streams_are_prepared_once_and_closed_ones_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    output.prepare()
    first = (sys.stdout, sys.stderr)
    output.prepare()
    assert (sys.stdout, sys.stderr) == first
    print("x")
    print("x", file=sys.stderr, flush=True)
    assert output.finish() == 0
    for stream in first:
        stream.close()


def test_what_is_no_fault_of_the_output_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    output.prepare()
    with pytest.raises(OSError, match="mine"), output.stdout_errors_deferred():
        raise OSError("mine")
    assert not output.is_stdout_error(OSError("mine"))
