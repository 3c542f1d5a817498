"""Sweeps: the outcome of each job, with the launchers installed here; the one through SLURM is in
test_slurm.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import TINY, Vdrop, composed, settings
from tests.processes import ForkServer, environment
from tests.test_ownership import in_seconds
from tests.test_survival import training_result
from vdrop_cli import interruption, outcomes, runs, sweeps
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError
from vdrop_cli.outcomes import Outcome
from vdrop_cli.settings.train import Train
from vdrop_cli.sinks import read_log
from vdrop_cli.sweeps import Job, starts_over, summary

JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
SWEEP = [*TINY, "model.hidden_size=16", "schedule.epochs=1", "log_every=1", "seed=1,2,3"]


def test_what_is_done_is_skipped_and_a_failure_is_reported_with_its_reason(
    vdrop: Vdrop, text: list[str], tmp_path: Path
) -> None:
    first = vdrop("train", "-m", *TINY, *text, "seed=1,2")
    assert (first.returncode, first.stderr.splitlines()[-1]) == (0, "vdrop: 2 runs: 2 done")
    again = vdrop("train", "-m", *TINY, *text, "seed=1,2,3", "schedule.lr=1,0")
    assert again.returncode == 2
    last = again.stderr.splitlines()[-5:]
    assert last[0] == "vdrop: 6 runs: 1 done, 2 skipped, 3 failed"
    for line, seed in zip(last[1:4], (1, 2, 3), strict=True):
        assert line.startswith(f"  failed: seed={seed} schedule.lr=0: schedule.lr must be above 0")
    assert last[4] == "  the same command again skips what is done and continues with the rest"
    newest = max((tmp_path / "outputs" / "sweeps").iterdir())
    ended = outcomes.read_all(newest)
    assert [o.status for o in ended] == ["skipped", "failed", "skipped", "failed", "done", "failed"]
    assert [o.code for o in ended] == [0, 2, 0, 2, 0, 2]
    folders = [outcomes.run_folder(newest, o) for o in ended if o.folder]
    assert [folder.name[-3:] for folder in folders] == ["-s1", "-s2", "-s3"]
    assert all((folder / "result.json").exists() for folder in folders)
    headings = [line for line in again.stderr.splitlines() if line.startswith("[")]
    assert headings[:2] == ["[1/6] seed=1 schedule.lr=1", "[2/6] seed=1 schedule.lr=0"] and len(headings) == 6
    table = again.stdout.split("\n\n")[-1].splitlines()
    assert table[0].split() == ["seeds", "train_ppl", "valid_ppl", "test_ppl"]
    assert table[1].startswith("1. schedule.lr=1  ") and table[1].count("±") == 3
    assert re.fullmatch(r"schedule\.lr=0 +0 of 3 \(3 failed\) +– +– +–", table[2])


def test_a_run_that_is_asked_for_in_two_ways_counts_once(vdrop: Vdrop, text: list[str]) -> None:
    ran = vdrop("train", "-m", *TINY, *text, "seed=1,2", "schedule.lr=1,1.0")
    assert ran.stderr.splitlines()[-1] == "vdrop: 4 runs: 2 done, 2 skipped", ran.stderr
    _, *rows = ran.stdout.split("\n\n")[-1].splitlines()
    assert len(rows) == 1 and re.match(r"1\. schedule\.lr=1 +2 ", rows[0]), rows


def test_a_sweep_in_parallel_comes_to_what_one_after_the_other_does(
    vdrop: Vdrop, text: list[str], tmp_path: Path
) -> None:
    """Runs that are finished already are skipped, and failures are counted."""
    assert vdrop("train", "-m", *SWEEP, *text, "outputs=one").returncode == 0
    assert vdrop("train", *SWEEP[:-1], *text, "outputs=many", "seed=3").returncode == 0
    ran = vdrop("train", "-m", *SWEEP, *text, *JOBLIB, "schedule.lr=1,-1", "outputs=many")
    assert ran.returncode == 2 and "vdrop: 6 runs: 2 done, 1 skipped, 3 failed" in ran.stderr, ran.stderr
    marked = {path.parent.name[-2:] for path in tmp_path.rglob("shared_device.txt")}
    assert marked == {"s1", "s2"}, "the two that ran side by side"
    for seed in (1, 2, 3):
        folders = [next((tmp_path / name / "train").rglob(f"*-s{seed}")) for name in ("one", "many")]
        assert training_result(folders[0])[:3] == training_result(folders[1])[:3]


def steps(log: Path) -> int:
    return sum(record["kind"] == "step" for record in read_log(log))


def test_a_stopped_parallel_sweep_saves_and_resumes(
    vdrop: Vdrop, fork_server: ForkServer, text: list[str], tmp_path: Path
) -> None:
    """SIGTERM to the process that was started reaches those that it started; any launcher resumes them."""
    long = [*SWEEP, *text, "schedule.epochs=20"]
    with fork_server.spawn(tmp_path, "train", "-m", *long, *JOBLIB) as sweep:
        until = time.monotonic() + 120
        while (
            sum(steps(log) > 5 for log in tmp_path.rglob("log.jsonl")) < 2
            and time.monotonic() < until
            and sweep.poll() is None
        ):
            time.sleep(0.1)
        sweep.send_signal(signal.SIGTERM)
        assert sweep.stderr is not None
        stderr = sweep.stderr.read()
    assert sweep.returncode == 128 + signal.SIGTERM and "vdrop: 3 runs: 3 interrupted" in stderr, stderr
    assert stderr.count("resume with: vdrop train") == 4, "two runs, each when it stopped and in the summary"
    before = {log: steps(log) for log in tmp_path.rglob("log.jsonl")}
    assert len(before) == 2
    ran = vdrop("train", "-m", *long)
    assert ran.returncode == 0 and "vdrop: 3 runs: 1 done, 2 resumed" in ran.stderr, ran.stderr
    for log, count in before.items():
        starts = [record["step"] for record in read_log(log) if record["kind"] == "start"]
        assert starts == [0, count], "nothing that was done was lost"


def test_the_second_of_two_processes_in_one_run_is_refused(
    vdrop: Vdrop, fork_server: ForkServer, text: list[str], tmp_path: Path
) -> None:
    long = [*TINY, *text, "schedule.epochs=10000"]
    with fork_server.start(tmp_path, "train", *long) as first:
        try:
            while not list(tmp_path.rglob("log.jsonl")) and first.poll() is None:
                time.sleep(0.05)
            second = vdrop("train", *long)
            assert second.returncode == 2 and f"is in use by process {first.pid} on " in second.stderr
            assert len(second.stderr.splitlines()) == 1
            forced = vdrop("train", *long, "force=true")
            assert forced.returncode == 2 and list(tmp_path.rglob("log.jsonl")), (
                "nor is it started over under the first one's feet"
            )
        finally:
            first.terminate()


def test_the_summary_names_what_differs() -> None:
    ended = [
        Outcome(["a=1", "seed=1"], "done"),
        Outcome(["a=1", "seed=2"], "resumed"),
        Outcome(["a=1", "seed=3"], "failed", 1, "the loss is nan"),
        Outcome(["a=1", "seed=4"], "not begun", 1, "the sweep was stopped"),
    ]
    assert summary(ended, skips=True).splitlines()[1:4] == [
        "vdrop: 4 runs: 1 done, 1 resumed, 1 failed, 1 not begun",
        "  failed: seed=3: the loss is nan",
        "  not begun: seed=4: the sweep was stopped",
    ]


@pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="importing torch.distributed writes a temporary file there"
)
def test_an_outcome_that_cannot_be_written_is_reported_and_the_run_is_made(
    text: list[str], tmp_path: Path
) -> None:
    """A process that may write no files of more than 200 bytes, which all outcomes have."""
    command = [
        sys.executable,
        "-m",
        "vdrop_cli",
        "train",
        "-m",
        *TINY,
        *text,
        "seed=1,2",
        "hydra.sweep.dir=sweep",
    ]
    (tmp_path / "sweep").mkdir()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))

    (tmp_path / "sweep" / "multirun.yaml").symlink_to("/dev/null")  # Hydra's own
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=limit
    )
    assert ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    assert (
        "sweep/0.json cannot be written (File too large)" in ran.stderr
        and "config.yaml cannot be written" in ran.stderr
    )
    assert "sweep/summary.json cannot be written" in ran.stderr and "vdrop: 2 runs: 2 " in ran.stderr


def test_outcomes_of_an_earlier_sweep_in_the_same_folder_are_not_taken_for_its_own(
    vdrop: Vdrop, text: list[str]
) -> None:
    for _ in range(2):
        ran = vdrop("train", "-m", *TINY, *text, "seed=1,2", "hydra.sweep.dir=sweep", "force=true")
        assert ran.returncode == 0 and "vdrop: 2 runs: 2 done" in ran.stderr


def test_what_lies_in_a_folder_that_was_there_is_left_alone(
    vdrop: Vdrop, text: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.json").write_text("{}")
    for override, code in (("seed=1,x", 2), ("model=nope", 2), ("seed=1,2", 0)):
        assert vdrop("train", "-m", *TINY, *text, "hydra.sweep.dir=.", override).returncode == code
        assert (tmp_path / "mine.json").read_text() == "{}"
    assert (
        vdrop("train", "-m", "hydra.sweep.dir=new", "model=nope").returncode == 2
        and not (tmp_path / "new").exists()
    )
    outcomes = {path: path.read_text() for path in tmp_path.glob("[01].json")}
    ran = vdrop("train", "-m", *TINY, *text, "hydra.sweep.dir=.", "experiment=glob(typo*)")
    assert ran.returncode == 2 and "there is nothing to run" in ran.stderr
    assert len(outcomes) == 2 and {path: path.read_text() for path in outcomes} == outcomes
    ran = vdrop("train", "-m", *TINY, *text, "seed=1,2", "outputs=")
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
    assert "outputs must be a folder; . is the current one, got nothing" in ran.stderr


THEIRS = {
    "7.json": '{"mine": 1}',
    "2026.json": "[]",
    "0.json": "not json",
    "3.json": "",
    "5.json": json.dumps(vars(Outcome([], "done")) | {"code": True}),
    "1.json": json.dumps(vars(Outcome([], "done")) | {"mine": 1}),
    "summary.json": '[{"mine": 1}]',
    "stop": "mine",
    # of another application
    "multirun.yaml": "hydra:\n  job:\n    name: mine\n  help:\n    app_name: mine\n",
}


def sweeper(
    folder: Path, overrides: object = None, launcher: str = "BasicLauncher", sweep: object = None
) -> sweeps.Sweeper:
    """A sweeper of one job around a replacement of Hydra's."""
    made = sweeps.Sweeper(None)
    made.basic = SimpleNamespace(overrides=overrides, sweep=sweep)  # type: ignore[assignment]
    made.job = Job("train", folder=folder)
    made.folder = folder
    made.launcher_name = launcher
    made.jobs = [["seed=1"]]
    made.read_jobs = lambda arguments: None  # type: ignore[method-assign]
    return made


def test_the_summary_of_an_earlier_sweep_is_not_that_of_a_running_one(tmp_path: Path) -> None:
    outcomes.write([Outcome(["seed=9"], "done")], tmp_path / outcomes.SUMMARY)

    def sweep(arguments: list[str]) -> None:
        outcomes.write(Outcome(["seed=1"]), outcomes.path_of(tmp_path, 0))
        assert outcomes.read_all(tmp_path) == [Outcome(["seed=1"])]

    with pytest.raises(SystemExit):  # of a job that has not ended
        sweeper(tmp_path, sweep=sweep).sweep([])


def sweep_into(folder: Path) -> None:
    def sweep(arguments: list[str]) -> None:
        raise AssertionError("it has begun")

    sweeper(folder, sweep=sweep).sweep([])


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_with_a_file_that_no_sweep_has_written_is_refused_before_anything_starts(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "4.json").write_text(json.dumps(vars(Outcome(["seed=1"], "done"))))
    (tmp_path / name).write_text(THEIRS[name])
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(
        ConfigError, match=rf"/{name} was not written by vdrop, .*; choose another hydra\.sweep\.dir"
    ):
        sweep_into(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_with_something_else_than_a_file_is_refused_and_nothing_hangs(
    name: str, tmp_path: Path
) -> None:
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / name)
        with (
            in_seconds(20),
            pytest.raises(ConfigError, match=rf"/{name} would be overwritten, and it is .*; choose another"),
        ):
            sweep_into(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).rmdir() if make is os.mkdir else (tmp_path / name).unlink()


def test_the_command_line_refuses_the_folder_in_one_line(
    vdrop: Vdrop, text: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "2026.json").write_text("{}")
    ran = vdrop("train", "-m", *TINY, *text, "seed=1,2", "hydra.sweep.dir=mine")
    assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1 and "hydra.sweep.dir" in ran.stderr
    assert os.listdir(tmp_path) == ["mine"] and os.listdir(tmp_path / "mine") == ["2026.json"]


def test_a_sweep_that_cannot_begin_removes_only_the_folders_that_it_has_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = tmp_path / "empty" / "a" / "b"

    def sweep(arguments: list[str]) -> None:
        folder.mkdir(parents=True)
        (folder / "multirun.yaml").touch()
        if with_file:
            (folder / "notes.txt").touch()
        raise ConfigError("no such choice")

    for with_file in (False, True):
        with pytest.raises(ConfigError, match="no such choice"):
            sweeper(folder, sweep=sweep).sweep([])
        assert (tmp_path / "empty").is_dir() and (
            folder / "notes.txt"
        ).exists() == folder.parent.exists() == with_file


@pytest.mark.parametrize(
    ("override", "does"),
    [("force=true", True), ("++force=1", True), ("+force=x", True), ("enforce=1", False)],
)
def test_what_starts_over_is_not_to_be_given_again(override: str, does: bool) -> None:
    assert starts_over(override) == does
    text = summary([Outcome([override], "done"), Outcome([override], "failed", 1, "why")], skips=True)
    assert ("again without force=… skips" in text) == does


def test_evaluations_are_made_again(vdrop: Vdrop, text: list[str], tmp_path: Path) -> None:
    assert vdrop("train", *TINY, *text).returncode == 0
    (folder,) = (path.parent for path in tmp_path.rglob("result.json"))
    ran = vdrop("eval", "-m", f"checkpoint={folder}", "stored_data=true", "device=cpu", "mc_samples=0,-1")
    assert (
        ran.returncode == 2
        and ran.stderr.splitlines()[-1] == "  the same command again continues with the rest"
    )


def test_a_signal_to_a_sweep_that_waits_for_slurm_is_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interruption, "received", [])
    outcomes.write(Outcome(["seed=1"]), outcomes.path_of(tmp_path, 0))

    def sweep(arguments: list[str]) -> None:
        outcomes.write(Outcome(["seed=1"]), outcomes.path_of(tmp_path, 0))
        signal.raise_signal(signal.SIGTERM)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    earlier = [signal.getsignal(number) for number in numbers]
    try:
        with pytest.raises(SystemExit) as stop:
            sweeper(tmp_path, launcher="x.SlurmLauncher", sweep=sweep).sweep([])
    finally:
        for number, handler in zip(numbers, earlier, strict=True):
            signal.signal(number, handler)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "it is no longer waited for, and continues where it runs" in capsys.readouterr().err


def summarise_one(launcher: str, folder: Path, outcome: Outcome) -> int:
    folder.mkdir(exist_ok=True)
    outcomes.write(outcome, outcomes.path_of(folder, 0))
    return sweeper(folder, launcher=launcher).summarise("", [])


def test_why_a_single_run_failed_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here it is printed when it happens, unless its process is killed; on a cluster it is not."""
    failed, killed = Outcome(["seed=1"], "failed", 1, "the loss is nan"), Outcome(["seed=1"])
    assert summarise_one("BasicLauncher", tmp_path, failed) == 1 and not capsys.readouterr().err
    assert summarise_one("BasicLauncher", tmp_path, killed) == 1
    lost = "vdrop: 1 run: 1 lost\n  lost: seed=1: its process was killed; resume with: vdrop train seed=1\n"
    assert lost in capsys.readouterr().err
    assert (
        summarise_one(
            "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", tmp_path, failed
        )
        == 1
    )
    assert "vdrop: 1 run: 1 failed\n  failed: seed=1: the loss is nan\n" in capsys.readouterr().err


def test_the_summary_is_on_disk_before_the_results_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ImportError("the code was changed meanwhile")

    monkeypatch.setattr(sweeps.Sweeper, "print_results", fail, raising=True)
    with pytest.raises(ImportError, match="changed meanwhile"):
        summarise_one("submitit", tmp_path, Outcome(["seed=1"], "done"))
    (one,) = json.loads((tmp_path / outcomes.SUMMARY).read_text())
    assert one["status"] == "done"


def test_runs_of_one_name_that_differ_in_text_or_precision_are_no_seeds_of_each_other(
    text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of a text may change during a sweep, and the nodes of a cluster may differ."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep").mkdir()
    shutil.copy(text[1].partition("=")[2], tmp_path / "train.txt")
    own = [*text[:1], "data.train=train.txt", *text[2:]]
    ended = []
    for seed, precision in ((1, "fp32"), (2, "bf16"), (3, "fp32"), (4, "fp32")):
        if seed == 4:
            with (tmp_path / "train.txt").open("a") as file:
                file.write("w1 w2\n")
        folders = list[Path]()
        train.run(
            settings(*TINY, *own, f"seed={seed}", f"precision={precision}"), report_folder=folders.append
        )
        folder = os.path.relpath(folders[0], tmp_path / "sweep")
        ended.append(Outcome([f"seed={seed}"], "done", folder=folder))
    capsys.readouterr()
    sweeper(tmp_path / "sweep").print_results([*ended, Outcome(["seed=5"], "failed", 1)])
    rows = capsys.readouterr().out.strip().splitlines()[1:]
    counts = sorted(re.split(r" {2,}", re.sub(r"^\d\. ", "", row))[:2] for row in rows)
    corpora = [run.corpus[:8] for run in map(runs.read, sorted(Path("outputs").rglob("*-s[14]")))]
    first, changed = (
        next(run.corpus[:8] for run in runs.below(Path("outputs")) if run.train.seed == seed)
        for seed in (1, 4)
    )
    assert first != changed and set(corpora) == {first, changed}
    assert counts == sorted(
        [
            [f"text lstm_small variational (fp32, text {first})", "2 of 3 (1 failed)"],
            [f"text lstm_small variational (bf16, text {first})", "1"],
            [f"text lstm_small variational (fp32, text {changed})", "1"],
        ]
    )


def test_a_value_that_cannot_be_swept_is_refused_beside_a_folder_of_submitit(
    vdrop: Vdrop, tmp_path: Path
) -> None:
    (tmp_path / "sweep" / ".submitit").mkdir(parents=True)
    ran = vdrop(
        "train", "-m", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep", "schedule.lr=interval(0,1)"
    )
    assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1 and "interval" in ran.stderr.lower(), (
        ran.stderr
    )


def test_jobs_that_continue_on_a_cluster_are_not_to_be_started_twice() -> None:
    text = summary([Outcome(["seed=1"], "not begun", 1, sweeps.CONTINUES)], skips=True)
    assert "scancel" in text and "continues with the rest" not in text


def test_force_has_its_effect_once_in_a_sweep(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is requeued before its folder is cleared starts over, after that it resumes; it never
    continues a shorter run.
    """
    forced, clears = list[tuple[bool, bool]](), iter([False, True, True])

    def run(
        settings: Train, report_started_over: Callable[[], None], continues_shorter: bool, **_: object
    ) -> str:
        forced.append((settings.force, continues_shorter))
        if next(clears):
            report_started_over()
        raise SystemExit(1)  # as by a signal

    monkeypatch.setattr(train, "run", run)
    for _ in range(3):
        with pytest.raises(SystemExit):
            Job("train").perform(composed(*TINY, *text, "force=true"), tmp_path / "0.json")
    assert forced == [(True, False), (True, False), (False, False)]


def test_what_goes_wrong_when_a_run_has_stopped_and_saved_leaves_it_interrupted(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As who requeues jobs may not want to any more."""

    def run(settings: Train, **_: object) -> str:
        signal.raise_signal(signal.SIGUSR2)
        raise interruption.Interrupted(signal.SIGUSR2, "saved")

    def refuses(number: int, frame: object) -> None:
        raise RuntimeError("not requeued")

    monkeypatch.setattr(train, "run", run)
    before = signal.signal(signal.SIGUSR2, refuses)
    try:
        Job("train").perform(composed(*TINY, *text), tmp_path / "0.json")
    finally:
        signal.signal(signal.SIGUSR2, before)
    outcome = outcomes.read(tmp_path / "0.json")
    assert (outcome.status, outcome.code) == ("interrupted", 128 + signal.SIGUSR2)
    assert outcome.reason.startswith("stopped by SIGUSR2, saved; resume with: vdrop train")
    assert (
        outcome.reason.endswith("(RuntimeError: not requeued)") and "Traceback" not in capsys.readouterr().err
    )


def test_a_command_to_resume_names_the_config_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "config_folder_options", lambda: ["--config-dir=my conf"])
    resumed = sweeps.resume_command("train", ["experiment=short", "force=true"])
    assert resumed == "vdrop train '--config-dir=my conf' experiment=short"


SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


@pytest.mark.parametrize(
    ("command", "launcher", "given", "expected"),
    [
        ("train", SLURM, [], 1000),
        ("eval", SLURM, ["hydra.launcher.timeout_min=5"], 1000),
        ("train", SLURM, ["hydra.launcher.max_num_timeout=3"], 3),
        ("train", SLURM.replace("Slurm", "Local"), [], 3),
        ("bench", SLURM, [], 3),
    ],
)
def test_what_saves_its_state_is_requeued_a_thousand_times_unless_the_number_is_given(
    command: str, launcher: str, given: list[str], expected: int, tmp_path: Path
) -> None:
    values = {
        "sweep": {"dir": str(tmp_path)},
        "launcher": {"_target_": launcher, "max_num_timeout": 3},
        "overrides": {"hydra": given},
    }
    config, sweeper = OmegaConf.create({"hydra": values}), sweeps.Sweeper(None)
    other: Any = SimpleNamespace(setup=lambda **_: None, config_loader=None)  # of Hydra
    sweeper.basic = other
    sweeper.setup(hydra_context=other, task_function=Job(command), config=config)
    assert config.hydra.launcher.max_num_timeout == expected
