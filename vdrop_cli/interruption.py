"""Signals that ask a run to stop set a flag, at which its loops look after every step; then it saves what it
has, and stops.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):
    """A run was asked to stop, has saved what it has, and does; its text says how far it came. Exit code 128
    + signal.
    """

    def __init__(self, number: signal.Signals, told: str = "") -> None:
        super().__init__(number, told)  # all arguments, so that it can be pickled
        self.number, self.told = number, told

    @property
    def exit_code(self) -> int:
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {self.number.name}{f', {self.told}' if self.told else ''}"


received: list[
    signal.Signals
] = []  # each once; a process that was asked to stop begins nothing new, but for one of a pool
interrupted = False  # by Ctrl-C
listens = False
stop_file: Path | None = None  # of a pool of processes: where it lies, they are asked to stop
pool_parent: int | None = None  # of a pool of processes: the one whose pool it is
saves = False  # whether a process of a pool is at a job that saves what it has when it is asked to stop


def note(number: int, frame: FrameType | None) -> None:
    global interrupted
    if interrupted and number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    if not received:
        with suppress(OSError):
            os.write(
                2,
                b"\nvdrop: stopping after this step; Ctrl-C again stops at once, and loses what is not "
                b"saved\n",
            )
    if number not in received:
        received.append(signal.Signals(number))
    interrupted = interrupted or number == signal.SIGINT


def join_pool(stop: Path, parent: int, job_saves: bool) -> None:
    """For a process of a pool, at the start of each of its jobs. No signal is to kill it, as the whole pool
    would die with it: it listens from now on, and looks whether the file `stop` is there. A signal to this
    process alone stopped the job it was at.

    It ends soon after the process `parent`, in whose pool it is, however that has ended: after it has stopped
    and saved, where the job does that.
    """
    global listens, stop_file, interrupted, pool_parent, saves
    listens, stop_file, interrupted, saves = True, stop, False, job_saves
    received.clear()
    hear(note)
    if pool_parent is None:
        threading.Thread(target=end_with_parent, daemon=True).start()
    pool_parent = parent


def leave_job() -> None:
    """For a process of a pool, at the end of each of its jobs."""
    global saves
    saves = False


PARENT_SECONDS = 0.5  # between two looks whether the parent is there


def end_with_parent() -> None:
    """A process of a pool waits for the next job where its parent was killed; so it looks for itself, in a
    thread of its own.
    """
    while not is_orphan() or saves:
        time.sleep(PARENT_SECONDS)
    os._exit(128 + signal.SIGTERM)


def is_orphan() -> bool:
    """Whether this is a process of a pool whose parent has ended."""
    return pool_parent is not None and os.getppid() != pool_parent


def hear(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in SIGNALS:
        if (
            signal.getsignal(number) is not signal.SIG_IGN
        ):  # as in the background of a script, which Ctrl-C is not for
            signal.signal(number, handler)


def asked() -> bool:
    if not received and stop_file is not None and (is_orphan() or stop_file.exists()):
        received.append(signal.SIGTERM)
    return bool(received)


def check() -> None:
    """Raises Interrupted where this process was asked to stop."""
    if asked():
        raise Interrupted(received[0])


@contextmanager
def listening(then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """While it lasts, signals only set the flag, and do `then`; a second Ctrl-C ends the process at once.

    Who listened to a signal before, as SLURM's submitit does to requeue its job, is told when the run has
    saved and stopped; the process then ends, as nothing is to come after.
    """
    global listens
    if listens or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        note(number, frame)
        then()

    before = {number: signal.getsignal(number) for number in SIGNALS}
    listens = True
    hear(handler)
    try:
        yield
    except Interrupted as stop:
        told = [(number, before[number]) for number in received]
        asking = [
            (number, who) for number, who in told if callable(who) and who is not signal.default_int_handler
        ]
        if not asking:
            raise
        for number, listener in asking:
            listener(number, None)
        sys.exit(stop.exit_code)
    finally:
        listens = False
        for number, theirs in before.items():
            signal.signal(number, theirs if theirs is not None else signal.SIG_DFL)
