"""Signals, sent to real processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import environment, is_alive
from vdrop_cli import interruption
from vdrop_cli.interruption import Interrupted

LOOP = """
import sys, time
from vdrop_cli import interruption
PREPARE
try:
    with interruption.listening():
        print("ready", flush=True)
        for step in range(10_000):
            time.sleep(STEP)
            interruption.check()
except interruption.Interrupted as stop:
    print(stop, flush=True)
    sys.exit(stop.exit_code)
"""


def start(prepare: str = "", step: float = 0.01) -> "subprocess.Popen[str]":
    code = LOOP.replace("PREPARE", prepare).replace("STEP", str(step))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=stop_ignoring,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def stop_ignoring() -> None:
    """A runner in the background ignores Ctrl-C, and one under nohup ignores SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_a_signal_stops_the_loop_after_its_step(number: signal.Signals) -> None:
    process = start()
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, f"stopped by {number.name}\n")
    assert "stopping after this step; Ctrl-C again stops at once" in said


def test_a_second_ctrl_c_ends_a_step_that_takes_long() -> None:
    process = start(step=60)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT


def test_one_that_comes_twice_is_no_second_ctrl_c() -> None:
    process = start(step=0.5)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM), (
        "whichever came first; it was not killed"
    )


def test_what_is_ignored_stays_so() -> None:
    """As Ctrl-C is in the background of a script."""
    process = start("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


def test_an_earlier_handler_is_called_when_the_run_has_stopped() -> None:
    process = start("import signal; signal.signal(signal.SIGUSR2, lambda *_: print('requeued', flush=True))")
    process.send_signal(signal.SIGUSR2)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + signal.SIGUSR2, "requeued\n")
    assert "stopping after this step" in said


def test_the_earlier_handlers_of_both_signals_are_called() -> None:
    """SLURM sends SIGTERM; the one that requeues may come just after it."""
    process = start(
        "import signal; signal.signal(signal.SIGUSR2, lambda *_: print('requeued', flush=True))", step=0.5
    )
    for number in (signal.SIGTERM, signal.SIGUSR2):
        process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) in (
        (128 + number, "requeued\n") for number in (signal.SIGTERM, signal.SIGUSR2)
    )


BETWEEN_JOBS = """
import os, sys, time
from pathlib import Path
from vdrop_cli import interruption
interruption.enter_pool_job(Path(sys.argv[1]), os.getppid(), True)
print("ready", flush=True)
sys.stdin.readline()
with interruption.listening():
    print(interruption.stop_requested(), flush=True)
interruption.enter_pool_job(Path(sys.argv[1]), os.getppid(), True)
print(interruption.stop_requested(), flush=True)
"""


@pytest.mark.parametrize("how", ["signal", "file", "not"])
def test_a_process_of_a_pool_outlives_signals_and_looks_for_the_file(how: str, tmp_path: Path) -> None:
    """A signal to it alone stops the job that it is at, the file all."""
    command = [sys.executable, "-c", BETWEEN_JOBS, str(tmp_path / "stop")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for number in (signal.SIGTERM, signal.SIGUSR1) if how == "signal" else ():
        process.send_signal(number)
    if how == "file":
        (tmp_path / "stop").touch()
    time.sleep(0.2)
    assert (
        process.communicate("\n", timeout=60)[0] == f"{how != 'not'}\n{how == 'file'}\n"
        and process.returncode == 0
    )


OF_A_POOL = """
import os, sys, time
from pathlib import Path
from vdrop_cli import interruption
parent = os.getpid()
if os.fork() == 0:
    interruption.enter_pool_job(Path("stop"), parent, sys.argv[1] == "saves")
    print(os.getpid(), flush=True)
    if sys.argv[1] == "idle":
        interruption.leave_pool_job()
        time.sleep(60)
    while not interruption.stop_requested():
        time.sleep(0.01)
    print("asked to stop", flush=True)
    time.sleep(2 * interruption.PARENT_SECONDS)
    print("saved", flush=True)
    interruption.leave_pool_job()
time.sleep(60)
"""


@pytest.mark.parametrize("job", ["saves", "does not save", "idle"])
def test_a_process_of_a_pool_ends_after_its_parent_and_saves_before_it_does(job: str) -> None:
    command = [sys.executable, "-c", OF_A_POOL, job]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
        said = parent.stdout.read()  # until the last process that can write there has ended
    until = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(pid)
    assert said == "asked to stop\nsaved\n" if job == "saves" else "saved" not in said


def test_a_process_that_was_asked_to_stop_begins_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    interruption.check()
    monkeypatch.setattr(interruption, "received", [signal.SIGTERM])
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        interruption.check()


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    with interruption.listening():
        during = [signal.getsignal(number) for number in interruption.SIGNALS]
        with interruption.listening():
            assert [signal.getsignal(number) for number in interruption.SIGNALS] == during != before
        assert [signal.getsignal(number) for number in interruption.SIGNALS] == during
    assert [signal.getsignal(number) for number in interruption.SIGNALS] == before


def test_a_process_that_waits_for_others_ends_by_the_first_signal_and_says_all_that_it_has_to() -> None:
    """`vdrop reproduce` asks a sweep to stop by SIGTERM, and the terminal by SIGINT, at once."""
    code = """
import time
from vdrop_cli import interruption
try:
    with interruption.keyboard_interrupts():
        print("ready", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    print("all", flush=True)
"""
    for signals in ([signal.SIGTERM, signal.SIGINT], [signal.SIGINT, signal.SIGTERM]):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment()
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.2)
        out, _ = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "all\n")


def test_handlers_are_restored_where_no_signal_came() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    earlier = [signal.getsignal(number) for number in numbers]
    with interruption.keyboard_interrupts():
        assert [signal.getsignal(number) for number in numbers] != earlier
    assert [signal.getsignal(number) for number in numbers] == earlier
