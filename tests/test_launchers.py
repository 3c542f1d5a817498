"""Sweeps whose processes are killed or preempted, with the launchers that run several processes."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.processes import Forked, ForkServer, is_alive
from vdrop_cli import checkpoint
from vdrop_cli.sinks import read_log

SWEEP = [*TINY, "model.hidden_size=16", "log_every=1", "schedule.epochs=14", "force=true"]
JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
LOCAL = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=60"]


Start = Callable[..., Forked]


@pytest.fixture
def start(fork_server: ForkServer, tmp_path: Path) -> Start:
    """Starts a sweep in an empty folder."""
    return lambda *arguments: fork_server.spawn(tmp_path, "train", "-m", *SWEEP, *arguments)


def wait_for_steps(sweep: Forked, folder: Path, steps: int, *seeds: int) -> list[int]:
    """Until the runs of those seeds have made so many; the processes that run them."""
    pids = dict[int, int]()
    until = time.monotonic() + 120
    while len(pids) < len(seeds):
        assert sweep.poll() is None and time.monotonic() < until, sweep.stderr and sweep.stderr.read()
        for seed in seeds:
            for run in folder.rglob(f"*-s{seed}"):
                if len(read_log(run / "log.jsonl")) > steps and (run / "lock").exists():
                    pids[seed] = int((run / "lock").read_text().split()[1])
        time.sleep(0.05)
    return [pids[seed] for seed in seeds]


def starts(folder: Path, seed: int) -> list[int]:
    (log,) = folder.rglob(f"*-s{seed}/log.jsonl")
    return [record["step"] for record in read_log(log) if record["kind"] == "start"]


def ended(sweep: Forked) -> str:
    return sweep.communicate(timeout=240)[1]


@pytest.mark.parametrize("launcher", [[], pytest.param(JOBLIB, marks=pytest.mark.long)])
def test_a_killed_process_of_a_pool_ends_the_sweep_which_names_what_is_lost_and_resumes(
    launcher: list[str], start: Start, text: list[str], tmp_path: Path
) -> None:
    """The kernel kills a process when memory is short; joblib then kills the whole pool."""
    arguments = (*text, "checkpoint.minutes=0.005", "seed=1,2,3")
    sweep = start(*arguments, *JOBLIB)
    (pid, _) = wait_for_steps(sweep, tmp_path, 100, 1, 2)
    os.kill(pid, signal.SIGKILL)
    stderr = ended(sweep)
    assert sweep.returncode == 1 and "vdrop: 3 runs: 2 lost, 1 not begun" in stderr, stderr
    for seed in (1, 2):
        assert re.search(rf"  lost: seed={seed}: .*; resume with: vdrop train .*seed={seed}\n", stderr)
    before = {seed: len(starts(tmp_path, seed)) for seed in (1, 2)}
    again = start(*arguments, *launcher, "force=false")
    stderr = ended(again)
    assert again.returncode == 0 and "vdrop: 3 runs: 1 done, 2 resumed" in stderr, stderr
    assert before == {1: 1, 2: 1} and [len(starts(tmp_path, seed)) for seed in (1, 2, 3)] == [2, 2, 1]
    assert starts(tmp_path, 1)[1] > 50, "nothing that was saved was lost"


def test_processes_of_a_pool_end_after_a_sweep_that_was_killed_and_save_first(
    start: Start, text: list[str], tmp_path: Path
) -> None:
    """Nothing that they had done is lost, though no checkpoint was due."""
    sweep = start(*text, *JOBLIB, "schedule.epochs=10000", "checkpoint.minutes=inf", "seed=1,2")
    workers = wait_for_steps(sweep, tmp_path, 10, 1, 2)
    sweep.kill()
    until = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))
    for log in tmp_path.rglob("log.jsonl"):
        records = read_log(log)
        saved = checkpoint.load(checkpoint.all_in(log.parent)[0])
        (before,) = [
            record["step"]
            for record in records
            if record["kind"] == "epoch" and record["epoch"] == saved.epoch
        ] or [0]
        assert before + saved.batch == [record["step"] for record in records if record["kind"] == "step"][-1]
        assert not (log.parent / "lock").exists()
    sweep.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_a_pool_that_is_asked_to_stop_exits_with_the_signal_it_was_asked_by(
    number: signal.Signals, start: Start, text: list[str], tmp_path: Path
) -> None:
    """Those of its processes, too, that get the signal themselves, as all do in a terminal."""
    sweep = start(*text, *JOBLIB, "seed=1,2,3")
    workers = wait_for_steps(sweep, tmp_path, 50, 1, 2)
    for pid in (*workers, sweep.pid):
        os.kill(pid, number)
    stderr = ended(sweep)
    assert sweep.returncode == 128 + number and "vdrop: 3 runs: " in stderr, stderr
    assert (
        "3 interrupted" in stderr
        and "force=true" not in stderr.partition("resume with: vdrop train")[2].splitlines()[0]
    )
    assert "the same command again without force=… skips what is done" in stderr


def test_a_lost_local_job_is_reported_and_the_others_are_awaited(
    start: Start, text: list[str], tmp_path: Path
) -> None:
    sweep = start(*text, *LOCAL, "seed=1,2")
    (pid, _) = wait_for_steps(sweep, tmp_path, 50, 1, 2)
    os.kill(pid, signal.SIGKILL)
    stderr = ended(sweep)
    assert sweep.returncode == 1 and "vdrop: 2 runs: 1 done, 1 lost" in stderr, stderr
    assert "  lost: seed=1: its process was lost; see " in stderr


def test_a_preempted_job_is_requeued_though_another_signal_came_first_and_forces_only_once(
    start: Start, text: list[str], tmp_path: Path
) -> None:
    sweep = start(*text, *LOCAL, "seed=1,2")
    (pid, _) = wait_for_steps(sweep, tmp_path, 100, 1, 2)
    os.kill(pid, signal.SIGSTOP)  # so that both are there when it looks
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGUSR2)
    os.kill(pid, signal.SIGCONT)
    stderr = ended(sweep)
    assert sweep.returncode == 0 and "vdrop: 2 runs: 1 done, 1 resumed" in stderr, stderr
    assert len(starts(tmp_path, 1)) == 2 and starts(tmp_path, 1)[1] >= 100
