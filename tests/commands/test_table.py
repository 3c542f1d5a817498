"""`vdrop table`: every number on the page is one of a run, or of a file of settings."""

import csv
import io
import json
import re
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from tests.conftest import TINY, Vdrop
from tests.conftest import settings as composed
from vdrop_cli import RECORDS, experiments, results_page, runs
from vdrop_cli.commands import eval as evaluation
from vdrop_cli.commands import reproduce, table, train
from vdrop_cli.errors import ConfigError
from vdrop_cli.provenance import processor_name
from vdrop_cli.settings.choices import Pictures, Size
from vdrop_cli.settings.commands import Figures, Reproduce, Table

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
    """Outputs with the same runs, to be changed; their findings are known."""
    shutil.copytree(outputs / "train", tmp_path / "outputs" / "train")
    (tmp_path / "outputs" / "record").mkdir()
    (tmp_path / "outputs" / "record" / "findings.md").write_text("What was found.\n")
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


def rows_of(page: str) -> dict[str, list[str]]:
    """Of Table 1."""
    lines = [
        line.strip("| ").split(" | ") for line in page.split(RATINGS)[0].splitlines() if line.count("|") > 10
    ]
    return {line[0]: line[1:] for line in lines}


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

    found = dict(zip(table.HEADINGS[1:], rows["Variational (tied weights)"], strict=True))
    assert found["valid, exact"] == spread([result["valid_ppl"] for result in tied])
    assert found["valid, as published"] == "–", "another text than Penn Treebank has nothing to compare with"
    assert found["seeds"] == "1 2" and found["precision"] == "fp32" and found["valid, published"] == "–"
    told = [
        json.loads(path.read_text())["metrics"]["test_ppl_mc100"]
        for path in outputs.rglob("eval-*-mc100-s1.json")
    ]
    mc = rows["Variational (tied weights, MC)"]
    assert spread(told) in mc and mc[table.HEADINGS.index("words/s") - 1] == "–"
    assert (
        f"{results(outputs, 'variational_untied')[0]['valid_ppl']:.2f}"
        in rows["Variational (untied weights)"]
    )
    assert rows["Variational (untied weights, MC)"].count("not yet run") == 2, "trained, but not evaluated"
    none = dict(zip(table.HEADINGS, ["", *rows["Non-regularized (early stopping)"]], strict=True))
    assert none["test, published"] == "114.5‡" and none["test"] == "not yet run"
    shown = capsys.readouterr().out
    assert spread(told) in shown and "small (200 units)" in shown


@pytest.mark.usefixtures("composing")
def test_published_numbers_are_those_of_the_files_and_marked(
    outputs: Path, changes: list[str], tmp_path: Path
) -> None:
    page = run(outputs, changes, tmp_path, sizes=[Size.large])
    rows = rows_of(page)
    found = {name: (row[0], row[4], row[7]) for name, row in rows.items()}
    assert found["Moon et al."] == ("122.9†", "118.7†", "3,000†")
    assert found["Variational (untied weights)"] == ("77.9 ± 0.3", "75.2 ± 0.2", "1,600")
    assert found["Ten variational models averaged"] == ("–", "68.7", "–")
    assert all("not yet run" in row for name, row in rows.items() if name not in ("row", "---"))
    assert len(rows) == 2 + 11
    assert "which is not what was published" in page and "schedule.epochs=2" in page
    assert (
        f"`vdrop train experiment=table1_large_untied {overrides(changes)} seed=1`" in page
        and "members=[RUN,…]" in page
    )
    assert "`conf/dropout/moon.yaml`: Gal & Ghahramani 2016" in page


def test_differences_are_measured_less_published() -> None:
    assert (
        table.difference([80.0, 81.0], 79.7) == "+0.80"
        and table.difference([], 1.0) == table.difference([1.0], None) == "–"
    )


@pytest.mark.usefixtures("composing")
def test_runs_of_other_settings_are_none_of_the_row(
    outputs: Path, changes: list[str], tmp_path: Path
) -> None:
    page = run(outputs, [*changes, "schedule.epochs=3"], tmp_path, sizes=[Size.small])
    assert all("not yet run" in row for name, row in rows_of(page).items() if name not in ("row", "---"))


@pytest.mark.usefixtures("composing")
def test_records_give_the_same_page_as_the_runs(copy: Path, changes: list[str], tmp_path: Path) -> None:
    first = run(copy, changes, tmp_path, sizes=[Size.small], record=True)
    kept = sorted(
        path.relative_to(copy / "record" / "table1").as_posix()
        for path in (copy / "record" / "table1").rglob("*.json")
    )
    device = re.sub(r"\W+", "_", processor_name()).lower()
    assert kept == [
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
    assert "## Findings\n\nWhat was found." in first


def changed(folder: Path, name: str, **values: Any) -> None:
    """A JSON file, or the first line of a log, with other values."""
    first, *others = (
        (folder / name).read_text().splitlines() if name == "log.jsonl" else [(folder / name).read_text()]
    )
    told = json.loads(first)
    told.get("environment", told).update(values)
    (folder / name).write_text("\n".join([json.dumps(told), *others]) + "\n")


@pytest.mark.usefixtures("composing")
def test_a_run_of_ones_own_stands_before_a_record_and_one_of_another_device_beside_it(
    copy: Path, changes: list[str], tmp_path: Path
) -> None:
    run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"], record=True)
    (own,), (kept,) = copy.glob("train/*-variational_untied/*"), (copy / "record" / "table1").glob("*/s1")
    changed(own, "result.json", test_ppl=77.77)
    page = run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"])
    assert "77.77" in rows_of(page)["Variational (untied weights)"]
    run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"], record=True)
    assert json.loads((kept / "result.json").read_text())["test_ppl"] == 77.77
    changed(own, "log.jsonl", device="another")
    page = run(
        copy, changes, tmp_path, sizes=[Size.small], rows=["untied"], record=True, pictures=Pictures.svg
    )
    assert page.count("| Variational (untied weights) |") == 2
    assert {path.name for path in (copy / "record" / "table1").iterdir()} == {
        kept.parent.name,
        "small_untied-fp32-another",
    }
    drawn = (copy / "record" / "pictures" / "table1_small_speed.svg").read_text()
    assert "Variational (untied weights) (fp32, another" in drawn


def record(outputs: Path, row: experiments.Row) -> None:
    table.record({row.key: "table1/row"}, table.collect(outputs), outputs / "record", {})


@pytest.mark.usefixtures("composing")
def test_a_run_is_evaluated_as_its_record_until_it_is_itself(
    copy: Path, changes: list[str], tmp_path: Path
) -> None:
    """As one that has been made anew."""
    tied, mc = experiments.rows([Size.small], ["variational", "variational_mc"], overrides(changes))

    def tests(row: experiments.Row) -> list[float]:
        (line,) = table.of_row(row, table.collect(copy)[row.key])
        return line.values(lambda evaluated: evaluated.test)

    record(copy, tied)
    before = tests(mc)
    ((own, evaluated),) = ((path.parent, path) for path in copy.glob("train/*-variational/*-s1/eval-*.json"))
    changed(own, "result.json", test_ppl=77.77)
    evaluated.rename(tmp_path / "aside")
    assert tests(tied)[0] == 77.77 and tests(mc) == before
    told = json.loads((tmp_path / "aside").read_text())
    evaluated.write_text(json.dumps(told | {"metrics": told["metrics"] | {"test_ppl_mc100": 66.66}}))
    assert tests(mc) == [66.66, before[1]]


@pytest.mark.usefixtures("composing")
def test_no_evaluation_of_a_record_is_lost_to_a_run_without(copy: Path, changes: list[str]) -> None:
    """Of the same training it stays, in place of that of another nothing is copied."""
    (tied,) = experiments.rows([Size.small], ["variational"], overrides(changes))

    def kept() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (copy / "record").rglob("*") if path.is_file()}

    record(copy, tied)
    (own,), (there,) = copy.glob("train/*-variational/*-s1"), copy.glob("record/table1/row-*/s1")
    (there / "eval-0002-mc9-s1.json").write_bytes((there / "eval-0002-mc100-s1.json").read_bytes())
    (own / "eval-0002-mc100-s1.json").unlink()
    before = kept()
    record(copy, tied)
    assert kept() == before
    (there / "result.json").unlink()  # as by a copying that was cut off
    record(copy, tied)
    assert kept() == before
    changed(own, "result.json", test_ppl=77.77)
    with pytest.raises(
        ConfigError,
        match=r"/s1 would lose eval-0002-mc100-s1\.json, eval-0002-mc9-s1\.json, which .*-s1 lacks; "
        r"evaluate it",
    ):
        record(copy, tied)
    assert kept() == before
    for samples in (100, 9):
        (own / f"eval-0002-mc{samples}-s1.json").write_text("{}")
    record(copy, tied)
    assert [path.read_text() for path in there.glob("eval-*")] == ["{}"] * 2 and "77.77" in (
        there / "result.json"
    ).read_text()


@pytest.mark.usefixtures("composing")
def test_an_evaluation_tells_with_what_it_was_made_itself(
    copy: Path, changes: list[str], tmp_path: Path
) -> None:
    for path in copy.rglob("eval-*.json"):
        changed(path.parent, path.name, commit="fedcba9876", dirty=False)
    rows = rows_of(run(copy, changes, tmp_path, sizes=[Size.small], csv=str(tmp_path / "t.csv")))
    assert rows["Variational (tied weights, MC)"][-1] == "fedcba9" != rows["Variational (tied weights)"][-1]
    records = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    of_mc = [record for record in records if record["experiment"] == "table1_small_variational_mc"]
    assert [(record["commit"], record["mc_samples"]) for record in of_mc] == [("fedcba9876", "100")] * 2


@pytest.mark.usefixtures("composing")
def test_of_seeds_that_were_made_differently_it_is_told_how_each_was(
    copy: Path, changes: list[str], tmp_path: Path
) -> None:
    for seed, made in (
        (1, {"commit": "1111111111", "dirty": True, "threads": 1}),
        (2, {"commit": "2222222222", "dirty": False, "threads": 2}),
    ):
        (folder,) = copy.glob(f"train/*-variational/*-s{seed}")
        changed(folder, "log.jsonl", device="a CPU", date="2026-01-02", **made)
    rows = rows_of(run(copy, changes, tmp_path, sizes=[Size.small], csv=str(tmp_path / "t.csv")))
    assert rows["Variational (tied weights)"][-3:] == [
        "a CPU, 1 thread; a CPU, 2 threads",
        "2026-01-02",
        "1111111*; 2222222",
    ]
    records = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert [record["dirty"] for record in records if record["experiment"] == "table1_small_variational"] == [
        "True",
        "False",
    ]


@pytest.mark.usefixtures("composing")
def test_an_ensemble_is_of_as_many_seeds_as_members(outputs: Path) -> None:
    row = next(row for row in experiments.rows([Size.large], ["ensemble"], ""))
    one = runs.below(outputs)[0]
    told = {
        "members": [f"a-s{seed}/checkpoint-0002.pt" for seed in range(1, 11)],
        "environment": one.environment,
    }
    line = table.Line(row, [table.Evaluated(one, None, 70.0, 69.0, None, told)])
    assert table.cells(line)[table.HEADINGS.index("seeds")] == "1–10"


@pytest.mark.usefixtures("composing")
@pytest.mark.parametrize(
    ("row", "told"), [("none", ["114.5‡", "100.00", "–"]), ("variational", ["–", "100.00", "–"])]
)
def test_a_number_of_other_settings_is_marked_and_nothing_is_taken_from_it(
    row: str, told: list[str], outputs: Path
) -> None:
    (of,), one = experiments.rows([Size.small], [row], ""), runs.below(outputs)[0]
    assert table.cells(table.Line(of, [table.Evaluated(one, 100.0, 100.0, 100.0, 1.0, {})]))[5:8] == told


@pytest.mark.usefixtures("composing")
def test_what_cannot_be_written_is_told_before_anything_is(tmp_path: Path) -> None:
    for name in ("file", "csv", "latex"):
        with pytest.raises(
            ConfigError, match=f"^{name}=.*/nowhere/a is in a folder that does not exist; make it"
        ):
            table.run(
                Table(
                    outputs=str(tmp_path),
                    **{"file": str(tmp_path / "R.md"), name: str(tmp_path / "nowhere" / "a")},
                )
            )
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("composing")
def test_the_same_numbers_as_csv_latex_and_pictures(copy: Path, changes: list[str], tmp_path: Path) -> None:
    more = {"csv": str(tmp_path / "t.csv"), "latex": str(tmp_path / "t.tex"), "pictures": Pictures.svg}
    page = run(
        copy, changes, tmp_path, sizes=[Size.small], rows=["variational", "variational_mc", "none"], **more
    )
    records = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert [(r["experiment"], r["seeds"]) for r in records] == [
        ("table1_small_none", ""),
        *((f"table1_small_{row}", seed) for row in ("variational", "variational_mc") for seed in ("1", "2")),
    ]
    assert [float(r["test_ppl"]) for r in records[1:3]] == [
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
def test_a_row_that_is_none_is_told() -> None:
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
        kept = [line for line in lines if not line.strip().startswith(("p_x", "p_h", "p_out"))]
        (there / "config.yaml").write_text(
            "\n".join(f"  p_c: {value}" if line.strip().startswith("p_c") else line for line in kept)
        )
    (told,) = table.choices([tmp_path / "choices"])
    assert (
        "- `dropout.p_c` (moon, lstm_small, 2 epochs): 0.25: 118.25, 0.5: 120.50; the lowest at 0.25" in told
    )
    assert table.choices([tmp_path / "none"]) == []


@pytest.mark.skipif(RECORDS is None, reason="a source distribution holds no records")
def test_shipped_records_count_wherever_the_outputs_are(vdrop: Vdrop, tmp_path: Path) -> None:
    """From another working folder: the page is written beside the outputs, and is that of the checkout but
    for its pictures.
    """
    ran = vdrop("table", "outputs=elsewhere", "pictures=none")
    assert ran.returncode == 0, ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    page = (tmp_path / "elsewhere" / "RESULTS.md").read_text()
    assert results_page.measured(page) == results_page.measured((ROOT / "RESULTS.md").read_text())
    assert len(results_page.measured(page)[0]) > 10 and results_page.chosen(page)
    assert (
        page.partition(results_page.FINDINGS)[2].strip()
        == (ROOT / "outputs" / "record" / "findings.md").read_text().strip()
    )


def test_the_page_is_that_of_the_checkout_only_for_its_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it holds records or not."""
    monkeypatch.chdir(ROOT)
    assert results_page.path_of(None, "outputs") == Path("RESULTS.md") and results_page.path_of(
        "a.md", "outputs"
    ) == Path("a.md")
    assert results_page.path_of(None, str(tmp_path)) == tmp_path / "RESULTS.md"
    monkeypatch.chdir(tmp_path)
    assert results_page.path_of(None, "outputs") == Path("outputs/RESULTS.md")
    assert results_page.path_of(None, str(ROOT / "outputs")).resolve() == ROOT / "RESULTS.md"
    monkeypatch.setattr(results_page, "IS_CHECKOUT", False)
    assert results_page.path_of(None, str(ROOT / "outputs")) == ROOT / "outputs" / "RESULTS.md"


@pytest.mark.usefixtures("composing")
def test_shipped_records_are_not_copied_to_other_outputs(
    outputs: Path, changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "checkout" / "outputs"
    shutil.copytree(outputs / "train", shipped / "train")
    run(shipped, changes, tmp_path, sizes=[Size.small], record=True)
    for module in (table, results_page):
        monkeypatch.setattr(module, "RECORDS", shipped / "record")
    page = run(tmp_path / "elsewhere", changes, tmp_path / "checkout", sizes=[Size.small], record=True)
    assert results_page.measured(page)[0] and not list((tmp_path / "elsewhere").rglob("result.json"))


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
    for new, told in (
        (whole.replace("## Findings", ""), "the section Findings"),
        (whole.replace("All runs with `", "All runs with `seed=1 "), "runs with "),
        (whole.replace(tied, tied.replace("| 1 2 |", "| 1 |")), "(seed 2)"),
        (whole.replace(tied, re.sub(r"[0-9.]+ ± [0-9.]+", "–", tied)), "(valid, exact, test)"),
        (whole.replace(tied, f"{tied}\n{tied.replace('| 1 2 |', '| 3 |')}"), ""),
        (whole.replace("## Large", "## More"), ""),
    ):
        found = results_page.lost_numbers(whole, new)
        assert [told in one for one in found] == ([True] if told else []), found
        assert not told or new != whole


@pytest.mark.skipif(RECORDS is None, reason="a source distribution holds no records")
def test_each_number_of_the_page_of_the_checkout_can_be_lost() -> None:
    whole = (ROOT / "RESULTS.md").read_text()
    assert results_page.lost_numbers(whole, whole) == []
    rows = results_page.measured(whole)[0]
    assert any("Ratings of film reviews" in name for name in rows) and any(
        "Variational (tied weights)" in name for name in rows
    )
    lines = [
        line
        for line in whole.split(f"\n{results_page.FINDINGS}")[0].splitlines(keepends=True)
        if line.startswith("| ")
    ]
    of_runs = [
        line
        for line in lines
        if any(name[-1] in line and not re.search("not yet run", line) for name in rows) and "`" not in line
    ]
    assert len(of_runs) > len(rows)
    for line in of_runs:
        if not line.startswith(("| row |", "| cell |", "| Row |")):
            assert results_page.lost_numbers(whole, whole.replace(line, "", 1)), line
    assert results_page.lost_numbers(whole, "") and results_page.lost_numbers("", whole) == []
    more_seeds = whole.replace("| naive | 24 ± 0 |", "| naive | 25 ± 2 |")
    assert more_seeds != whole and results_page.lost_numbers(whole, more_seeds) == [], (
        "the mean of the epochs may change"
    )
    assert results_page.lost_numbers(whole, re.sub("^- `dropout.p_c` .*\n", "", whole, flags=re.MULTILINE))


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
    table.require_that_it_can_be_written(Table(file=str(tmp_path / "R.md"), **more))  # over its own
    assert all("Variational" in (tmp_path / file).read_text() for file in ("R.md", "t.csv", "t.tex"))


@pytest.mark.usefixtures("composing")
def test_a_campaign_refuses_before_it_begins(outputs: Path, changes: list[str], tmp_path: Path) -> None:
    (tmp_path / "R.md").write_text("# Mine\n")
    asked = Reproduce(
        [Size.small],
        ["untied"],
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
    rows = experiments.rows([Size.small], ["variational", "variational_mc", "untied"], "")
    table.require_that_it_can_be_written(
        page, table.Work(Figures(), rows, [])
    )  # rows that will be made again are not lost
    with pytest.raises(
        ConfigError, match=r"would lose numbers of Small \(200 units\) Variational \(tied weights, MC\); give"
    ):
        table.require_that_it_can_be_written(page, table.Work(Figures(), [rows[0], rows[2]], []))


@pytest.mark.usefixtures("composing")
def test_a_record_takes_the_place_of_no_link(copy: Path, changes: list[str], tmp_path: Path) -> None:
    run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"], record=True)
    (there,) = (copy / "record" / "table1").glob("*/s1")
    (there / "notes.txt").write_text("mine")
    (there / "eval-notes.json").write_text("mine")
    shutil.move(there / "log.jsonl", tmp_path / "theirs")
    (there / "log.jsonl").symlink_to(tmp_path / "theirs")
    held = (tmp_path / "theirs").read_bytes()
    with pytest.raises(ConfigError, match=r"s1/log\.jsonl would be overwritten"):
        run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"], record=True)
    (there / "log.jsonl").unlink()
    run(copy, changes, tmp_path, sizes=[Size.small], rows=["untied"], record=True)
    assert (tmp_path / "theirs").read_bytes() == (there / "log.jsonl").read_bytes() == held
    assert (there / "notes.txt").read_text() == (there / "eval-notes.json").read_text() == "mine"
