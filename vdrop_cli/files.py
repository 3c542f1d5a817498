"""Files that a crash leaves whole: written beside, flushed to disk, renamed into place.

torch is imported where tensors are, so that commands without any are quick.
"""

import errno
import hashlib
import os
import re
import stat
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal

from vdrop_cli import archives
from vdrop_cli.errors import ConfigError, RunError

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

    Raises: FileNotFoundError; Damaged where it is not a regular file or is larger than `limit`; OSError where
    it cannot be read now.
    """
    with open_regular(path) as file:
        content = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise Damaged(f"it is larger than {limit:,} bytes")
    return content


def read_start(path: Path, size: int) -> bytes:
    """The first `size` bytes, with the errors of `read`."""
    with open_regular(path) as file:
        return file.read(size)


def open_regular(path: Path, flags: int = os.O_RDONLY, mode: Literal["rb", "ab+"] = "rb") -> IO[bytes]:
    """A regular file, opened. A FIFO or a device is never opened: the one waits for a writer, the other may
    have no end.

    Raises: FileNotFoundError; Damaged; OSError.
    """
    if not flags & os.O_CREAT or path.exists():
        require_regular(os.stat(path))
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        require_regular(os.fstat(handle))  # it may have been replaced in between
    except Damaged:
        os.close(handle)
        raise
    return open(handle, mode)


def require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Damaged("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is not a regular file")


def replace(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file so that at every moment either the old one or the new one is there, whole, whatever
    happens.

    A link to a file is replaced, and its target stays. Raises RunError where it cannot be written, or where a
    folder, a FIFO or a device is in its place.
    """
    require_replaceable(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.unlink(missing_ok=True)  # of a killed process that had this id
        with beside.open("xb") as file:  # never through a link
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


def require_replaceable(path: Path) -> None:
    """Raises RunError where something other than a regular file, or a link to one, is in the place of a
    file.
    """
    try:
        require_regular(os.stat(path))
    except Damaged as reason:
        raise RunError(f"{path} cannot be written ({reason}); move it away") from None
    except OSError:  # not there, or writing says why not
        pass


def remove_unfinished(folder: Path, names: str) -> None:
    """Removes what killed processes left half-written, of files whose whole names fit the regular
    expression.
    """
    for left in folder.glob("*.tmp"):
        if re.fullmatch(rf"(?:{names})\.\d+\.tmp", left.name):
            with suppress(OSError):  # it does no harm where it is
                left.unlink()


def failed(path: Path, error: OSError) -> RunError:
    advice = dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "work in a folder that you may write to")
    advice |= dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "make its folder") | {
        errno.ELOOP: "it is a link, which is not followed; remove it"
    }
    return RunError(
        f"{path} cannot be written ({error.strerror}); "
        f"{advice.get(error.errno or 0, 'make room, or mend the disk')}"
    )


def unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be read ({error.strerror}); see to it that it can")


def flush_folder(folder: Path) -> None:
    """A renamed file is on disk for certain only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Tensors and plain values as `torch.save` writes them; a checksum of it all stands at the end, as the
    comment of a zip file.
    """
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
    require_regular(os.stat(path))
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        tail = file.read()
    if len(tail) < TAIL or not tail.startswith(MARK):
        raise Damaged("there is no checksum at its end")
    return printable(tail[len(MARK) :].decode("ascii", "replace"))


def read_tensors(path: Path) -> dict[str, Any]:
    """What `write_tensors` wrote. Nothing in the file is ever run, whoever made it, and it takes no more
    memory than the file is large.

    Raises: FileNotFoundError; Damaged; OSError, MemoryError, where it may well be whole.
    """
    wanted = checksum(path)
    content = read(path)
    if hashlib.sha256(memoryview(content)[:-TAIL]).hexdigest() != wanted:
        raise Damaged("its content does not fit its checksum")
    try:
        held = archives.unpack(content)
    except archives.Malformed as reason:
        raise Damaged(str(reason)) from None
    if not isinstance(held, dict):
        raise Damaged("it holds something else")
    return held


def printable(text: object) -> str:
    """A text from elsewhere for a terminal: characters that would move its cursor or change its colours are
    escaped.
    """
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(text))
