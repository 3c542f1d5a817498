"""A lock file for what one process at a time may write.

The library filelock is not used. Up to version 3.24 it truncates the file before it has the lock, which
erases the owner's name, or a user's file of that name. On a file system without locks, it takes the file's
existence for a lock, which a killed process leaves behind. And the checks that the path is a lock file, and
the owner's name, would still be code of this module.
"""

import errno
import os
import socket
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

from vdrop_cli.errors import ConfigError
from vdrop_cli.files import Damaged, file_error, is_in_place, require_regular


class Lock:
    """A file that one process at a time can lock; it names the owner's host and process id for people.

    The system releases the lock when the process ends, however it ends, so the file of a killed process
    blocks nobody. Raises ConfigError if another process has the lock, or if the path is not a lock file.
    """

    OWNER = b"process "  # how its content starts

    def __init__(self, path: Path, subject: str) -> None:
        self.path, self.subject = path, subject

    def __enter__(self) -> Self:
        while True:
            self.handle = self.open()
            if not self.is_own():
                os.close(self.handle)
                raise self.foreign()
            self.acquire()
            if is_in_place(self.path, self.handle):
                break
            os.close(self.handle)  # its owner removed it in between
        with suppress(OSError):  # the name is only for people; the next file reports a full disk
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, self.OWNER + f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a file that stays is not locked, and the work is finished
            self.path.unlink(missing_ok=True)
        os.close(self.handle)

    def open(self) -> int:
        """Opens the file, or creates it; never a device or FIFO, whose opening may wait or act."""
        try:
            with suppress(FileNotFoundError):
                require_regular(os.lstat(self.path))
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except Damaged:
            raise self.foreign() from None
        except OSError as error:
            raise (self.foreign() if error.errno == errno.ELOOP else file_error(self.path, error)) from None

    def is_own(self) -> bool:
        """Returns whether it is a regular file that is empty or names an owner."""
        start = os.pread(self.handle, len(self.OWNER), 0)
        return stat.S_ISREG(os.fstat(self.handle).st_mode) and self.OWNER.startswith(start)

    def foreign(self) -> ConfigError:
        return ConfigError(f"{self.path} is not a lock file of vdrop; move it away")

    def acquire(self) -> None:
        import fcntl  # not on Windows, where model cards import `vdrop_cli.corpora`, which imports this file

        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self.handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(self.handle)
            raise ConfigError(
                f"{self.subject} is in use by {owner}; wait for it, or stop it and repeat the command"
            ) from None
        except OSError as error:  # a file system without locks
            print(
                f"vdrop: {self.path} cannot be locked ({error.strerror}); make sure that no other process "
                "works there",
                file=sys.stderr,
            )


def is_locked(path: Path) -> bool:
    """Whether a process has the lock; a file that a killed process left is not locked."""
    import fcntl  # as in `Lock.acquire`

    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False
