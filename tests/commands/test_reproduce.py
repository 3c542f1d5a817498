"""`vdrop reproduce`: a real process that is stopped, goes on, and comes to the table."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from tests.commands.test_table import RATINGS, rows_of
from tests.conftest import TINY, Vdrop, settings
from tests.processes import ForkServer
from vdrop_cli import experiments
from vdrop_cli.arguments import prepared
from vdrop_cli.commands import reproduce, table, train
from vdrop_cli.commands.campaign import Maker, require_on_page
from vdrop_cli.commands.reproduce import page_of
from vdrop_cli.commands.table import Evaluated, Line
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.runs import Finished
from vdrop_cli.settings.choices import TABLE_1, Pictures, Precision, Size
from vdrop_cli.settings.commands import Figures, Reproduce, Table, seconds
from vdrop_cli.settings.fields import plain
from vdrop_cli.sinks import read_log
from vdrop_cli.stuck_starts import StuckError

ROWS = ["sizes=[small]", "rows=[none,variational,variational_mc]", "seeds=2", "precision=fp32"]


@pytest.fixture
def changes(text: list[str]) -> str:
    changed = [
        *(change for change in TINY if not change.startswith(("model=", "precision", "device"))),
        *text,
        "schedule.epochs=12",
    ]
    return f"overrides='{' '.join(changed)}'"


@pytest.mark.usefixtures("no_shipped_records")
def test_it_is_stopped_goes_on_and_writes_every_row(
    changes: str, vdrop: Vdrop, fork_server: ForkServer, tmp_path: Path
) -> None:
    with fork_server.spawn(tmp_path, "reproduce", *ROWS, changes) as process:
        until = time.monotonic() + 120
        while (
            not list(tmp_path.rglob("checkpoint-*.pt"))
            and time.monotonic() < until
            and process.poll() is None
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        told = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM, told
    assert (
        re.search(r"table1_small_none seed 1: \d+:\d\d.* \(0 of 12 epochs are done\)", told)
        and "4 runs: 4 interrupted" in told
    )
    assert not (tmp_path / "outputs" / "RESULTS.md").exists()

    planned = vdrop("reproduce", *ROWS, changes, "plan=true")
    (done,) = re.findall(r"table1_small_none seed 1: .*\(([\d.]+) of 12 epochs are done\)", planned.stderr)
    assert 1 <= float(done) < 12 and planned.returncode == 0

    ran = vdrop("reproduce", *ROWS, changes)
    assert ran.returncode == 0, ran.stderr
    rows = rows_of((tmp_path / "outputs" / "RESULTS.md").read_text())
    assert all("1 2" in rows[name] for name in rows if name not in ("row", "---")) and len(rows) == 2 + 3
    starts = [
        record["step"]
        for record in read_log(next(tmp_path.rglob("*-none/*-s1/log.jsonl")))
        if record["kind"] == "start"
    ]
    assert len(starts) == 2 and starts[1] > 0, "what was done before the stop was not done again"
    again = vdrop("reproduce", *ROWS, changes)
    assert (
        again.returncode == 0 and again.stderr.count(": finished") == 6 and "vdrop train" not in again.stderr
    )


@pytest.mark.usefixtures("no_shipped_records")
def test_rows_that_could_not_be_made_are_an_error_and_the_table_says_so(
    changes: str, vdrop: Vdrop, tmp_path: Path
) -> None:
    ran = vdrop(
        "reproduce",
        "sizes=[small]",
        "rows=[none,moon]",
        "precision=fp32",
        "jobs=2",
        changes[:-1] + " schedule.lr=1e30'",
    )
    assert "hydra/launcher=joblib hydra.launcher.n_jobs=2" in ran.stderr
    assert ran.returncode == 1 and "2 runs: 2 failed" in ran.stderr, ran.stderr
    assert "is not finished, nor are 1 others; the same command resumes" in ran.stderr.splitlines()[-1]
    assert (tmp_path / "outputs" / "RESULTS.md").read_text().split(RATINGS)[0].count("not yet run") == 4


def planned(rows: list[experiments.Row], overrides: str, seeds: int) -> reproduce.Plan:
    settled = Reproduce([Size.small], overrides=overrides, seeds=seeds, precision=Precision.fp32)
    return reproduce.plan_of(rows, settled, Maker(Precision.fp32, "outputs"))


def overrides_of(changes: str) -> str:
    return changes.removeprefix("overrides='")[:-1]


@pytest.mark.usefixtures("composing")
def test_a_row_or_seed_that_is_finished_and_not_in_the_table_is_an_error(
    changes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = f"{overrides_of(changes)} stuck.steps=null"
    few = experiments.rows([Size.small], ["none", "variational_mc"], overrides)
    ensemble = experiments.rows([Size.large], ["ensemble"], overrides)

    def line(row: experiments.Row, *seeds: int) -> Line:
        made = [Finished(Path(), plain(replace(row.settings, seed=seed)), [], {}) for seed in seeds]
        return Line(row, [Evaluated(run, None, None, 1.0, None, {}) for run in made])

    of_both, of_few, of_ensemble = (
        planned(rows, overrides, seeds).on_page
        for rows, seeds in (([*few, *ensemble], 10), (few, 2), (ensemble, 10))
    )
    assert len(of_both) == 2 * 10 + 1 and len(of_few) == 2 * 2 and len(of_ensemble) == 1
    require_on_page(of_few, reproduce.told([line(row, 1, 2) for row in few]))
    require_on_page(of_ensemble, reproduce.told([line(ensemble[0], 1)]))
    for wanted, lines, message in (
        (
            of_few,
            [line(few[0], 1, 2), line(few[1])],
            "table1_small_variational_mc seed 1 is finished, but not in the table",
        ),
        (
            of_few,
            [line(few[0], 1), line(few[1], 1, 2)],
            "table1_small_none seed 2 is finished, but not in the table",
        ),
        (of_ensemble, [], "table1_large_ensemble seed 1 is finished, but not in the table"),
    ):
        with pytest.raises(RunError, match=message):
            require_on_page(wanted, reproduce.told(lines))


CHECKED = "stuck.steps=10 stuck.loss=0.001"  # a limit that is always exceeded


@pytest.mark.usefixtures("composing", "no_shipped_records")
def test_a_row_of_which_every_seed_is_stuck_ends_with_an_error_that_names_them(
    changes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Real processes: two seeds, then one in place of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "MORE_SEEDS", 1)
    asked = Reproduce(
        [Size.small],
        ["none"],
        seeds=2,
        overrides=f"{overrides_of(changes)} {CHECKED}",
        precision=Precision.fp32,
    )
    with pytest.raises(RunError, match=r"^table1_small_none: seeds 1, 2, 3 are stuck, and no more are tried"):
        reproduce.run(asked)
    shown = capfd.readouterr()
    assert (
        "vdrop: table1_small_none seed 1, table1_small_none seed 2: stuck; other seeds replace them"
        in shown.err
    )
    assert re.findall(r"vdrop train -m .* seed=([\d,]+) ", shown.err) == ["1,2", "3"]
    assert not list(Path().rglob("result.json")) and len(list(Path().rglob("stuck.json"))) == 3
    for where in ("outputs/RESULTS.md", "the terminal"):
        content = Path(where).read_text() if where.endswith(".md") else shown.out
        assert re.search(
            r"\n- Non-regularized \(early stopping\) \(fp32, .*\): seed 1 \(\d\.\d\d after 10 steps\), seed "
            r"2 \(.*, seed 3 \(",
            content,
        )
    reproduce.run(replace(asked, plan=True))
    shown = capfd.readouterr()
    assert (
        shown.err.count(": stuck, the mean training loss of steps 9 to 10 is ") == 3
        and "together: 0:00" in shown.err
    )


def make(row: experiments.Row, seed: int, is_stuck: bool) -> Path:
    """A run of a row as a process would have made it, which its limit makes stuck or not."""
    limit = 0.001 if is_stuck else 99.0
    settled = replace(
        row.settings, seed=seed, precision=Precision.fp32, stuck=replace(row.settings.stuck, loss=limit)
    )
    with pytest.raises(StuckError) if is_stuck else nullcontext():
        train.run(settled)
    made: Path = next(Path("outputs/train").rglob(f"*-s{seed}"))
    return made


@pytest.mark.usefixtures("composing", "no_shipped_records")
def test_the_first_seeds_that_are_not_stuck_are_planned_evaluated_and_in_the_table(
    changes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three seeds the second is stuck, by its run folder, and then by its record alone."""
    monkeypatch.chdir(tmp_path)
    overrides = f"{overrides_of(changes).replace('schedule.epochs=12', 'schedule.epochs=1')} stuck.steps=10"
    rows = experiments.rows([Size.small], ["variational", "variational_mc"], overrides)
    ensemble = replace(
        rows[0],
        name="ensemble",
        settings=replace(rows[0].settings, published=replace(rows[0].published, members=2)),
    )
    lower = [
        replace(row, settings=replace(row.settings, stuck=replace(row.settings.stuck, loss=0.001)))
        for row in (*rows, ensemble)
    ]
    folders = {seed: make(rows[0], seed, is_stuck=seed == 2) for seed in (1, 2, 3)}

    def require_planned() -> None:
        plan = planned(lower, overrides, 2)
        assert [training.settings.seed for training in plan.trainings.values()] == [1, 3] and not list(
            plan.sweeps()
        )
        assert [name for name, _ in plan.stuck.values()] == [
            "table1_small_variational seed 2"
        ] and not plan.without_seeds
        averaged = [
            [t.settings.seed for t in e.trainings] for e in plan.evaluations.values() if len(e.trainings) > 1
        ]
        assert averaged == [[1, 3]]
        assert plan.on_page == [
            *(
                (f"table1_small_{name}", seed)
                for name in ("variational", "variational_mc")
                for seed in (1, 3)
            ),
            ("table1_small_ensemble", 1),
        ]

    require_planned()
    settled = Table(
        [Size.small],
        ["variational", "variational_mc"],
        overrides,
        file="R.md",
        pictures=Pictures.none,
        record=True,
    )
    of_members = {"metrics": {"test_ppl": 5.0, "valid_ppl": 6.0}, "environment": {}}
    for seeds in ((1, 2), (1, 3)):
        members = [str(folders[seed] / "checkpoint-0001.pt") for seed in seeds]
        path = folders[1] / f"eval-0001-ensemble2-{seeds[1]:08}.json"
        path.write_text(json.dumps(of_members | {"members": members}))
        found = table.collect(Path("outputs"))
        (line,) = table.of_row(
            ensemble, found[ensemble.key], table.collect_stuck(Path("outputs"), found)[ensemble.key]
        )
        assert [evaluated.seeds for evaluated in line.runs] == ([] if 2 in seeds else ["1 3"])
    table.write(settled, Figures())
    page, shown = Path("R.md").read_text(), capsys.readouterr().out
    loss = json.loads((folders[2] / "stuck.json").read_text())["loss"]
    item = rf"- Variational \(tied weights\) \(fp32, .*\): seed 2 \({loss:.2f} after 10 steps\)"
    assert "| 1 3 |" in page and len(re.findall(item, page)) == len(re.findall(item, shown)) == 1
    (record,) = Path("outputs/record").rglob("s2")
    assert sorted(path.name for path in record.iterdir()) == ["config.yaml", "log.jsonl", "stuck.json"]
    assert all(
        (record / name).read_bytes() == (folders[2] / name).read_bytes()
        for name in ("config.yaml", "log.jsonl", "stuck.json")
    )
    (record / "result.json").write_text("damaged")
    with pytest.raises(
        ConfigError,
        match=r"/s2 holds a result, and would be overwritten by a run that is stuck; move it away",
    ):
        table.write(settled, Figures())
    (record / "result.json").unlink()
    for folder in folders.values():
        (folder / "eval-0001-ensemble2-00000003.json").unlink(missing_ok=True)
    shutil.rmtree(folders[2])
    require_planned()
    table.write(settled, Figures())
    assert Path("R.md").read_text() == page, "read from records it is the same"
    make(rows[0], 2, is_stuck=False)
    table.write(settled, Figures())
    assert "| 1 2 3 |" in (page := Path("R.md").read_text()) and not re.search(item, page)
    assert not (record / "stuck.json").exists() and (record / "result.json").exists(), (
        "a finished run replaces the record of a stuck one"
    )


@pytest.mark.usefixtures("composing")
def test_rows_with_the_same_seeds_are_one_sweep_and_those_with_others_another(
    changes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no run is made that no row needs."""
    monkeypatch.chdir(tmp_path)
    overrides = f"{overrides_of(changes)} {CHECKED}"
    rows = experiments.rows([Size.small], ["none", "zaremba", "variational", "variational_mc"], overrides)

    def sweeps() -> list[list[tuple[str, int]]]:
        found = planned(rows, overrides, 2).sweeps()
        return [
            [(training.name.removeprefix("table1_small_"), training.settings.seed) for training in sweep]
            for sweep in found
        ]

    every = [(name, seed) for name in ("none", "zaremba", "variational") for seed in (1, 2)]
    assert sweeps() == [every]
    make(rows[1], 1, is_stuck=True)
    assert sweeps() == [[run for run in every if run[0] != "zaremba"], [("zaremba", 2), ("zaremba", 3)]]


@pytest.mark.usefixtures("composing")
def test_nothing_to_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^seeds must be more"):
        reproduce.run(Reproduce([Size.large], ["ensemble"]))
    with pytest.raises(ConfigError, match="sizes must be a list"):
        Reproduce([])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], Reproduce([Size.medium])),
        (["SIZE=all", "SEEDS=10"], Reproduce([Size.small, Size.medium, Size.large], seeds=10)),
        (
            [
                "SIZE=small",
                "ROWS=none,untied_mc",
                "LAUNCHER=joblib hydra.launcher.n_jobs=4",
                "PRECISION=bf16",
            ],
            Reproduce(
                [Size.small],
                ["none", "untied_mc"],
                launcher="joblib hydra.launcher.n_jobs=4",
                precision=Precision.bf16,
            ),
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
    assert (
        "table1_large_ensemble is left out: it takes seeds=10" in planned.stderr and planned.returncode == 2
    )


def test_a_page_of_few_rows_has_the_others_too_unless_runs_are_of_other_settings() -> None:
    whole = page_of(Reproduce([Size.small], ["none"], file="a.md"))
    assert (whole.sizes, whole.rows, whole.file) == (list(TABLE_1), None, "a.md")
    own = page_of(Reproduce([Size.small], ["none"], overrides="schedule.epochs=1"))
    assert (own.sizes, own.rows, own.overrides) == ([Size.small], ["none"], "schedule.epochs=1")


@pytest.mark.parametrize("plan", [False, True])
def test_what_cannot_be_written_is_told_before_hours_of_work_and_a_plan_writes_nothing(
    plan: bool, changes: str, vdrop: Vdrop
) -> None:
    ran = vdrop(
        "reproduce",
        "sizes=[small]",
        "rows=[none]",
        "precision=fp32",
        changes,
        "file=nowhere/R.md",
        f"plan={plan}",
    )
    told = "file=nowhere/R.md is in a folder that does not exist; make it" in ran.stderr
    assert (ran.returncode, told, "what is needed" in ran.stderr) == (
        (0, False, True) if plan else (2, True, False)
    )


def test_the_settings_are_those_of_the_command_line() -> None:
    parsed = settings(
        "sizes=[small]",
        "launcher='joblib hydra.launcher.n_jobs=4'",
        "precision=bf16",
        "seeds=3",
        command="reproduce",
    )
    assert parsed == Reproduce(
        [Size.small], seeds=3, launcher="joblib hydra.launcher.n_jobs=4", precision=Precision.bf16
    )
    assert settings("mc_batch=200", command="reproduce") == Reproduce(mc_batch=200)
    with pytest.raises(ConfigError, match=r"seeds must be in"):
        Reproduce(seeds=0)
    with pytest.raises(ConfigError, match=r"^mc_batch must be in"):
        Reproduce(mc_batch=0)


@pytest.mark.usefixtures("composing")
def test_passes_run_together_as_it_was_asked_for(
    changes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = overrides_of(changes)
    rows = experiments.rows([Size.small], ["variational_mc"], overrides)
    for mc_batch in (None, 200):
        plan = reproduce.plan_of(
            rows,
            Reproduce([Size.small], overrides=overrides, mc_batch=mc_batch),
            Maker(Precision.auto, "outputs"),
        )
        (evaluation,) = plan.evaluations.values()
        assert [a for a in evaluation.arguments if a.startswith("mc_batch")] == (
            ["mc_batch=200"] if mc_batch else []
        )


@pytest.mark.parametrize("kind", [Reproduce, Figures])
def test_times_and_numbers_of_jobs_that_cannot_be_meant_are_refused(kind: type[Reproduce | Figures]) -> None:
    for text, expected in (("90s", 90), ("25min", 1500), ("2h", 7200), ("1h30min", 5400), ("1h1min1s", 3661)):
        assert seconds(text) == expected and kind(until=text).until == text
    for text in ("", "25", "25m", "0min", "1.5h", "-1h", "30min1h", "1h 30min", "٢h", "9999999h"):
        with pytest.raises(
            ConfigError, match=r"^until must be a time such as 25min, 2h or 1h30min, or null, got "
        ):
            kind(until=text)
    with pytest.raises(ConfigError, match=r"^jobs must be in"):
        kind(jobs=0)
    with pytest.raises(ConfigError, match=r"^jobs must be 1 with launcher"):
        kind(jobs=3, launcher="joblib")
