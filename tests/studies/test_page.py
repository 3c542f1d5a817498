"""The page of results: every number on it is one of a run, or of `conf/published/`."""

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from tests.conftest import TINY, Vdrop, composing_once
from tests.conftest import settings as composed
from tests.processes import WITHOUT_RECORDS
from vdrop_cli.commands import eval as evaluation
from vdrop_cli.commands import reproduce, table, train
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.provenance import processor_name
from vdrop_cli.run_files import SHARED_DEVICE
from vdrop_cli.runs import Finished
from vdrop_cli.settings.choices import Pictures, Size
from vdrop_cli.settings.commands import Reproduce, Table
from vdrop_cli.settings.fields import plain
from vdrop_cli.studies import exports, records, rows, table1, written_page
from vdrop_cli.studies import page as results_page
from vdrop_cli.studies.film_reviews import FilmReviews
from vdrop_cli.studies.study import Line, Row, RunMetrics
from vdrop_cli.studies.table1 import Table1

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("no_shipped_records")  # tests of them set it


@pytest.fixture(scope="module")
def changes(text: list[str]) -> list[str]:
    return [
        *(change for change in TINY if not change.startswith(("model=", "precision"))),
        *text,
        "schedule.epochs=2",
    ]


@pytest.fixture(scope="module")
def outputs(changes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of the tied row, evaluated by MC, and one of the untied."""
    folder = tmp_path_factory.mktemp("table") / "outputs"
    for row, seed in (("variational", 1), ("variational", 2), ("untied", 1)):
        changed = [*changes, "precision=fp32", f"outputs={folder}", f"seed={seed}"]
        train.run(composed(f"experiment=table1_small_{row}", *changed))
    for run in folder.glob("train/*-variational/*"):
        evaluation.run(composed(f"checkpoint={run}", "stored_data=true", "mc_samples=100", command="eval"))
    return folder


@pytest.fixture
def copy(outputs: Path, tmp_path: Path) -> Path:
    """Outputs with the same runs, to be changed, and a page of findings."""
    shutil.copytree(outputs / "train", tmp_path / "outputs" / "train")
    (tmp_path / "outputs" / "record").mkdir()
    (tmp_path / "docs" / "findings").mkdir(parents=True)
    (tmp_path / "docs" / "findings" / "index.md").write_text("# Findings\n")
    return tmp_path / "outputs"


def overrides(changes: list[str]) -> str:
    return " ".join(change for change in changes if not change.startswith(("device", "precision")))


def run(outputs: Path, changes: list[str], folder: Path, **more: Any) -> str:
    settings = Table(
        outputs=str(outputs),
        file=str(folder / "R.md"),
        overrides=overrides(changes),
        **{"pictures": Pictures.none, **more},
    )
    table.run(settings)
    return (folder / "R.md").read_text()


RATINGS = "## Ratings of film reviews"
NOT_RUN = "not yet run"


def rows_of(page: str) -> dict[str, dict[str, str]]:
    """The rows of Table 1, each with its cells by their headings, of all tables that it is in."""
    by_name: dict[str, dict[str, str]] = {}
    headings: list[str] = []
    for line in page.split(RATINGS)[0].splitlines():
        cells = line.strip("| ").split(" | ") if line.startswith("| ") else []
        if cells and headings and cells[0] != "---":
            by_name.setdefault(cells[0], {}).update(zip(headings, cells, strict=True))
        headings = headings or cells if cells else []
    return by_name


def not_run(page: str) -> int:
    """How many rows of Table 1 the page says have not been run."""
    return sum(map(int, re.findall(rf"<summary>(\d+) rows? {NOT_RUN}</summary>", page.split(RATINGS)[0])))


def results(outputs: Path, row: str) -> list[dict[str, float]]:
    return [
        json.loads(path.read_text())
        for path in sorted(outputs.glob(f"train/*-{row}/*/result.json"), key=lambda p: p.parent.name[-1])
    ]


@pytest.mark.usefixtures("composing")
def test_the_numbers_are_those_of_the_runs(
    outputs: Path, changes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = run(outputs, changes, tmp_path, sizes=[Size.small])
    rows, tied = rows_of(page), results(outputs, "variational")

    def spread(values: list[float]) -> str:
        return f"{fmean(values):.2f} ± {stdev(values):.2f}"

    tied_row = rows["Variational (tied weights)"]
    assert tied_row["valid, exact"] == spread([result["valid_ppl"] for result in tied])
    assert tied_row["valid, as published"] == "–", (
        "another text than Penn Treebank has nothing to compare with"
    )
    assert (
        tied_row["seeds"] == "1 2" and tied_row["precision"] == "fp32" and tied_row["valid, published"] == "–"
    )
    perplexities = [
        json.loads(path.read_text())["metrics"]["test_ppl_mc100"]
        for path in outputs.rglob("eval-*-mc100-s1.json")
    ]
    mc = rows["Variational (tied weights, MC)"]
    assert mc["test"] == spread(perplexities) and mc["words/s"] == "–"
    untied = f"{results(outputs, 'variational_untied')[0]['valid_ppl']:.2f}"
    assert rows["Variational (untied weights)"]["valid, exact"] == untied
    assert "test" not in rows["Variational (untied weights, MC)"], "trained, but not evaluated"
    none = rows["Non-regularized (early stopping)"]
    assert none["test, published"] == "114.5‡" and "test" not in none and not_run(page) == 5
    shown = capsys.readouterr().out
    assert spread(perplexities) in shown and "Small (200 units)" in shown


@pytest.mark.usefixtures("composing")
def test_published_numbers_are_those_of_the_files_and_marked(
    outputs: Path, changes: list[str], tmp_path: Path
) -> None:
    page = run(outputs, changes, tmp_path, sizes=[Size.large])
    rows = rows_of(page)
    columns = ("valid, published", "test, published", "words/s, published")
    cells = {name: tuple(row[column] for column in columns) for name, row in rows.items()}
    assert cells["Moon et al."] == ("122.9†‡", "118.7†‡", "3,000†‡"), "runs have other settings"
    assert cells["Variational (untied weights)"] == ("77.9 ± 0.3‡", "75.2 ± 0.2‡", "1,600‡")
    assert cells["Ten variational models averaged"] == ("–", "68.7‡", "–")
    assert len(rows) == not_run(page) == 11
    assert "which is not what was published" in page and "schedule.epochs=2" in page
    assert rows["Ten variational models averaged"]["experiment"] == "`table1_large_ensemble`"


@pytest.mark.usefixtures("composing")
def test_runs_of_other_settings_are_none_of_the_row(
    outputs: Path, changes: list[str], tmp_path: Path
) -> None:
    page = run(outputs, [*changes, "schedule.epochs=3"], tmp_path, sizes=[Size.small])
    assert len(rows_of(page)) == not_run(page) == 8


@pytest.mark.usefixtures("composing")
def test_records_give_the_same_page_as_the_runs(copy: Path, changes: list[str], tmp_path: Path) -> None:
    first = run(copy, changes, tmp_path, sizes=[Size.small], record=True)
    recorded = sorted(
        path.relative_to(copy / "record" / "table1").as_posix()
        for path in (copy / "record" / "table1").rglob("*.json")
    )
    device = re.sub(r"\W+", "_", processor_name()).lower()
    assert recorded == [
        f"small_untied-fp32-{device}/s1/result.json",
        *(
            f"small_variational-fp32-{device}/s{seed}/{name}"
            for seed in (1, 2)
            for name in ("eval-0002-mc100-s1.json", "result.json")
        ),
    ]
    assert not list((copy / "record").rglob("*.pt"))
    shutil.rmtree(next(copy.glob("train/*-variational/*-s2")))
    assert run(copy, changes, tmp_path, sizes=[Size.small], record=True) == first, (
        "seeds are in order wherever they lie"
    )
    shutil.rmtree(copy / "train")
    assert run(copy, changes, tmp_path, sizes=[Size.small]) == first
    assert "](docs/findings/index.md)" in first


def changed(folder: Path, name: str, **values: Any) -> None:
    """A JSON file, or the first line of a log, with other values."""
    first, *others = (
        (folder / name).read_text().splitlines() if name == "log.jsonl" else [(folder / name).read_text()]
    )
    content = json.loads(first)
    content.get("environment", content).update(values)
    (folder / name).write_text("\n".join([json.dumps(content), *others]) + "\n")


@pytest.mark.usefixtures("composing")
def test_a_run_of_ones_own_stands_before_a_record_and_one_of_another_device_beside_it(
    copy: Path, changes: list[str], tmp_path: Path
) -> None:
    run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"], record=True)
    (own,), (recorded,) = copy.glob("train/*-variational_untied/*"), (copy / "record" / "table1").glob("*/s1")
    changed(own, "result.json", test_ppl=77.77)
    page = run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"])
    assert rows_of(page)["Variational (untied weights)"]["test"] == "77.77"
    run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"], record=True)
    assert json.loads((recorded / "result.json").read_text())["test_ppl"] == 77.77
    changed(own, "log.jsonl", device="another")
    page = run(
        copy, changes, tmp_path, sizes=[Size.small], rows=["untied"], record=True, pictures=Pictures.svg
    )
    assert page.count("| Variational (untied weights) |") == 2 * 2, "a line in each of two tables"
    assert {path.name for path in (copy / "record" / "table1").iterdir()} == {
        recorded.parent.name,
        "small_untied-fp32-another",
    }
    drawn = (copy / "record" / "pictures" / "table1_small_speed.svg").read_text()
    assert "Variational (untied weights) (fp32, another" in drawn


def record(outputs: Path, row: Row) -> None:
    records.write({row.key: "table1/row"}, rows.collect(outputs), outputs / "record")


@pytest.mark.usefixtures("composing")
def test_runs_of_two_machines_have_no_speed_together(copy: Path, changes: list[str], tmp_path: Path) -> None:
    def speed() -> str:
        return rows_of(run(copy, changes, tmp_path, sizes=[Size.small]))["Variational (tied weights)"][
            "words/s"
        ]

    assert "±" in speed(), "of two runs"
    log = next(copy.glob("train/*-variational/*")) / "log.jsonl"
    first, *others = log.read_text().splitlines()
    start = json.loads(first)
    start["environment"]["processor_model"] = "another"
    log.write_text("\n".join([json.dumps(start), *others]) + "\n")
    assert speed() == "–"


@pytest.mark.usefixtures("composing")
def test_a_run_that_shared_its_device_has_a_curve_and_no_speed(
    copy: Path, changes: list[str], tmp_path: Path
) -> None:
    """Its record, too, until a run that had the device alone replaces it."""
    for name in copy.glob("train/*-variational/*"):
        (name / SHARED_DEVICE).write_text("another run")
    (tied,) = Table1([Size.small], ["variational"], overrides(changes)).rows
    record(copy, tied)
    recorded = list(copy.glob("record/table1/row-*/*"))
    assert len(recorded) == 2 and all(
        (name / SHARED_DEVICE).read_text() == "another run" for name in recorded
    )
    shutil.rmtree(copy / "train")
    page = run(copy, changes, tmp_path, sizes=[Size.small], pictures=Pictures.svg)
    assert rows_of(page)["Variational (tied weights)"]["words/s"] == "–"
    pictures = copy / "record" / "pictures"
    assert "Variational (tied weights)" in (pictures / "table1_small_validation.svg").read_text()
    assert not (pictures / "table1_small_speed.svg").exists()


@pytest.mark.usefixtures("composing")
def test_a_run_that_had_its_device_alone_replaces_the_record_of_one_that_shared_it(
    copy: Path, changes: list[str]
) -> None:
    (tied,) = Table1([Size.small], ["variational"], overrides(changes)).rows
    record(copy, tied)
    recorded, *_ = copy.glob("record/table1/row-*/*")
    (recorded / SHARED_DEVICE).write_text("another run")
    record(copy, tied)
    assert not (recorded / SHARED_DEVICE).exists() and (recorded / "result.json").exists()


@pytest.mark.usefixtures("composing")
def test_a_run_is_evaluated_as_its_record_until_it_is_itself(
    copy: Path, changes: list[str], tmp_path: Path
) -> None:
    """As one that has been made anew."""
    tied, mc = Table1([Size.small], ["variational", "variational_mc"], overrides(changes)).rows

    def tests(row: Row) -> list[float]:
        (line,) = table1.lines_of(row, rows.collect(copy).finished[row.key])
        return line.values("test")

    record(copy, tied)
    before = tests(mc)
    ((own, evaluated),) = ((path.parent, path) for path in copy.glob("train/*-variational/*-s1/eval-*.json"))
    changed(own, "result.json", test_ppl=77.77)
    evaluated.rename(tmp_path / "aside")
    assert tests(tied)[0] == 77.77 and tests(mc) == before
    evaluation_file = json.loads((tmp_path / "aside").read_text())
    evaluated.write_text(
        json.dumps(evaluation_file | {"metrics": evaluation_file["metrics"] | {"test_ppl_mc100": 66.66}})
    )
    assert tests(mc) == [66.66, before[1]]


@pytest.mark.usefixtures("composing")
def test_no_evaluation_of_a_record_is_lost_to_a_run_without(copy: Path, changes: list[str]) -> None:
    """Of the same training it stays, in place of that of another nothing is copied."""
    (tied,) = Table1([Size.small], ["variational"], overrides(changes)).rows

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (copy / "record").rglob("*") if path.is_file()}

    record(copy, tied)
    (own,), (there,) = copy.glob("train/*-variational/*-s1"), copy.glob("record/table1/row-*/s1")
    (there / "eval-0002-mc9-s1.json").write_bytes((there / "eval-0002-mc100-s1.json").read_bytes())
    (own / "eval-0002-mc100-s1.json").unlink()
    before = content()
    record(copy, tied)
    assert content() == before
    (there / "result.json").unlink()  # as by a copying that was cut off
    record(copy, tied)
    assert content() == before
    changed(own, "result.json", test_ppl=77.77)
    with pytest.raises(
        ConfigError,
        match=r"/s1 would lose eval-0002-mc100-s1\.json, eval-0002-mc9-s1\.json, which .*-s1 lacks; "
        r"evaluate it",
    ):
        record(copy, tied)
    assert content() == before
    for samples in (100, 9):
        (own / f"eval-0002-mc{samples}-s1.json").write_text("{}")
    record(copy, tied)
    assert [path.read_text() for path in there.glob("eval-*")] == ["{}"] * 2 and "77.77" in (
        there / "result.json"
    ).read_text()


@pytest.mark.usefixtures("composing")
def test_no_record_is_lost_to_a_run_with_other_settings(copy: Path, changes: list[str]) -> None:
    """Overrides change a row and not the name of its record."""
    (tied,) = Table1([Size.small], ["variational"], overrides(changes)).rows
    record(copy, tied)
    for config in copy.glob("record/table1/row-*/*/config.yaml"):
        config.write_text(config.read_text().replace("epochs: 2\n", "epochs: 3\n"))
        (config.parent / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"/s1 is the record of a run with other settings or text; move it"):
        record(copy, tied)
    assert {path.read_text() for path in copy.glob("record/table1/row-*/*/result.json")} == {"{}"}


def test_an_average_that_two_of_its_members_have_counts_once(copy: Path, changes: list[str]) -> None:
    """It was evaluated once for each of them."""
    one, two = sorted(copy.glob("train/*-variational/*"))
    for run, member in ((one, two), (two, one)):
        options = [f"members=[{member}]", "stored_data=true"]
        evaluation.run(composed(f"checkpoint={run}", *options, command="eval"))
    with composing_once():
        (tied,) = Table1([Size.small], ["variational"], overrides(changes)).rows
    average = replace(tied, evaluation=Evaluation(members=2))
    (line,) = table1.lines_of(average, rows.collect(copy).finished[tied.key])
    assert len(line.runs) == 1 and line.seeds == "1–2" and len(line.values("test")) == 1


@pytest.mark.usefixtures("composing")
def test_the_row_of_an_evaluation_has_the_commit_of_that_evaluation(
    copy: Path, changes: list[str], tmp_path: Path
) -> None:
    for path in copy.rglob("eval-*.json"):
        changed(path.parent, path.name, commit="fedcba9876", dirty=False)
    by_row = rows_of(run(copy, changes, tmp_path, sizes=[Size.small], csv=str(tmp_path / "t.csv")))
    assert by_row["Variational (tied weights, MC)"]["commit"] == "fedcba9"
    assert by_row["Variational (tied weights)"]["commit"] != "fedcba9"
    exported = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    mc_records = [record for record in exported if record["experiment"] == "table1_small_variational_mc"]
    assert [(record["commit"], record["mc_samples"]) for record in mc_records] == [("fedcba9876", "100")] * 2


@pytest.mark.usefixtures("composing")
def test_seeds_that_were_made_differently_are_listed_with_how_each_was_made(
    copy: Path, changes: list[str], tmp_path: Path
) -> None:
    for seed, made in (
        (1, {"commit": "1111111111", "dirty": True, "threads": 1}),
        (2, {"commit": "2222222222", "dirty": False, "threads": 2}),
    ):
        (folder,) = copy.glob(f"train/*-variational/*-s{seed}")
        changed(folder, "log.jsonl", device="a CPU", date="2026-01-02", **made)
    tied = rows_of(run(copy, changes, tmp_path, sizes=[Size.small], csv=str(tmp_path / "t.csv")))[
        "Variational (tied weights)"
    ]
    assert [tied[name] for name in ("device", "date", "commit")] == [
        "a CPU, 1 thread; a CPU, 2 threads",
        "2026-01-02",
        "1111111*; 2222222",
    ]
    exported = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert [record["dirty"] for record in exported if record["experiment"] == "table1_small_variational"] == [
        "True",
        "False",
    ]


@pytest.mark.usefixtures("composing")
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    for name in ("file", "csv", "latex"):
        with pytest.raises(ConfigError, match=f"^{name}=.*/taken/a: its folder cannot be made"):
            table.run(
                Table(
                    outputs=str(tmp_path),
                    **{"file": str(tmp_path / "R.md"), name: str(tmp_path / "taken" / "a")},
                )
            )
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.usefixtures("composing")
def test_the_same_numbers_as_csv_latex_and_pictures(copy: Path, changes: list[str], tmp_path: Path) -> None:
    more = {"csv": str(tmp_path / "t.csv"), "latex": str(tmp_path / "t.tex"), "pictures": Pictures.svg}
    page = run(
        copy, changes, tmp_path, sizes=[Size.small], rows=["variational", "variational_mc", "none"], **more
    )
    exported = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert [(r["experiment"], r["seeds"]) for r in exported] == [
        ("table1_small_none", ""),
        *((f"table1_small_{row}", seed) for row in ("variational", "variational_mc") for seed in ("1", "2")),
    ]
    assert [float(r["test_ppl"]) for r in exported[1:3]] == [
        result["test_ppl"] for result in results(copy, "variational")
    ]
    latex = (tmp_path / "t.tex").read_text()
    assert latex.count(r" \\") == 4 and r"$\pm$" in latex and "±" not in latex
    drawn = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert [Path(path).name for path in drawn] == [
        f"table1_small_{what}.svg" for what in ("validation", "mc", "speed")
    ]
    assert all("<svg" in (tmp_path / path).read_text() for path in drawn)
    again = run(copy, changes, tmp_path, sizes=[Size.small], pictures=Pictures.none)
    assert "![" not in again


@pytest.mark.usefixtures("composing")
def test_every_number_is_in_the_column_of_its_name() -> None:
    (tied,) = Table1([Size.medium], ["variational"]).rows
    environment = {"precision": "fp32", "device": "a CPU", "date": "2026-01-02"}
    start = {"kind": "start", "corpus": "0f", "environment": environment}
    run = Finished(Path(), plain(replace(tied.settings, seed=3)), [start], {})
    numbers = {"valid_as_published": 81.5, "valid": 82.5, "test": 80.25, "words_per_second": 1000.0}
    line = Line(tied, [RunMetrics(run, dict(numbers), [environment])])
    (record,) = csv.DictReader(io.StringIO(exports.as_csv([line])))
    published = {
        "row": "Variational (tied weights)",
        "source": "Gal & Ghahramani 2016, Table 1",
        "confirmed": "True",
        "same_settings": "True",
        "valid": "81.8",
        "valid_deviation": "0.2",
        "test": "79.7",
        "test_deviation": "0.1",
        "words_per_second": "4700",
    }
    own = {"seeds": "3", "mc_samples": "0", "members": "1", "commit": "", "dirty": "", **environment}
    own |= {"valid_ppl_as_published": "81.5", "valid_ppl": "82.5", "test_ppl": "80.25"}
    assert record == {
        "experiment": "table1_medium_variational",
        **{f"published_{name}": value for name, value in published.items()},
        **own,
        "words_per_second": "1000.0",
    }
    (row,) = [text for text in exports.as_latex([line]).splitlines() if "Variational" in text]
    assert row.split(" & ")[1:] == [r"81.8 $\pm$ 0.2", "81.50", r"79.7 $\pm$ 0.1", "80.25", r"3 \\"]
    printed = re.split(r"\s{2,}", exports.as_text([line]).splitlines()[-1])
    assert printed[1:] == ["81.8 ± 0.2", "81.50", "79.7 ± 0.1", "80.25", "1,000", "3", "fp32"]


@pytest.mark.usefixtures("composing")
def test_an_unknown_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="rows: nonsense is not a row"):
        table.run(Table(rows=["nonsense"]))
    with pytest.raises(ConfigError, match="sizes must be a list"):
        Table(sizes=[])


def test_the_settings_are_those_of_the_command_line() -> None:
    parsed = composed(
        "sizes=[small,large]", "record=true", "rows=[none]", "overrides='a=1 b=2'", command="table"
    )
    assert parsed == Table(sizes=[Size.small, Size.large], record=True, rows=["none"], overrides="a=1 b=2")


def test_how_settings_were_chosen_is_read_from_the_records_of_it(outputs: Path, tmp_path: Path) -> None:
    """The same run, recorded for two values with a result of its own each."""
    run = next(outputs.rglob("*-variational/*/result.json")).parent
    for value, ppl in ((0.5, 120.5), (0.25, 118.25)):
        there = tmp_path / "choices" / "moon" / "dropout.p_c" / str(value)
        shutil.copytree(run, there)
        (there / "result.json").write_text(
            json.dumps(json.loads((run / "result.json").read_text()) | {"valid_ppl": ppl})
        )
        lines = (
            (there / "config.yaml").read_text().replace("policy: variational", "policy: moon").splitlines()
        )
        other_lines = [line for line in lines if not line.strip().startswith(("p_x", "p_h", "p_out"))]
        (there / "config.yaml").write_text(
            "\n".join(f"  p_c: {value}" if line.strip().startswith("p_c") else line for line in other_lines)
        )
    parts = results_page.choices([tmp_path / "choices"])
    assert "\n| `dropout.p_c` | moon, lstm_small, 2 epochs | 0.25: 118.25, 0.5: 120.50 | 0.25 |" in parts[-1]
    assert results_page.choices([tmp_path / "none"]) == []
    assert written_page.choices("\n".join(parts)) == ["`dropout.p_c` (moon, lstm_small, 2 epochs)"]


def test_shipped_records_count_wherever_the_outputs_are(
    vdrop: Vdrop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another working folder: the page is written beside the outputs, and is that of the checkout but
    for its pictures and a link.
    """
    monkeypatch.delenv(WITHOUT_RECORDS)
    ran = vdrop("table", "outputs=elsewhere", "pictures=none")
    assert ran.returncode == 0, ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    page = (tmp_path / "elsewhere" / "RESULTS.md").read_text()
    assert len(written_page.measured(page)[0]) > 10 and written_page.choices(page)

    def text(content: str) -> list[str]:
        content = re.sub(r"\n!\[.*\)\n", "", content)
        return re.sub(r"\nWhat the runs show: .*\n", "", content).splitlines()

    assert text(page) == text((ROOT / "RESULTS.md").read_text())


def test_the_page_is_that_of_the_checkout_only_for_its_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it holds records or not."""
    monkeypatch.chdir(ROOT)
    assert written_page.path_of(None, "outputs") == Path("RESULTS.md") and written_page.path_of(
        "a.md", "outputs"
    ) == Path("a.md")
    assert written_page.path_of(None, str(tmp_path)) == tmp_path / "RESULTS.md"
    monkeypatch.chdir(tmp_path)
    assert written_page.path_of(None, "outputs") == Path("outputs/RESULTS.md")
    assert written_page.path_of(None, str(ROOT / "outputs")).resolve() == ROOT / "RESULTS.md"
    monkeypatch.setattr(written_page, "IS_CHECKOUT", False)
    assert written_page.path_of(None, str(ROOT / "outputs")) == ROOT / "outputs" / "RESULTS.md"


@pytest.mark.usefixtures("composing")
def test_shipped_records_are_not_copied_to_other_outputs(
    outputs: Path, changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "checkout" / "outputs"
    shutil.copytree(outputs / "train", shipped / "train")
    run(shipped, changes, tmp_path, sizes=[Size.small], record=True)
    for module in (records, rows):
        monkeypatch.setattr(module, "RECORDS", shipped / "record")
    page = run(tmp_path / "elsewhere", changes, tmp_path / "checkout", sizes=[Size.small], record=True)
    assert written_page.measured(page)[0] and not list((tmp_path / "elsewhere").rglob("result.json"))


@pytest.mark.usefixtures("composing")
def test_a_page_that_would_lose_numbers_is_refused_and_nothing_is_written(
    copy: Path, changes: list[str], tmp_path: Path
) -> None:
    whole = run(copy, changes, tmp_path, sizes=[Size.small])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError,
        match=r"R\.md would lose numbers of .*Variational \(tied weights\).*; give file= another name",
    ):
        run(copy, changes, tmp_path, sizes=[Size.large], record=True, csv=str(tmp_path / "t.csv"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    tied = next(line for line in whole.splitlines() if line.startswith("| Variational (tied weights) |"))
    for new, name in (
        (whole.replace("All runs with `", "All runs with `seed=1 "), "runs with "),
        (whole.replace(tied, tied.replace("| 1 2 |", "| 1 |")), "(seed 2)"),
        (whole.replace(tied, re.sub(r"[0-9.]+ ± [0-9.]+", "–", tied)), "(valid, exact, test)"),
        (whole.replace(tied, f"{tied}\n{tied.replace('| 1 2 |', '| 3 |')}"), ""),
        (whole.replace("## Large", "## More"), ""),
    ):
        lost = written_page.lost_numbers(whole, new)
        assert [name in one for one in lost] == ([True] if name else []), lost
        assert not name or new != whole


@pytest.mark.usefixtures("composing")
def test_somebody_elses_files_are_not_overwritten(outputs: Path, changes: list[str], tmp_path: Path) -> None:
    for name, file in (("file", "R.md"), ("csv", "t.csv"), ("latex", "t.tex")):
        (tmp_path / file).write_text("# Mine\n")
        more = {} if name == "file" else {name: str(tmp_path / file)}
        with pytest.raises(ConfigError, match=rf"/{re.escape(file)} was not written by vdrop, .*{name}= ?"):
            run(outputs, changes, tmp_path, sizes=[Size.small], **more)
        assert (tmp_path / file).read_text() == "# Mine\n"
        (tmp_path / file).write_text("")
    more = {"csv": str(tmp_path / "t.csv"), "latex": str(tmp_path / "t.tex")}
    run(outputs, changes, tmp_path, sizes=[Size.small], **more)  # over empty ones
    results_page.require_writable(Table(file=str(tmp_path / "R.md"), **more))  # over its own
    assert all("Variational" in (tmp_path / file).read_text() for file in ("R.md", "t.csv", "t.tex"))


@pytest.mark.usefixtures("composing")
def test_a_campaign_refuses_before_it_begins(outputs: Path, changes: list[str], tmp_path: Path) -> None:
    (tmp_path / "R.md").write_text("# Mine\n")
    asked = Reproduce(
        sizes=[Size.small],
        rows=["untied"],
        overrides=overrides(changes),
        outputs=str(outputs),
        file=str(tmp_path / "R.md"),
    )
    with pytest.raises(ConfigError, match="was not written by vdrop"):
        reproduce.run(asked)
    (tmp_path / "R.md").unlink()
    run(outputs, changes, tmp_path, sizes=[Size.small])
    with pytest.raises(ConfigError, match=r"would lose numbers of .*Variational \(tied weights\)"):
        reproduce.run(asked)
    page = Table(
        [Size.small],
        outputs=str(tmp_path / "none"),
        overrides=overrides(changes),
        file=str(tmp_path / "R.md"),
    )
    again = Table1([Size.small], ["variational", "variational_mc", "untied"]).rows
    studies = [Table1.from_table(page), FilmReviews()]
    results_page.compose(page, studies, again)  # rows that will be made again are not lost
    with pytest.raises(
        ConfigError, match=r"would lose numbers of Small \(200 units\) Variational \(tied weights, MC\); give"
    ):
        results_page.compose(page, studies, [again[0], again[2]])


@pytest.mark.usefixtures("composing")
def test_a_copy_of_a_run_does_not_stand_for_it(
    copy: Path, changes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many evaluations it has, and wherever it lies."""
    (own,) = copy.glob("train/*-variational_untied/*")
    backup = Path(shutil.copytree(own, copy / "train" / "a_backup" / own.name.replace("-s1", "-s1-old")))
    changed(backup, "result.json", test_ppl=1.0)
    (backup / "eval-0001-standard.json").write_text('{"metrics": {}}')
    (backup / "eval-0001-mc2-s1.json").write_text('{"metrics": {}, "mc": []}')
    page = run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"])
    assert rows_of(page)["Variational (untied weights)"]["test"] != "1.00"
    said = f"vdrop: {backup} has the settings and the seed of {own}; left out"
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("composing")
def test_a_record_that_cannot_be_written_is_an_error(copy: Path, changes: list[str], tmp_path: Path) -> None:
    shutil.rmtree(copy / "record")
    (copy / "record").write_text("in the way")
    with pytest.raises(RunError, match=r"record/.* cannot be written \(.*\); make it writable, or leave out"):
        run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"], record=True)


@pytest.mark.usefixtures("composing")
def test_a_record_takes_the_place_of_no_link(copy: Path, changes: list[str], tmp_path: Path) -> None:
    run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"], record=True)
    (there,) = (copy / "record" / "table1").glob("*/s1")
    (there / "notes.txt").write_text("mine")
    (there / "eval-notes.json").write_text("mine")
    shutil.move(there / "log.jsonl", tmp_path / "theirs")
    (there / "log.jsonl").symlink_to(tmp_path / "theirs")
    content = (tmp_path / "theirs").read_bytes()
    with pytest.raises(ConfigError, match=r"s1/log\.jsonl would be overwritten"):
        run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"], record=True)
    (there / "log.jsonl").unlink()
    run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"], record=True)
    assert (tmp_path / "theirs").read_bytes() == (there / "log.jsonl").read_bytes() == content
    assert (there / "notes.txt").read_text() == (there / "eval-notes.json").read_text() == "mine"
