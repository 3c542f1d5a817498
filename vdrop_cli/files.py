"""Files that a crash leaves whole: written beside, flushed to disk, renamed into place. And a lock on what one process writes.

torch is imported where tensors are, so that commands without any are quick.
"""

import errno
import fcntl
import hashlib
import os
import re
import socket
import stat
import sys
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Self

from vdrop_cli.config import ConfigError, RunError

MARK = b"sha256:"
TAIL = len(MARK) + 64  # bytes: the mark and the digest in hex


def lacks_memory(error: BaseException) -> bool:
    """Whether an error, of Python's or torch's, says that there was not enough."""
    signs = ("not enough memory", "out of memory", "can't allocate memory", "storage size calculation")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


class Damaged(Exception):
    """What is in a file is not what was written into it, or it never was one of this kind."""


def read(path: Path, limit: int | None = None) -> bytes:
    """The content of a regular file, or of one that a link leads to; at most `limit` bytes.

    A FIFO or a device is never opened: the one waits for a writer, the other may have no end.
    Raises: FileNotFoundError; Damaged where it is not a regular file or is larger than `limit`; OSError where it cannot be read now.
    """
    require_regular(os.stat(path))
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        require_regular(os.fstat(handle))  # it may have been replaced in between
        content = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise Damaged(f"it is larger than {limit:,} bytes")
    return content


def require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Damaged("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is not a regular file")


def replace(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file so that at every moment either the old one or the new one is there, whole, whatever happens."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise failed(path, error) from None


def remove_unfinished(folder: Path, names: str) -> None:
    """Takes away what processes left that were killed while they wrote, of files whose whole names fit the regular expression."""
    for left in folder.glob("*.tmp"):
        if re.fullmatch(rf"(?:{names})\.\d+\.tmp", left.name):
            left.unlink(missing_ok=True)


def failed(path: Path, error: OSError) -> RunError:
    advice = dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "work in a folder that you may write to")
    advice |= dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "make its folder")
    return RunError(f"{path} cannot be written ({error.strerror}); {advice.get(error.errno or 0, 'make room, or mend the disk')}")


def flush_folder(folder: Path) -> None:
    """A renamed file is on disk for certain only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Tensors and plain values as `torch.save` writes them; a checksum of it all stands at the end, as the comment of a zip file."""
    import torch

    buffer = BytesIO()
    torch.save(content, buffer)
    body = buffer.getbuffer()
    head, comment_size = body[:-2], TAIL.to_bytes(2, "little")
    digest = hashlib.sha256(head)
    digest.update(comment_size)
    replace(path, head, comment_size, MARK + digest.hexdigest().encode())


def checksum(path: Path) -> str:
    """The one that stands at the end of a file of tensors."""
    if not path.is_file():
        raise FileNotFoundError(path)
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        tail = file.read()
    if len(tail) < TAIL or not tail.startswith(MARK):
        raise Damaged("there is no checksum at its end")
    return tail[len(MARK) :].decode("ascii", "replace")


def read_tensors(path: Path) -> dict[str, Any]:
    """What `write_tensors` wrote. Nothing in the file is ever run, whoever made it.

    Raises: FileNotFoundError; Damaged; OSError, MemoryError, where it may well be whole.
    """
    import torch

    wanted = checksum(path)
    content = path.read_bytes()
    if hashlib.sha256(memoryview(content)[:-TAIL]).hexdigest() != wanted:
        raise Damaged("its content does not fit its checksum")
    try:
        held = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader of a crafted file stumbles over
        if lacks_memory(error):
            raise
        raise Damaged(next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]) from None
    if not isinstance(held, dict):
        raise Damaged("it holds something else")
    return held


class Lock:
    """A file that one process at a time can hold, with its host and process id in it for people to read.

    The system lets go of it when the process ends, however it ends: one that was left behind by a process that is gone holds
    nobody up. Raises ConfigError where another process holds it.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what

    def __enter__(self) -> Self:
        while True:
            try:
                self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise failed(self.path, error) from None
            if self.taken() and self.is_in_place():
                break
            os.close(self.handle)  # its holder took it away in between
        with suppress(OSError):  # who holds it is only for people to read; a full disk tells at the next file
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.handle)

    def taken(self) -> bool:
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self.handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(self.handle)
            raise ConfigError(f"{self.what} is in use by {holder}; wait for it, or stop it and give the same command again") from None
        except OSError as error:
            print(f"vdrop: {self.path} cannot be locked ({error.strerror}); see to it that no other process works there", file=sys.stderr)
        return True

    def is_in_place(self) -> bool:
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.handle))
        except FileNotFoundError:
            return False
