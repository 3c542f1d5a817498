"""`vdrop reproduce`: a real process that is stopped, goes on, and comes to the table."""

import re
import signal
import time
from pathlib import Path

import pytest

from tests.commands.test_table import RATINGS, rows_of
from tests.conftest import TINY, Vdrop, settings
from tests.processes import spawn
from vdrop_cli.commands.reproduce import page_of
from vdrop_cli.config import TABLE_1, ConfigError, Precision, Reproduce, Size
from vdrop_cli.sinks import read_log

ROWS = ["sizes=[small]", "rows=[none,variational,variational_mc]", "seeds=2", "precision=fp32"]


@pytest.fixture
def changes(text: list[str]) -> str:
    changed = [*(change for change in TINY if not change.startswith(("model=", "precision", "device"))), *text, "schedule.epochs=20"]
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
    assert re.search(r"table1_small_none seed 1: \d+:\d\d.* \(0 of 20 epochs are done\)", told) and "4 runs: 4 interrupted" in told
    assert not (tmp_path / "RESULTS.md").exists()

    planned = vdrop("reproduce", *ROWS, changes, "plan=true")
    (done,) = re.findall(r"table1_small_none seed 1: .*\(([\d.]+) of 20 epochs are done\)", planned.stderr)
    assert 1 <= float(done) < 20 and planned.returncode == 0

    ran = vdrop("reproduce", *ROWS, changes)
    assert ran.returncode == 0, ran.stderr
    rows = rows_of((tmp_path / "RESULTS.md").read_text())
    assert all("1 2" in rows[name] for name in rows if name not in ("row", "---")) and len(rows) == 2 + 3
    starts = [record["step"] for record in read_log(next(tmp_path.rglob("*-none/*-s1/log.jsonl"))) if record["kind"] == "start"]
    assert len(starts) == 2 and starts[1] > 0, "what was done before the stop was not done again"
    again = vdrop("reproduce", *ROWS, changes)
    assert again.returncode == 0 and again.stderr.count(": finished") == 6 and "vdrop train" not in again.stderr


def test_rows_that_could_not_be_made_are_an_error_and_the_table_says_so(changes: str, vdrop: Vdrop, tmp_path: Path) -> None:
    ran = vdrop("reproduce", "sizes=[small]", "rows=[none,moon]", "precision=fp32", changes[:-1] + " schedule.lr=1e30'")
    assert ran.returncode == 1 and "2 runs: 2 failed" in ran.stderr, ran.stderr
    assert "is not finished, nor are 1 others; the same command goes on" in ran.stderr.splitlines()[-1]
    assert (tmp_path / "RESULTS.md").read_text().split(RATINGS)[0].count("not yet run") == 4


def test_the_ensemble_takes_ten_seeds_and_is_left_out_of_fewer(vdrop: Vdrop, changes: str) -> None:
    planned = vdrop("reproduce", "sizes=[large]", "rows=[ensemble]", changes, "plan=true")
    assert "table1_large_ensemble is left out: it takes seeds=10" in planned.stderr and planned.returncode == 2


def test_a_page_of_few_rows_has_the_others_too_unless_runs_are_of_other_settings() -> None:
    whole = page_of(Reproduce([Size.small], ["none"], file="a.md"))
    assert (whole.sizes, whole.rows, whole.file) == (list(TABLE_1), None, "a.md")
    own = page_of(Reproduce([Size.small], ["none"], overrides="schedule.epochs=1"))
    assert (own.sizes, own.rows, own.overrides) == ([Size.small], ["none"], "schedule.epochs=1")


def test_what_cannot_be_written_is_told_before_hours_of_work(changes: str, vdrop: Vdrop) -> None:
    ran = vdrop("reproduce", *ROWS, changes, "file=nowhere/R.md")
    assert ran.returncode == 2 and "file=nowhere/R.md is in a folder that is not there; make it" in ran.stderr
    assert "what is needed" not in ran.stderr


def test_the_settings_are_those_of_the_command_line() -> None:
    parsed = settings("sizes=[small]", "launcher='joblib hydra.launcher.n_jobs=4'", "precision=bf16", "seeds=3", command="reproduce")
    assert parsed == Reproduce([Size.small], seeds=3, launcher="joblib hydra.launcher.n_jobs=4", precision=Precision.bf16)
    with pytest.raises(ConfigError, match=r"seeds must be in \[1, 1000\], got 0"):
        Reproduce(seeds=0)
