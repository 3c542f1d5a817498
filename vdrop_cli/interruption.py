"""Signals that ask a run to stop set a flag.

Loops check the flag after every step. Where it is set, the run saves its state and stops.
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
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOPPING = b"\nvdrop: stopping after this step; Ctrl-C again stops at once and loses what is not saved\n"
PARENT_SECONDS = 0.5  # between two checks whether the parent process is alive


class Interrupted(Exception):
    """A run was asked to stop and has saved its state. Its exit code is 128 + signal."""

    def __init__(self, number: signal.Signals, progress: str = "") -> None:
        super().__init__(number, progress)  # all arguments, because pickle calls the class with them
        self.number, self.progress = number, progress

    @property
    def exit_code(self) -> int:
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {self.number.name}{f', {self.progress}' if self.progress else ''}"


# The signals received so far, each once. A process that was asked to stop starts no further work; a process
# of a pool forgets the signals before its next job.
received: list[signal.Signals] = []
ctrl_c_received = False
is_listening = False
stop_file: Path | None = None  # in a process of a pool: a file whose existence asks all of them to stop
pool_parent: int | None = None  # in a process of a pool: the process that owns the pool
job_saves = False  # in a process of a pool: whether its present job saves its state when it is asked to stop


def on_signal(number: int, frame: FrameType | None) -> None:
    global ctrl_c_received
    if ctrl_c_received and number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    if not received:
        with suppress(OSError):
            os.write(2, STOPPING)
    if number not in received:
        received.append(signal.Signals(number))
    ctrl_c_received = ctrl_c_received or number == signal.SIGINT


def enter_pool_job(stop: Path, parent: int, saves: bool) -> None:
    """Prepares a process of a pool for its next job.

    A signal must not kill the process, because the whole pool would end with it. The process handles signals
    from now on and checks whether the file `stop` exists. A signal to this process alone stops only its
    present job. After the process `parent` has ended, however it ended, this process ends soon; a job with
    `saves` stops and saves first.
    """
    global is_listening, stop_file, ctrl_c_received, pool_parent, job_saves
    is_listening, ctrl_c_received = True, False
    stop_file, job_saves = stop, saves
    received.clear()
    install_handlers(on_signal)
    if pool_parent is None:
        threading.Thread(target=end_with_parent, daemon=True).start()
    pool_parent = parent


def leave_pool_job() -> None:
    """Ends what `enter_pool_job` began."""
    global job_saves
    job_saves = False


def end_with_parent() -> None:
    """Ends this process of a pool once its parent has ended, since no further job would come.

    A job that saves its state stops and saves first.
    """
    while not is_orphan() or job_saves:
        time.sleep(PARENT_SECONDS)
    os._exit(128 + signal.SIGTERM)


def is_orphan() -> bool:
    """Whether this is a process of a pool whose parent has ended."""
    return pool_parent is not None and os.getppid() != pool_parent


def install_handlers(handler: Callable[[int, FrameType | None], None]) -> None:
    """Installs `handler` for all signals that are not ignored; background jobs of scripts ignore Ctrl-C."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    if not received and stop_file is not None and (is_orphan() or stop_file.exists()):
        received.append(signal.SIGTERM)
    return bool(received)


def check() -> None:
    """Raises Interrupted if this process was asked to stop."""
    if stop_requested():
        raise Interrupted(received[0])


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Within the context, the first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt; later ones do
    nothing.

    The first signal is added to `received`. The context is for a process that only waits for its jobs: it can
    report their states before it ends.
    """
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    present = {number: signal.getsignal(number) for number in handled}
    earlier = {number: one for number, one in present.items() if one is not signal.SIG_IGN}

    def handler(number: int, frame: FrameType | None) -> None:
        for one in earlier:
            signal.signal(one, signal.SIG_IGN)
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    for number in earlier:
        signal.signal(number, handler)
    try:
        yield
    finally:
        if all(signal.getsignal(number) is handler for number in earlier):  # no signal came
            restore_handlers(earlier)


def restore_handlers(earlier: dict[signal.Signals, Any]) -> None:
    for number, previous in earlier.items():
        signal.signal(number, previous if previous is not None else signal.SIG_DFL)


@contextmanager
def listening(also: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within the context, a signal sets the flag and calls `also`; a second Ctrl-C ends the process at once.

    Earlier handlers, such as submitit's, which requeues a SLURM job, are called after the run has saved its
    state and stopped. The process then ends.
    """
    global is_listening
    if is_listening or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        on_signal(number, frame)
        also()

    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    is_listening = True
    install_handlers(handler)
    try:
        yield
    except Interrupted as stop:
        handlers = [(number, earlier[number]) for number in received]
        own = [(number, one) for number, one in handlers if one is not signal.default_int_handler]
        called = [(number, one) for number, one in own if callable(one)]
        if not called:
            raise
        for number, one in called:
            one(number, None)
        sys.exit(stop.exit_code)
    finally:
        is_listening = False
        restore_handlers(earlier)
