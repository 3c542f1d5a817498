"""Signals that ask a run to stop set a flag, at which its loops look after every step; then it saves what it has, and stops."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):
    """A run was asked to stop, has saved what it has, and does; its text says how far it came. Exit code 128 + signal."""

    def __init__(self, number: signal.Signals, told: str = "") -> None:
        super().__init__(number, told)  # all arguments, so that it can be pickled
        self.number, self.told = number, told

    @property
    def exit_code(self) -> int:
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {self.number.name}{f', {self.told}' if self.told else ''}"


received: signal.Signals | None = None  # a process that was asked to stop begins nothing new
interrupted = False  # by Ctrl-C


def note(number: int, frame: FrameType | None) -> None:
    global received, interrupted
    if interrupted and number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    if received is None:
        os.write(2, b"\nvdrop: stopping after this step; Ctrl-C again stops at once, and loses what is not saved\n")
    received, interrupted = received or signal.Signals(number), interrupted or number == signal.SIGINT


def pass_on(number: int, frame: FrameType | None) -> None:
    note(number, frame)
    for child in multiprocessing.active_children():
        if child.pid is not None:
            os.kill(child.pid, signal.SIGTERM)


def asked() -> bool:
    return received is not None


def check() -> None:
    """Raises Interrupted where this process was asked to stop."""
    if received is not None:
        raise Interrupted(received)


@contextmanager
def listening(handler: Callable[[int, FrameType | None], None] = note) -> Iterator[None]:
    """While it lasts, signals only set the flag; a second Ctrl-C ends the process at once. With `pass_on`, processes that this one
    has started are asked to stop too.

    Who listened to a signal before, as SLURM's submitit does to requeue its job, is told when the run has saved and stopped; the
    process then ends, as nothing is to come after.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if threading.current_thread() is not threading.main_thread() or {note, pass_on} & set(before.values()):
        yield
        return
    for number, theirs in before.items():
        if theirs is not signal.SIG_IGN:  # as in the background of a script, which Ctrl-C is not for
            signal.signal(number, handler)
    try:
        yield
    except Interrupted as stop:
        theirs = before[stop.number]
        if not callable(theirs) or theirs is signal.default_int_handler:
            raise
        print(f"vdrop: {stop}", file=sys.stderr, flush=True)
        theirs(stop.number, None)
        sys.exit(stop.exit_code)
    finally:
        for number, theirs in before.items():
            signal.signal(number, theirs if theirs is not None else signal.SIG_DFL)
