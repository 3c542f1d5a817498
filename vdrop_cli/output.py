"""Standard output and error of a command.

Characters outside a terminal's encoding are escaped. Progress that cannot be shown does not end the command.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class RecordingStream:
    """A text stream that records its write error, and also raises it unless `is_lenient` is true."""

    def __init__(self, stream: TextIO, is_lenient: bool) -> None:
        self.stream, self.is_lenient = stream, is_lenient
        self.error: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.record_error(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.record_error(error)

    def record_error(self, error: OSError) -> None:
        self.error = error
        if not self.is_lenient:
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def prepare() -> None:
    """Wraps standard output and error of this process, once.

    A closed descriptor is opened to the null device, so that no other file receives its number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, RecordingStream):
            stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, RecordingStream(stream, is_lenient=name == "stderr"))


def is_stdout_error(error: BaseException) -> bool:
    """Whether an error is the write error of standard output."""
    return isinstance(sys.stdout, RecordingStream) and error is sys.stdout.error


@contextmanager
def stdout_errors_deferred() -> Iterator[None]:
    """Defers a write error of standard output to `finish`.

    It is for output that is also on disk, so that nothing is lost.
    """
    try:
        yield
    except OSError as error:
        if not is_stdout_error(error):
            raise


def is_written(write: Callable[[], object]) -> bool:
    """Calls `write`, for output that is nowhere else, and returns whether standard output received it."""
    with stdout_errors_deferred():
        write()
        sys.stdout.flush()
        return True
    return False


def finish() -> int:
    """Flushes standard output; returns 0, or an exit code where it could not be written.

    Prints the reason, except for a reader that closed the pipe. Afterwards standard output leads to the null
    device.
    """
    stream = sys.stdout
    if not isinstance(stream, RecordingStream):
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
