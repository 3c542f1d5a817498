"""`vdrop reproduce`: a real process that is stopped, resumes, and writes the table."""

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
from typing import Any

import pytest

from tests.conftest import TINY, TINY_SENTIMENT, Vdrop, settings
from tests.processes import ForkServer
from tests.studies.test_page import NOT_RUN, RATINGS, not_run, rows_of
from vdrop_cli.arguments import to_hydra
from vdrop_cli.commands import reproduce, train
from vdrop_cli.commands.reproduce import page_of
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.lock import Lock
from vdrop_cli.policies import Cell
from vdrop_cli.runs import Finished
from vdrop_cli.settings.choices import Backend, Pictures, Precision, Size, SplitProtocol, StudyName
from vdrop_cli.settings.commands import Reproduce, Table, seconds
from vdrop_cli.settings.fields import plain
from vdrop_cli.sinks import read_log
from vdrop_cli.stuck_starts import StuckError
from vdrop_cli.studies import page as results_page
from vdrop_cli.studies import plan, rows, table1
from vdrop_cli.studies.baselines import Baselines
from vdrop_cli.studies.film_reviews import FilmReviews
from vdrop_cli.studies.plan import Plan, RunFactory
from vdrop_cli.studies.study import Line, Row, RunMetrics
from vdrop_cli.studies.table1 import Table1

ROWS = ["sizes=[small]", "rows=[none,variational,variational_mc]", "precision=fp32"]


@pytest.fixture
def changes(text: list[str]) -> str:
    changed = [
        *(change for change in TINY if not change.startswith(("model=", "precision", "device"))),
        *text,
        "schedule.epochs=8",
    ]
    return f"overrides='{' '.join(changed)}'"


@pytest.mark.parametrize("seeds", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.usefixtures("no_shipped_records")
def test_a_stopped_reproduction_resumes_and_writes_every_row(
    seeds: int, changes: str, vdrop: Vdrop, fork_server: ForkServer, tmp_path: Path
) -> None:
    line = ["reproduce", *ROWS, f"seeds={seeds}", changes]
    with fork_server.spawn(tmp_path, *line) as process:
        until = time.monotonic() + 120
        while (
            not list(tmp_path.rglob("checkpoint-*.pt"))
            and time.monotonic() < until
            and process.poll() is None
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        stderr = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert (
        re.search(r"table1_small_none seed 1: \d+ (min|s).* \(0 of 8 epochs are done\)", stderr)
        and f"{2 * seeds} runs: {2 * seeds} interrupted" in stderr
    )
    assert not (tmp_path / "outputs" / "RESULTS.md").exists()

    planned = vdrop(*line, "plan=true")
    (done,) = re.findall(r"table1_small_none seed 1: .*\(([\d.]+) of 8 epochs are done\)", planned.stderr)
    assert 1 <= float(done) < 8 and planned.returncode == 0

    ran = vdrop(*line)
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "outputs" / "RESULTS.md").read_text()
    made = rows_of(page)
    assert (
        all(row["seeds"] == ("1 2" if seeds == 2 else "1") for row in made.values())
        and len(made) == 3
        and not not_run(page)
    )
    starts = [
        record["step"]
        for record in read_log(next(tmp_path.rglob("*-none/*-s1/log.jsonl")))
        if record["kind"] == "start"
    ]
    assert len(starts) == 2 and starts[1] > 0, "what was done before the stop was not done again"
    again = vdrop(*line)
    assert (
        again.returncode == 0
        and again.stderr.count(": finished") == 3 * seeds
        and "vdrop train" not in again.stderr
    )


@pytest.mark.usefixtures("no_shipped_records")
def test_choices_of_a_config_folder_are_those_of_the_runs(changes: str, vdrop: Vdrop, tmp_path: Path) -> None:
    (tmp_path / "mine" / "dropout").mkdir(parents=True)
    (tmp_path / "mine" / "dropout" / "light.yaml").write_text("name: light\npolicy: naive\np_h: 0.1\n")
    short = changes.replace("epochs=8'", "epochs=1 dropout=light schedule=none'")
    ran = vdrop("reproduce", "--config-dir", "mine", "sizes=[small]", "rows=[none]", "precision=fp32", short)
    assert ran.returncode == 0, ran.stderr
    (folder,) = (path.parent for path in tmp_path.rglob("result.json"))
    assert folder.parent.name == "language_model-lstm_small-light"
    assert f"vdrop train -m --config-dir={tmp_path}/mine" in ran.stderr


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.usefixtures("no_shipped_records")
def test_rows_that_could_not_be_made_are_an_error_and_the_table_says_so(
    jobs: int, changes: str, vdrop: Vdrop, tmp_path: Path
) -> None:
    ran = vdrop(
        "reproduce",
        "sizes=[small]",
        "rows=[none,moon]",
        "precision=fp32",
        f"jobs={jobs}",
        changes[:-1] + " schedule.lr=1e30'",
    )
    assert ("hydra/launcher=joblib hydra.launcher.n_jobs=2" in ran.stderr) is (jobs == 2)
    assert ran.returncode == 1 and "2 runs: 2 failed" in ran.stderr, ran.stderr
    assert "is not finished, nor are 1 others; the same command resumes" in ran.stderr.splitlines()[-1]
    assert not_run((tmp_path / "outputs" / "RESULTS.md").read_text()) == 2


def planned(chosen: list[Row], overrides: str, seeds: int) -> Plan:
    settled = Reproduce(sizes=[Size.small], overrides=overrides, seeds=seeds, precision=Precision.fp32)
    return plan.make_plan(chosen, settled, RunFactory(settled))


def overrides_of(changes: str) -> str:
    return changes.removeprefix("overrides='")[:-1]


@pytest.mark.usefixtures("composing")
def test_a_row_or_seed_that_is_finished_and_not_in_the_table_is_an_error(
    changes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = f"{overrides_of(changes)} stuck.steps=null"
    few = Table1([Size.small], ["none", "variational_mc"], overrides).rows
    ensemble = Table1([Size.large], ["ensemble"], overrides).rows

    def line(row: Row, *seeds: int) -> Line:
        made = [Finished(Path(), plain(replace(row.settings, seed=seed)), [], {}) for seed in seeds]
        return Line(row, [RunMetrics(run, {}, []) for run in made])

    plan_of_both, plan_of_few, plan_of_ensemble = (
        planned(chosen, overrides, seeds)
        for chosen, seeds in (([*few, *ensemble], 10), (few, 2), (ensemble, 10))
    )
    on_page = [len(one.on_page) for one in (plan_of_both, plan_of_few, plan_of_ensemble)]
    assert on_page == [2 * 10 + 1, 2 * 2, 1]
    plan_of_few.require_on_page([line(row, 1, 2) for row in few])
    plan_of_ensemble.require_on_page([line(ensemble[0], 1)])
    for needed, lines, message in (
        (
            plan_of_few,
            [line(few[0], 1, 2), line(few[1])],
            "table1_small_variational_mc seed 1 is finished, but not in the table",
        ),
        (
            plan_of_few,
            [line(few[0], 1), line(few[1], 1, 2)],
            "table1_small_none seed 2 is finished, but not in the table",
        ),
        (plan_of_ensemble, [], "table1_large_ensemble seed 1 is finished, but not in the table"),
    ):
        with pytest.raises(RunError, match=message):
            needed.require_on_page(lines)


CHECKED = "stuck.steps=10 stuck.loss=0.001"  # a limit that is always exceeded


@pytest.mark.usefixtures("composing", "no_shipped_records", "forked_commands")
def test_a_row_of_which_every_seed_is_stuck_ends_with_an_error_that_names_them(
    changes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Processes: two seeds, then one in place of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "MORE_SEEDS", 1)
    asked = Reproduce(
        sizes=[Size.small],
        rows=["none"],
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
        and "together: 0 s" in shown.err
    )


def make(row: Row, seed: int, is_stuck: bool) -> Path:
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
    overrides = f"{overrides_of(changes).replace('schedule.epochs=8', 'schedule.epochs=1')} stuck.steps=10"
    chosen = Table1([Size.small], ["variational", "variational_mc"], overrides).rows
    ensemble = replace(chosen[0], name="table1_small_ensemble", evaluation=Evaluation(members=2))
    lower = [
        replace(row, settings=replace(row.settings, stuck=replace(row.settings.stuck, loss=0.001)))
        for row in (*chosen, ensemble)
    ]
    folders = {seed: make(chosen[0], seed, is_stuck=seed == 2) for seed in (1, 2, 3)}

    def require_planned() -> None:
        made = planned(lower, overrides, 2)
        assert [training.settings.seed for training in made.trainings.values()] == [1, 3]
        assert not list(made.sweeps()) and not made.without_seeds
        assert [name for name, _ in made.stuck.values()] == ["table1_small_variational seed 2"]
        averaged = [
            [t.settings.seed for t in e.trainings] for e in made.evaluations.values() if len(e.trainings) > 1
        ]
        assert averaged == [[1, 3]]
        assert [(row.name, seed) for row, seed in made.on_page] == [
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
    ensemble_result = {"metrics": {"test_ppl": 5.0, "valid_ppl": 6.0}, "environment": {}}
    for seeds in ((1, 2), (1, 3)):
        members = [str(folders[seed] / "checkpoint-0001.pt") for seed in seeds]
        path = folders[1] / f"eval-0001-ensemble2-{seeds[1]:08}.json"
        path.write_text(json.dumps(ensemble_result | {"members": members}))
        collected = rows.collect(Path("outputs"))
        (line,) = table1.lines_of(ensemble, collected.finished[ensemble.key], collected.stuck[ensemble.key])
        assert line.seeds == ("" if 2 in seeds else "1 3")
    results_page.write(settled, [Table1.from_table(settled), FilmReviews()])
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
        results_page.write(settled, [Table1.from_table(settled), FilmReviews()])
    (record / "result.json").unlink()
    for folder in folders.values():
        (folder / "eval-0001-ensemble2-00000003.json").unlink(missing_ok=True)
    shutil.rmtree(folders[2])
    require_planned()
    results_page.write(settled, [Table1.from_table(settled), FilmReviews()])
    assert Path("R.md").read_text() == page, "read from records it is the same"
    make(chosen[0], 2, is_stuck=False)
    results_page.write(settled, [Table1.from_table(settled), FilmReviews()])
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
    chosen = Table1([Size.small], ["none", "zaremba", "variational", "variational_mc"], overrides).rows

    def sweeps() -> list[list[tuple[str, int]]]:
        made = planned(chosen, overrides, 2).sweeps()
        prefix = "table1_small_"
        return [[(t.row.name.removeprefix(prefix), t.settings.seed) for t in sweep] for sweep in made]

    every = [(name, seed) for name in ("none", "zaremba", "variational") for seed in (1, 2)]
    assert sweeps() == [every]
    make(chosen[1], 1, is_stuck=True)
    assert sweeps() == [[run for run in every if run[0] != "zaremba"], [("zaremba", 2), ("zaremba", 3)]]


def test_nothing_to_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^sizes must be"):
        Reproduce(sizes=[])
    with pytest.raises(ConfigError, match=r"^rows must be"):
        Reproduce(rows=[])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], Reproduce(sizes=[Size.medium])),
        (["SIZE=all", "SEEDS=10"], Reproduce(sizes=[Size.small, Size.medium, Size.large], seeds=10)),
        (
            [
                "SIZE=small",
                "ROWS=none,untied_mc",
                "LAUNCHER=joblib hydra.launcher.n_jobs=4",
                "PRECISION=bf16",
            ],
            Reproduce(
                sizes=[Size.small],
                rows=["none", "untied_mc"],
                launcher="joblib hydra.launcher.n_jobs=4",
                precision=Precision.bf16,
            ),
        ),
        (
            ["JOBS=3", "UNTIL=25min", "MC_BATCH=500"],
            Reproduce(sizes=[Size.medium], jobs=3, until="25min", mc_batch=500),
        ),
    ],
)
def test_variables_of_make_become_settings(given: list[str], meant: Reproduce) -> None:
    root = Path(__file__).parents[2]
    outside = {"PATH": os.environ["PATH"]}  # nothing of a make that runs the tests
    command = ["make", "--dry-run", "--no-print-directory", "reproduce-table", *given]
    printed = subprocess.run(
        command, cwd=root, env=outside, capture_output=True, text=True, check=True
    ).stdout
    _, name, *arguments = shlex.split(printed[printed.index(".venv/bin/vdrop") :].replace("\\\n", " "))
    assert name == "reproduce" and settings(*to_hydra("reproduce", arguments), command="reproduce") == meant


def test_the_ensemble_takes_ten_seeds_and_is_left_out_of_fewer(vdrop: Vdrop, changes: str) -> None:
    planned = vdrop("reproduce", "sizes=[large]", "rows=[ensemble]", changes, "plan=true")
    assert (
        "table1_large_ensemble is left out: it takes seeds=10" in planned.stderr and planned.returncode == 2
    )


def test_a_page_of_few_rows_has_the_others_too_unless_runs_are_of_other_settings() -> None:
    few = Reproduce(sizes=[Size.small], rows=["none"])
    assert page_of(few) == [Table1(), FilmReviews(), Baselines()]
    chosen = Table1([Size.small], ["none"], "schedule.epochs=1", (Size.medium,))
    assert page_of(replace(few, overrides="schedule.epochs=1")) == [chosen, FilmReviews(), Baselines()]
    reviews = Reproduce(StudyName.film_reviews, cells=[Cell.gru], epochs=9)
    assert page_of(reviews) == [Table1(), FilmReviews(epochs=9), Baselines()]
    changed = FilmReviews(cells=[Cell.gru], epochs=9, overrides="schedule.lr=0.1")
    assert page_of(replace(reviews, overrides="schedule.lr=0.1")) == [Table1(), changed, Baselines()]
    baselines = Reproduce(StudyName.baselines, rows=["quick_tied"])
    assert page_of(baselines) == [Table1(), FilmReviews(), Baselines()]
    changed_baselines = Baselines(["quick_tied"], "schedule.lr=0.1")
    assert page_of(replace(baselines, overrides="schedule.lr=0.1")) == [
        *(Table1(), FilmReviews(), changed_baselines)
    ]


@pytest.mark.parametrize("only_plan", [False, True])
def test_a_page_that_cannot_be_written_is_refused_before_any_work_and_a_plan_writes_nothing(
    only_plan: bool, changes: str, vdrop: Vdrop, tmp_path: Path
) -> None:
    (tmp_path / "taken").touch()
    ran = vdrop(
        "reproduce",
        "sizes=[small]",
        "rows=[none]",
        "precision=fp32",
        changes,
        "file=taken/R.md",
        f"plan={only_plan}",
    )
    refused = "file=taken/R.md: its folder cannot be made" in ran.stderr
    assert (ran.returncode, refused, "what is needed" in ran.stderr) == (
        (0, False, True) if only_plan else (2, True, False)
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
        sizes=[Size.small], seeds=3, launcher="joblib hydra.launcher.n_jobs=4", precision=Precision.bf16
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
    chosen = Table1([Size.small], ["variational_mc"], overrides).rows
    for mc_batch in (None, 200):
        asked = Reproduce(sizes=[Size.small], overrides=overrides, mc_batch=mc_batch)
        made = plan.make_plan(chosen, asked, RunFactory(asked))
        (evaluation,) = made.evaluations.values()
        assert [a for a in evaluation.arguments if a.startswith("mc_batch")] == (
            ["mc_batch=200"] if mc_batch else []
        )


def test_times_and_numbers_of_jobs_that_cannot_be_meant_are_refused() -> None:
    for text, expected in (("90s", 90), ("25min", 1500), ("2h", 7200), ("1h30min", 5400), ("1h1min1s", 3661)):
        assert seconds(text) == expected and Reproduce(until=text).until == text
    for text in ("", "25", "25m", "0min", "1.5h", "-1h", "30min1h", "1h 30min", "٢h", "9999999h"):
        with pytest.raises(
            ConfigError, match=r"^until must be a time such as 25min, 2h or 1h30min, or null, got "
        ):
            Reproduce(until=text)
    with pytest.raises(ConfigError, match=r"^jobs must be in"):
        Reproduce(jobs=0)
    with pytest.raises(ConfigError, match=r"^jobs must be 1 with launcher"):
        Reproduce(jobs=3, launcher="joblib")
    place: dict[str, Any] = {"device": "cpu", "backend": Backend.native, "precision": Precision.bf16}
    for name in place:
        with pytest.raises(ConfigError, match=rf"^{name} must be that of the runs, not auto, .*, got auto"):
            Reproduce(launcher="submitit_slurm", **{**place, name: type(place[name])("auto")}).require_place()
    with pytest.raises(ConfigError, match=r"^until must be null with launcher=submitit_slurm, .*timeout_min"):
        Reproduce(launcher="submitit_slurm", until="2h", **place).require_place()
    Reproduce(launcher="submitit_slurm", **place).require_place()
    Reproduce(launcher="submitit_local", until="2h").require_place()


FEW_FILM_REVIEWS = [
    "study=film_reviews",
    "cells=[lstm]",
    "dropouts=[none,variational]",
    "epochs=2",
    "mc_samples=2",
    "precision=fp32",
]


@pytest.fixture
def film_changes(rated: list[str]) -> str:
    left_out = ("task=", "task.protocol", "schedule.epochs", "device", "precision")
    changes = [change for change in TINY_SENTIMENT if not change.startswith(left_out)]
    return f"overrides='{' '.join([*changes, *rated])}'"


@pytest.mark.usefixtures("no_shipped_records")
def test_film_reviews_are_planned_made_drawn_and_written_down(
    film_changes: str, vdrop: Vdrop, tmp_path: Path
) -> None:
    planned = vdrop("reproduce", *FEW_FILM_REVIEWS, film_changes, "plan=true", "file=nowhere/R.md")
    assert planned.returncode == 0, planned.stderr
    assert (
        "clean lstm variational seed 1: " in planned.stderr
        and planned.stderr.count("(0 of 2 epochs are done)") == 4
    )
    assert not list(tmp_path.rglob("result.json"))

    ran = vdrop("reproduce", *FEW_FILM_REVIEWS, film_changes)
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "outputs" / "RESULTS.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| LSTM | ")]
    reviews = page[page.index(RATINGS) : page.index("## Stronger baselines")]
    assert len(lines) == 2 * 4 and NOT_RUN not in reviews
    for name in ("paper", "clean"):
        assert f"(record/pictures/ratings_{name}_lstm.png)" in page
        assert (tmp_path / f"outputs/record/pictures/ratings_{name}_lstm.png").exists()
    again = vdrop("reproduce", *FEW_FILM_REVIEWS, film_changes)
    assert (
        again.returncode == 0
        and again.stderr.count(": finished") == 4 + 2
        and "vdrop train" not in again.stderr
    )


@pytest.mark.long  # in short, Table 1's rows that could not be made
@pytest.mark.usefixtures("no_shipped_records")
def test_a_run_of_film_reviews_that_could_not_be_made_is_an_error(
    film_changes: str, vdrop: Vdrop, tmp_path: Path
) -> None:
    """Another process is at work on the run."""
    one = [*FEW_FILM_REVIEWS, "protocols=[clean]", "dropouts=[none]", film_changes]
    assert vdrop("reproduce", *one).returncode == 0
    (result,) = tmp_path.rglob("result.json")
    result.unlink()
    # a page with its numbers would not be replaced by one without
    (tmp_path / "outputs" / "RESULTS.md").unlink()
    with Lock(result.parent / "lock", "it"):
        ran = vdrop("reproduce", *one)
    assert (
        ran.returncode == 1 and "is not finished; the same command resumes" in ran.stderr.splitlines()[-1]
    ), ran.stderr
    page = (tmp_path / "outputs" / "RESULTS.md").read_text()
    assert f"1 row {NOT_RUN}" in page[page.index(RATINGS) :]


@pytest.mark.usefixtures("composing")
def test_a_run_of_film_reviews_that_is_finished_and_not_in_its_table_is_an_error() -> None:
    few = FilmReviews([SplitProtocol.clean], [Cell.gru], ["none", "naive"], epochs=9)
    none, naive = few.rows

    def line(row: Row, *seeds: int, epochs: int = 9) -> Line:
        schedule = replace(row.settings.schedule, epochs=epochs)
        made = [plain(replace(row.settings, seed=seed, schedule=schedule)) for seed in seeds]
        return Line(row, [RunMetrics(Finished(Path(), config, [], {}), {}, []) for config in made])

    needed = Plan(on_page=[(row, seed) for row in (none, naive) for seed in (1, 2)])
    needed.require_on_page([line(none, 1, 2), line(naive, 1, epochs=60), line(naive, 1, 2)])
    for lines, lacking in (
        ([line(none, 1, 2), line(naive, 1)], "clean gru naive seed 2"),
        ([line(none, 1, 2, epochs=60), line(naive, 1, 2)], "clean gru none seed 1"),
        ([line(none), line(naive, 1, 2)], "clean gru none seed 1"),
    ):
        with pytest.raises(RunError, match=f"{lacking} is finished, but not in the table"):
            needed.require_on_page(lines)


def test_the_settings_of_a_study_are_refused_with_the_other() -> None:
    chosen = ("study=film_reviews", "protocols=[clean]", "cells=[gru]", "seeds=3", "epochs=9")
    assert settings(*chosen, command="reproduce") == Reproduce(
        StudyName.film_reviews, protocols=[SplitProtocol.clean], cells=[Cell.gru], seeds=3, epochs=9
    )
    for wrong in ("seeds=0", "epochs=0", "mc_samples=0", "cells=[]", "protocols=[]", "dropouts=[none,none]"):
        with pytest.raises(ConfigError, match=f"^{wrong.split('=')[0]} must be"):
            settings("study=film_reviews", wrong, command="reproduce")
    for wrong in ("epochs=3", "mc_samples=3", "cells=[gru]", "protocols=[clean]", "dropouts=[none]"):
        with pytest.raises(ConfigError, match=f"^{wrong.split('=')[0]} must be null with study=table1"):
            settings(wrong, command="reproduce")
    for wrong in ("sizes=[small]", "rows=[none]", "mc_batch=3"):
        with pytest.raises(ConfigError, match=f"^{wrong.split('=')[0]} must be null with study=film_reviews"):
            settings("study=film_reviews", wrong, command="reproduce")
