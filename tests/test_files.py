"""Files that are whole or not there, and checksums; on a disk that is really full."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import environment
from vdrop_cli import files
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.files import Damaged


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A FIFO would wait for a writer, a device need not end."""
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert files.read(tmp_path / "file", 7) == files.read(tmp_path / "link") == b"content"
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name, reason in (
        ("fifo", "not a regular file"),
        ("endless", "not a regular file"),
        (".", "is a folder"),
    ):
        with pytest.raises(Damaged, match=reason):
            files.read(tmp_path / name)
    with pytest.raises(Damaged, match="larger than 6 bytes"):
        files.read(tmp_path / "file", 6)
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "missing")


def test_what_is_wrong_with_a_file_is_a_mistake_of_one_line(tmp_path: Path) -> None:
    """Any other error passes."""
    path = tmp_path / "a"

    def read() -> bytes:
        with files.reading(path, "delete it"):
            return files.read(path)

    missing = r"/a cannot be read \(No such file or directory\); make it readable$"
    with pytest.raises(ConfigError, match=missing) as raised:
        read()
    assert str(raised.value).startswith(str(path)) and raised.value.__suppress_context__
    path.mkdir()
    with pytest.raises(ConfigError, match=r"/a is damaged \(it is a folder\); delete it$") as raised:
        read()
    assert str(raised.value).startswith(str(path)) and raised.value.__suppress_context__
    path.rmdir()
    path.write_bytes(b"content")
    assert read() == b"content"
    with pytest.raises(KeyError), files.reading(path, "delete it"):
        raise KeyError


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.replace(path, b"one")
    files.replace(path, b"two", memoryview(b" three"))
    assert path.read_bytes() == b"two three" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_only_a_file_is_replaced(kind: str, tmp_path: Path) -> None:
    """As root a device, or the link `/dev/stdout`, would be gone."""
    path = tmp_path / "a"
    {"fifo": lambda: os.mkfifo(path), "folder": path.mkdir, "device": lambda: path.symlink_to("/dev/null")}[
        kind
    ]()
    before = os.lstat(path)
    with pytest.raises(
        RunError, match=r"/a cannot be written \(it is (a folder|not a regular file)\); move it away"
    ):
        files.replace(path, b"content")
    assert os.path.samestat(os.lstat(path), before) and os.listdir(tmp_path) == ["a"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("mine")
    (tmp_path / "a").symlink_to(theirs)
    files.replace(tmp_path / "a", b"content")
    assert theirs.read_text() == "mine" and (tmp_path / "a").read_bytes() == b"content"
    assert sorted(os.listdir(tmp_path)) == ["a", "theirs"]


def test_temporary_files_are_not_shared_by_processes_with_one_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes in several containers can have the same number, and write the same file of a cache."""
    left = list[str]()

    def replace(source: Path, target: Path) -> None:
        left.append(source.name)
        if len(left) == 1:  # another process writes the same file meanwhile
            files.replace(target, b"second")
        os.replace(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    files.replace(tmp_path / "a", b"first")
    assert len(set(left)) == 2 and (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_an_output_has_its_folder_made_and_a_link_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("new/folder/a", "link", "link"):
        files.write_output(tmp_path / name, b"content", "csv")
        assert (tmp_path / name).read_bytes() == b"content"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").is_file()
    with pytest.raises(ConfigError, match=r"^csv=\S+/target/a: its folder cannot be made \(File exists\)"):
        files.write_output(tmp_path / "target" / "a", b"content", "csv")
    with pytest.raises(RunError, match="it is a folder"):
        files.write_output(tmp_path / "new", b"content", "csv")


def test_a_write_that_fails_names_the_path_and_leaves_the_old_file(tmp_path: Path) -> None:
    """A process that may write files of 1000 bytes, and no larger."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from vdrop_cli import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, "
        "1000))\n"
        "files.replace(Path('a'), b'old'); files.replace(Path('a'), bytes(2000))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert (
        ran.stderr.strip()
        .splitlines()[-1]
        .endswith("RunError: a cannot be written (File too large); make room, or check the disk")
    )
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
    with pytest.raises(
        RunError, match=r"/dev/full/a cannot be written \(Not a directory\); make its folder$"
    ):
        files.replace(Path("/dev/full/a"), b"")


@pytest.mark.parametrize(("number", "is_written"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_flush_folders_is_no_fault(
    number: int, is_written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared folders of some virtual machines have no fsync for folders. A disk that fails is a fault."""

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if is_written else pytest.raises(RunError, match=r"make room, or check the disk$"):
        files.replace(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_tensors_come_back_and_torch_can_read_them_too(tmp_path: Path) -> None:
    content = {"w": torch.randn(3, 5), "plain": [1, 2.5, "x", None, {"a": True}]}
    files.write_tensors(tmp_path / "t", content)
    for values in (files.read_tensors(tmp_path / "t"), torch.load(tmp_path / "t", weights_only=True)):
        assert torch.equal(values["w"], content["w"]) and values["plain"] == content["plain"]
    assert len(files.checksum(tmp_path / "t")) == 64


def test_what_is_changed_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "t"
    files.write_tensors(path, {"w": torch.zeros(100)})
    content = bytearray(path.read_bytes())
    for place in (
        0,
        len(content) // 2,
        len(content) - files.TAIL - 1,
        len(content) - files.TAIL,
        len(content) - 1,
    ):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(Damaged):
            files.read_tensors(path)
    path.write_bytes(content)
    assert files.read_tensors(path)["w"].shape == (100,)


UNREADABLE = r"not an archive of tensors and plain values \(UnpicklingError\)"


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


@pytest.mark.filterwarnings("ignore")  # some versions of torch warn of invariants that they do not check
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Payload, UNREADABLE),
        (lambda: print, UNREADABLE),
        (lambda: {1, 2}, "neither a tensor nor a plain value"),
        (lambda: bytearray(3), "neither a tensor nor a plain value"),
        (lambda: torch.float32, "neither a tensor nor a plain value"),
        (
            lambda: torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (10**12,)),
            "without its elements",
        ),
        (lambda: torch.empty(10**12, device="meta"), "without its elements"),
    ],
    ids=["an object", "a function", "a set", "bytes", "a type", "a sparse tensor", "a tensor without memory"],
)
def test_what_is_neither_a_tensor_nor_a_plain_value_is_refused_and_not_run(
    make: Callable[[], object], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only a program that writes the checksum, too, can have made such a file."""
    files.write_tensors(tmp_path / "t", {"good": [torch.ones(1)], "other": {"one": [make()]}})
    with pytest.raises(Damaged, match=reason):
        files.read_tensors(tmp_path / "t")
    assert capsys.readouterr().out == ""


def test_a_list_that_holds_itself_ends(tmp_path: Path) -> None:
    values: dict[str, Any] = {"a": [1]}
    values["a"].append(values["a"])
    files.write_tensors(tmp_path / "t", values)
    assert files.read_tensors(tmp_path / "t")["a"][0] == 1


def test_unfinished_files_are_taken_away_by_name(tmp_path: Path) -> None:
    others = ["a-2.json.12.tmp", "a.json", "a.json.tmp", "b.json.12.tmp", "ba.json.12.tmp"]
    for name in ["a.json.12.tmp", "a.partial.345.tmp", *others]:
        (tmp_path / name).touch()
    (tmp_path / "a.json.13.tmp").mkdir()
    files.remove_unfinished(tmp_path, r"a\.(json|partial)")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "a.json.13.tmp"]), (
        "a folder is not removed, and no reason to stop"
    )


def test_the_advice_fits_the_reason() -> None:
    for number, advice in (
        (errno.ENOSPC, "make room"),
        (errno.EIO, "check the disk"),
        (errno.EROFS, "that you may write to"),
    ):
        assert advice in str(files.file_error(Path("a"), OSError(number, "x")))
    assert "make room" not in str(files.file_error(Path("a"), OSError(errno.EACCES, "x")))
