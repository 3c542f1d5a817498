"""Standard output and error of a command: no encoding of a terminal is an error, and progress that cannot be
shown ends nothing.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Stream:
    """A text stream that remembers the error with which it could not be written; `is_lenient`, it does not
    raise it.
    """

    def __init__(self, stream: TextIO, is_lenient: bool) -> None:
        self.stream, self.is_lenient = stream, is_lenient
        self.error: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.fail(error)

    def fail(self, error: OSError) -> None:
        self.error = error
        if not self.is_lenient:
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def prepare() -> None:
    """Of this process, once. A closed one is opened to nowhere, so that no file comes to lie in its place."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Stream):
            stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, Stream(stream, is_lenient=name == "stderr"))


def is_lost(error: BaseException) -> bool:
    """Whether it is of standard output, which could not be written."""
    return isinstance(sys.stdout, Stream) and error is sys.stdout.error


@contextmanager
def unshown() -> Iterator[None]:
    """Prints what is on disk, too: that it cannot be shown ends nothing now; `finish` tells at the end."""
    try:
        yield
    except OSError as error:
        if not is_lost(error):
            raise


def is_shown(tell: Callable[[], object]) -> bool:
    """Whether what it prints, and is nowhere else, has been written out."""
    with unshown():
        tell()
        sys.stdout.flush()
        return True
    return False


def finish() -> int:
    """Writes out what is left; returns 0, or an exit code where standard output could not be written, and
    says so unless it is only unread.

    Then nothing more is written to it.
    """
    stream = sys.stdout
    if not isinstance(stream, Stream):
        return 0
    with suppress(OSError):
        stream.flush()
    error, stream.error = stream.error, None
    if error is None:
        return 0
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    if error.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE
    print(f"vdrop: standard output cannot be written ({error.strerror}); write it elsewhere", file=sys.stderr)
    return 1
