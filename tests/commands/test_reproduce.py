"""`vdrop reproduce`: a real process that is stopped, goes on, and comes to the table."""

import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.commands.test_table import RATINGS, rows_of
from tests.conftest import TINY, Vdrop, settings
from tests.processes import spawn
from vdrop_cli import experiments
from vdrop_cli.arguments import prepared
from vdrop_cli.commands import reproduce
from vdrop_cli.commands.campaign import require_on_page
from vdrop_cli.commands.reproduce import page_of
from vdrop_cli.commands.table import Evaluated, Line
from vdrop_cli.config import TABLE_1, ConfigError, Figures, Precision, Reproduce, RunError, Size, plain, seconds
from vdrop_cli.runs import Finished
from vdrop_cli.sinks import read_log

ROWS = ["sizes=[small]", "rows=[none,variational,variational_mc]", "seeds=2", "precision=fp32"]


@pytest.fixture
def changes(text: list[str]) -> str:
    changed = [*(change for change in TINY if not change.startswith(("model=", "precision", "device"))), *text, "schedule.epochs=12"]
    return f"overrides='{' '.join(changed)}'"


def test_it_is_stopped_goes_on_and_writes_every_row(changes: str, vdrop: Vdrop, tmp_path: Path) -> None:
    with spawn(tmp_path, "reproduce", *ROWS, changes) as process:
        until = time.monotonic() + 120
        while not list(tmp_path.rglob("checkpoint-*.pt")) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        told = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM, told
    assert re.search(r"table1_small_none seed 1: \d+:\d\d.* \(0 of 12 epochs are done\)", told) and "4 runs: 4 interrupted" in told
    assert not (tmp_path / "outputs" / "RESULTS.md").exists()

    planned = vdrop("reproduce", *ROWS, changes, "plan=true")
    (done,) = re.findall(r"table1_small_none seed 1: .*\(([\d.]+) of 12 epochs are done\)", planned.stderr)
    assert 1 <= float(done) < 12 and planned.returncode == 0

    ran = vdrop("reproduce", *ROWS, changes)
    assert ran.returncode == 0, ran.stderr
    rows = rows_of((tmp_path / "outputs" / "RESULTS.md").read_text())
    assert all("1 2" in rows[name] for name in rows if name not in ("row", "---")) and len(rows) == 2 + 3
    starts = [record["step"] for record in read_log(next(tmp_path.rglob("*-none/*-s1/log.jsonl"))) if record["kind"] == "start"]
    assert len(starts) == 2 and starts[1] > 0, "what was done before the stop was not done again"
    again = vdrop("reproduce", *ROWS, changes)
    assert again.returncode == 0 and again.stderr.count(": finished") == 6 and "vdrop train" not in again.stderr


def test_rows_that_could_not_be_made_are_an_error_and_the_table_says_so(changes: str, vdrop: Vdrop, tmp_path: Path) -> None:
    ran = vdrop("reproduce", "sizes=[small]", "rows=[none,moon]", "precision=fp32", "jobs=2", changes[:-1] + " schedule.lr=1e30'")
    assert "hydra/launcher=joblib hydra.launcher.n_jobs=2" in ran.stderr
    assert ran.returncode == 1 and "2 runs: 2 failed" in ran.stderr, ran.stderr
    assert "is not finished, nor are 1 others; the same command resumes" in ran.stderr.splitlines()[-1]
    assert (tmp_path / "outputs" / "RESULTS.md").read_text().split(RATINGS)[0].count("not yet run") == 4


@pytest.mark.usefixtures("composing")
def test_a_row_or_seed_that_is_finished_and_not_in_the_table_is_an_error() -> None:
    few, ensemble = experiments.rows([Size.small], ["none", "variational_mc"], ""), experiments.rows([Size.large], ["ensemble"], "")

    def line(row: experiments.Row, *seeds: int) -> Line:
        made = [Finished(Path(), plain(replace(row.settings, seed=seed)), [], {}) for seed in seeds]
        return Line(row, [Evaluated(run, None, None, 1.0, None, {}) for run in made])

    require_on_page(reproduce.wanted([*few, *ensemble], 2), reproduce.told([line(row, 1, 2) for row in few]))
    require_on_page(reproduce.wanted(ensemble, 10), reproduce.told([line(ensemble[0], 1)]))
    for rows, lines, message in (
        (few, [line(few[0], 1, 2), line(few[1])], "table1_small_variational_mc seed 1 is finished, but not in the table"),
        (few, [line(few[0], 1), line(few[1], 1, 2)], "table1_small_none seed 2 is finished, but not in the table"),
        (ensemble, [], "table1_large_ensemble seed 1 is finished, but not in the table"),
    ):
        with pytest.raises(RunError, match=message):
            require_on_page(reproduce.wanted(rows, 10 if rows is ensemble else 2), reproduce.told(lines))


@pytest.mark.usefixtures("composing")
def test_nothing_to_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match="sizes and rows leave nothing to run"):
        reproduce.run(Reproduce([Size.sentiment]))
    with pytest.raises(ConfigError, match="sizes must be a list with something in it"):
        Reproduce([])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], Reproduce([Size.medium])),
        (["SIZE=all", "SEEDS=10"], Reproduce([Size.small, Size.medium, Size.large], seeds=10)),
        (
            ["SIZE=small", "ROWS=none,untied_mc", "LAUNCHER=joblib hydra.launcher.n_jobs=4", "PRECISION=bf16"],
            Reproduce([Size.small], ["none", "untied_mc"], launcher="joblib hydra.launcher.n_jobs=4", precision=Precision.bf16),
        ),
        (["JOBS=3", "UNTIL=25min", "MC_BATCH=500"], Reproduce(jobs=3, until="25min", mc_batch=500)),
    ],
)
def test_what_make_is_told_is_what_runs(given: list[str], meant: Reproduce) -> None:
    root = Path(__file__).parents[2]
    outside = {"PATH": os.environ["PATH"]}  # nothing of a make that runs the tests
    command = ["make", "--dry-run", "--no-print-directory", "reproduce-table", *given]
    told = subprocess.run(command, cwd=root, env=outside, capture_output=True, text=True, check=True).stdout
    _, name, *arguments = shlex.split(told[told.index(".venv/bin/vdrop") :].replace("\\\n", " "))
    assert name == "reproduce" and settings(*prepared("reproduce", arguments), command="reproduce") == meant


def test_the_ensemble_takes_ten_seeds_and_is_left_out_of_fewer(vdrop: Vdrop, changes: str) -> None:
    planned = vdrop("reproduce", "sizes=[large]", "rows=[ensemble]", changes, "plan=true")
    assert "table1_large_ensemble is left out: it takes seeds=10" in planned.stderr and planned.returncode == 2


def test_a_page_of_few_rows_has_the_others_too_unless_runs_are_of_other_settings() -> None:
    whole = page_of(Reproduce([Size.small], ["none"], file="a.md"))
    assert (whole.sizes, whole.rows, whole.file) == (list(TABLE_1), None, "a.md")
    own = page_of(Reproduce([Size.small], ["none"], overrides="schedule.epochs=1"))
    assert (own.sizes, own.rows, own.overrides) == ([Size.small], ["none"], "schedule.epochs=1")


@pytest.mark.parametrize("plan", [False, True])
def test_what_cannot_be_written_is_told_before_hours_of_work_and_a_plan_writes_nothing(plan: bool, changes: str, vdrop: Vdrop) -> None:
    ran = vdrop("reproduce", "sizes=[small]", "rows=[none]", "precision=fp32", changes, "file=nowhere/R.md", f"plan={plan}")
    told = "file=nowhere/R.md is in a folder that is not there; make it" in ran.stderr
    assert (ran.returncode, told, "what is needed" in ran.stderr) == ((0, False, True) if plan else (2, True, False))


def test_the_settings_are_those_of_the_command_line() -> None:
    parsed = settings("sizes=[small]", "launcher='joblib hydra.launcher.n_jobs=4'", "precision=bf16", "seeds=3", command="reproduce")
    assert parsed == Reproduce([Size.small], seeds=3, launcher="joblib hydra.launcher.n_jobs=4", precision=Precision.bf16)
    assert settings("mc_batch=200", command="reproduce") == Reproduce(mc_batch=200)
    with pytest.raises(ConfigError, match=r"seeds must be in \[1, 1000\], got 0"):
        Reproduce(seeds=0)
    with pytest.raises(ConfigError, match=r"^mc_batch must be at least 1, or null, got 0"):
        Reproduce(mc_batch=0)


@pytest.mark.usefixtures("composing")
def test_passes_run_together_as_it_was_asked_for(changes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = changes.removeprefix("overrides='")[:-1]
    rows = experiments.rows([Size.small], ["variational_mc"], overrides)
    for mc_batch in (None, 200):
        _, (evaluation,) = reproduce.needed(rows, Reproduce([Size.small], overrides=overrides, mc_batch=mc_batch))
        assert [a for a in evaluation.arguments if a.startswith("mc_batch")] == (["mc_batch=200"] if mc_batch else [])


@pytest.mark.parametrize("kind", [Reproduce, Figures])
def test_times_and_numbers_of_jobs_that_cannot_be_meant_are_refused(kind: type[Reproduce | Figures]) -> None:
    for text, expected in (("90s", 90), ("25min", 1500), ("2h", 7200), ("1h30min", 5400), ("1h1min1s", 3661)):
        assert seconds(text) == expected and kind(until=text).until == text
    for text in ("", "25", "25m", "0min", "1.5h", "-1h", "30min1h", "1h 30min", "٢h", "9999999h"):
        with pytest.raises(ConfigError, match=r"^until must be a time such as 25min, 2h or 1h30min, or null, got "):
            kind(until=text)
    with pytest.raises(ConfigError, match=r"^jobs must be in \[1, 1000\], got 0"):
        kind(jobs=0)
    with pytest.raises(ConfigError, match=r"^jobs must be 1 where launcher is set, which has a number of its own, got 3"):
        kind(jobs=3, launcher="joblib")
