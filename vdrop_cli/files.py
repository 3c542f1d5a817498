"""Files that a crash leaves whole: written under another name, flushed to disk, then renamed.

torch is imported only in functions that need it, so commands without tensors start fast.
"""

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal

from vdrop_cli.errors import ConfigError, RunError, lacks_memory

MARK = b"sha256:"
TAIL = len(MARK) + 64  # bytes: the mark and the hexadecimal digest
BLOCK = 2**20  # bytes that are read at once


class Damaged(Exception):
    """The content of a file is not what was written, or the file never was of this kind."""


def read(path: Path, limit: int | None = None) -> bytes:
    """Returns the content of a regular file, or of one that a link leads to; at most `limit` bytes.

    Raises FileNotFoundError; Damaged where it is not a regular file or is larger than `limit`; OSError where
    it cannot be read now.
    """
    with open_regular(path) as file:
        content = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise Damaged(f"it is larger than {limit:,} bytes")
    return content


def read_start(path: Path, size: int) -> bytes:
    """Returns the first `size` bytes of a file; raises the errors of `read`."""
    with open_regular(path) as file:
        return file.read(size)


def open_regular(path: Path, flags: int = os.O_RDONLY, mode: Literal["rb", "ab+"] = "rb") -> IO[bytes]:
    """Opens a regular file.

    A FIFO or a device is never opened: a FIFO waits for a writer, and a device may have no end. Raises
    FileNotFoundError; Damaged; OSError.
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


def is_in_place(path: Path, handle: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def replace(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file atomically: at every moment either the old or the new content exists, whole.

    A link to a file is replaced, and its target stays. Raises RunError where the file cannot be written, or
    where a folder, a FIFO or a device has its name.
    """
    require_replaceable(path)
    # a random number rather than that of the process, which processes in several containers can share
    beside = path.with_name(f"{path.name}.{secrets.randbits(63)}.tmp")
    try:
        with beside.open("xb") as file:  # does not follow a link
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise file_error(path, error) from None


def write_output(path: Path, content: bytes | memoryview, key: str) -> None:
    """Writes a file that the setting `key` names: a missing folder is made, and a link to a file is followed.

    Raises ConfigError where the folder cannot be made, RunError where the file cannot be written.
    """
    make_output_folder(path, key)
    replace(Path(os.path.realpath(path)), content)


def make_output_folder(path: Path, key: str) -> None:
    """Makes the folder of a file that the setting `key` names; raises ConfigError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{key}={path}: its folder cannot be made ({error.strerror}); choose another file"
        ) from None


def require_replaceable(path: Path) -> None:
    """Raises RunError where something other than a regular file, or a link to one, has the name of a file."""
    try:
        require_regular(os.stat(path))
    except Damaged as reason:
        raise RunError(f"{path} cannot be written ({reason}); move it away") from None
    except OSError:  # a missing file; other errors recur when it is written
        pass


def remove_unfinished(folder: Path, names: str) -> None:
    """Removes temporary files that killed processes left.

    The regular expression `names` matches the names that these files would finally have.
    """
    for left in folder.glob("*.tmp"):
        if re.fullmatch(rf"(?:{names})\.\d+\.tmp", left.name):
            with suppress(OSError):  # a remaining file is harmless
                left.unlink()


def file_error(path: Path, error: OSError) -> RunError:
    """Returns the error for a file that cannot be written, with advice."""
    advice = dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "work in a folder that you may write to")
    advice |= dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "make its folder")
    advice[errno.ELOOP] = "it is a link, which is not followed; remove it"
    reason = advice.get(error.errno or 0, "make room, or check the disk")
    return RunError(f"{path} cannot be written ({error.strerror}); {reason}")


def read_error(path: Path, error: OSError) -> ConfigError:
    """Returns the error for a file that cannot be read."""
    return ConfigError(f"{path} cannot be read ({error.strerror}); make it readable")


@contextmanager
def reading(path: Path, advice: str) -> Iterator[None]:
    """Within it a file is read and parsed. Raises ConfigError in place of OSError, also of FileNotFoundError,
    and of Damaged; `advice` says what to do about a damaged file.
    """
    try:
        yield
    except OSError as error:
        raise read_error(path, error) from None
    except Damaged as damage:
        raise ConfigError(f"{path} is damaged ({damage}); {advice}") from None


def flush_folder(folder: Path) -> None:
    """Flushes a folder to disk; only then is a renamed file in it on disk for certain."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without it, such as a virtual machine's shared folder
            raise
    finally:
        os.close(handle)


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain values in the format of `torch.save`.

    A checksum of the content is the comment of the zip file, at its end.
    """
    import torch

    buffer = BytesIO()
    torch.save(content, buffer)
    body = buffer.getbuffer()
    head, comment_size = body[:-2], TAIL.to_bytes(2, "little")
    digest = hashlib.sha256(head)
    digest.update(comment_size)
    replace(path, head, comment_size, MARK + digest.hexdigest().encode())


def version(path: Path) -> tuple[int, ...] | None:
    """Returns numbers that another file of this name would not share; None where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def checksum(path: Path) -> str:
    """Returns the checksum at the end of a file of tensors; raises Damaged where it has none."""
    with open_regular(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        tail = file.read()
    if len(tail) < TAIL or not tail.startswith(MARK):
        raise Damaged("it does not end with a checksum")
    return printable(tail[len(MARK) :].decode("ascii", "replace"))


def read_tensors(path: Path) -> dict[str, Any]:
    """Reads what `write_tensors` wrote, without running code from the file.

    Raises FileNotFoundError or Damaged, and OSError or MemoryError where the file itself may be intact.
    """
    import torch

    expected = checksum(path)
    with open_regular(path) as file:
        content_digest = hashlib.sha256()
        left = os.fstat(file.fileno()).st_size - TAIL
        while part := file.read(min(left, BLOCK)):
            content_digest.update(part)
            left -= len(part)
        if content_digest.hexdigest() != expected:
            raise Damaged("its content does not fit its checksum")
        file.seek(0)
        try:
            values = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # torch raises many types for what it did not write
            if lacks_memory(error):
                raise MemoryError(str(error)) from None
            raise Damaged(
                f"it is not an archive of tensors and plain values ({type(error).__name__})"
            ) from None
    if not isinstance(values, dict):
        raise Damaged("its content is not a mapping")
    require_plain(values)
    return values


def require_plain(values: object) -> None:
    """Raises Damaged unless a value is plain.

    Plain are dense tensors on the CPU, numbers, texts and None, and lists, tuples and dicts of plain values.
    """
    import torch

    pending, seen = [values], set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, list | tuple | dict):
            if id(value) not in seen:
                seen.add(id(value))
                pending += value.values() if isinstance(value, dict) else value
        elif isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise Damaged("it holds a tensor without its elements")
        elif not isinstance(value, str | int | float | None):
            raise Damaged("it holds an object that is neither a tensor nor a plain value")


def printable(text: object) -> str:
    """Escapes characters of a foreign text that would move a terminal's cursor or change its colours."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(text))
