"""A sweep through a real SLURM, disturbed and not. Opt-in: `make test-slurm`."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import slurm
from tests.conftest import TINY
from tests.processes import spawn
from tests.test_launchers import starts
from tests.test_survival import training_result
from vdrop_cli.sinks import read_log

pytestmark = pytest.mark.slurm

JOBS = 3
SWEEP = [
    *TINY,
    "model.hidden_size=48",
    "dropout=variational_untied",
    "schedule.epochs=150",
    "log_every=1",
    "seed=1,2,3",
]
# with no more than ten minutes submitit takes every SIGUSR2 for the one before the time limit
LAUNCHER = [
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.timeout_min=10",
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    if why := slurm.missing():
        pytest.fail(f"SLURM {why}")
    with slurm.Cluster(tmp_path_factory.mktemp("slurm"), cpus=2) as cluster:
        yield cluster


def start(folder: Path, text: list[str], *more: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return spawn(folder, "train", "-m", *SWEEP, *text, *more)


def wait_for_steps(folder: Path, seed: int, steps: int) -> None:
    """Until the run of that seed has made so many."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for log in folder.rglob(f"*-s{seed}/log.jsonl"):
            if sum(record["kind"] == "step" for record in read_log(log)) >= steps:
                return
        time.sleep(0.1)
    raise AssertionError(f"seed {seed} did not come to step {steps}")


def slurm_job(number: int) -> str:
    """The array task that runs the job of that number, of the newest array."""
    ran = subprocess.run(
        ["squeue", "--array", "--noheader", "--states=all", "--format=%F_%K"],
        capture_output=True,
        text=True,
        check=True,
    )
    return max(
        (job for job in ran.stdout.split() if job.endswith(f"_{number}")),
        key=lambda job: int(job.split("_")[0]),
    )


def ended(sweep: subprocess.Popen[str]) -> str:
    """What it said, once it has ended well."""
    _, stderr = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, stderr
    return stderr


def test_a_sweep_of_which_jobs_are_requeued_and_preempted_comes_to_the_same(
    cluster: slurm.Cluster, text: list[str], tmp_path: Path
) -> None:
    stderr = ended(start(tmp_path / "undisturbed", text, *LAUNCHER))
    assert f"vdrop: {JOBS} runs: {JOBS} done" in stderr
    disturbed = tmp_path / "disturbed"
    sweep = start(disturbed, text, *LAUNCHER, "force=true")
    wait_for_steps(disturbed, 1, 500)
    subprocess.run(
        ["scontrol", "requeue", slurm_job(0)], check=True
    )  # as an administrator does: SIGTERM, then SIGKILL
    wait_for_steps(disturbed, 2, 1500)
    # as before the time limit, or a preemption: it is to requeue itself
    subprocess.run(["scancel", "--signal=USR2", slurm_job(1)], check=True)
    stderr = ended(sweep)
    assert f"vdrop: {JOBS} runs: 1 done, 2 resumed" in stderr
    for seed in (1, 2, 3):
        folders = [next((tmp_path / name).rglob(f"*-s{seed}")) for name in ("undisturbed", "disturbed")]
        assert training_result(folders[0]) == training_result(folders[1])
    assert [len(starts(disturbed, seed)) for seed in (1, 2, 3)] == [2, 2, 1]
    assert starts(disturbed, 1)[1] >= 500 and starts(disturbed, 2)[1] >= 1500, (
        "nothing was lost, and force=true counts once"
    )
    assert f"vdrop: {JOBS} runs: {JOBS} skipped" in ended(start(disturbed, text, *LAUNCHER))


def reproduction(text: list[str], epochs: int) -> list[str]:
    """A row of two seeds with MC passes, by a back end that `auto` would not choose."""
    sizes = ["model.hidden_size=8", "task.batch_size=4", "task.bptt=5", "log_every=1"]
    return [
        *("reproduce", "sizes=[small]", "rows=[variational_mc]", "seeds=2", "mc_batch=50", "file=R.md"),
        *("device=cpu", "backend=fused", "precision=fp32"),
        f"launcher={' '.join(['submitit_slurm', *LAUNCHER[1:]])}",
        f"overrides='{' '.join([*sizes, f'schedule.epochs={epochs}', *text])}'",
    ]


def test_a_reproduction_makes_its_runs_and_evaluations_on_the_cluster(
    cluster: slurm.Cluster, text: list[str], tmp_path: Path
) -> None:
    """What is finished is found again."""
    arguments = reproduction(text, epochs=2)
    stderr = ended(spawn(tmp_path, *arguments))
    assert "table1_small_variational_mc seed 2: 0 of 2 epochs are done" in stderr
    assert stderr.count("vdrop: 1 run: 1 done") == 2, "an evaluation for each seed"
    submitted = list((tmp_path / "outputs").rglob(".submitit"))
    assert len(submitted) == 3, "the trainings, and each evaluation"
    evaluations = sorted((tmp_path / "outputs").rglob("eval-0002-mc100-s1.json"))
    assert [path.parent.name[-3:] for path in evaluations] == ["-s1", "-s2"]
    for path in evaluations:
        environment = json.loads(path.read_text())["environment"]
        assert (environment["backend"], environment["precision"]) == ("fused", "fp32")
    again = ended(spawn(tmp_path, *arguments))
    assert again.count(": finished") == 4 and "vdrop train" not in again and "vdrop eval" not in again


def test_a_stopped_reproduction_says_that_its_jobs_continue(
    cluster: slurm.Cluster, text: list[str], tmp_path: Path
) -> None:
    process = spawn(tmp_path, *reproduction(text, epochs=100_000))
    wait_for_steps(tmp_path, 1, 1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "it is no longer waited for, and continues where it runs" in stderr
    assert "wait for these (squeue), or cancel them (scancel)" in stderr
    running = subprocess.run(
        ["squeue", "--noheader", "--states=R"], capture_output=True, text=True, check=True
    )
    assert running.stdout.strip()
    cluster.cancel_jobs()
