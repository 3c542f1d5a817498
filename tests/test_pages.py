"""README and the pages in `docs/`: their links, what they quote, and that README stays two screens."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.processes import ROOT
from tests.studies.test_page import rows_of
from tests.test_records import table_rows
from vdrop_cli import prediction, word_prediction
from vdrop_cli.prediction_inputs import ENDINGS

PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
README_LINES = 120


PICTURES = ROOT / "outputs" / "record" / "pictures"  # which docs/picture_files.py adds to the built pages


def anchors(page: Path) -> set[str]:
    """Of its headings, as they are in a link."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        built = linked.resolve().is_relative_to(ROOT / "docs") or linked.resolve().parent == PICTURES
        assert built or ROOT / "docs" not in page.parents, f"{target} would not be among the built pages"
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_records_that_are_quoted_are_there(page: Path) -> None:
    named = re.findall(r"`((?:outputs/record|conf|vdrop_cli|tests)/[\w./-]*)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_table_ends_with_an_empty_line(page: Path) -> None:
    """Or else what follows becomes a row, and a heading none."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert not re.findall(r"^\|.*\n(?!\||\n|$).*", text, re.MULTILINE)


def test_every_page_is_in_the_menu() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    sections = [content for entry in menu for content in entry.values() if isinstance(content, list)]
    entries = [entry for content in (menu, *sections) for entry in content]
    listed = [path for entry in entries for path in entry.values() if isinstance(path, str)]
    assert sorted(listed) == sorted(
        str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")
    )


def test_readme_is_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_the_table_of_readme_is_that_of_the_results() -> None:
    """Test perplexities, published and measured; the names of rows are those of RESULTS.md."""
    results = (ROOT / "RESULTS.md").read_text()
    small, medium = (
        rows_of(results.partition(f"\n## {size} ")[2].partition("\n## ")[0]) for size in ("Small", "Medium")
    )
    table = table_rows(
        (ROOT / "README.md")
        .read_text()
        .partition("\n## Measured beside published\n")[2]
        .partition("\n## ")[0]
    )
    names = table.keys() - {"row of Table 1", "---"}
    assert len(names) == 6
    for name in names:
        measured = medium[name].get("test", "not yet run")
        assert table[name] == [small[name]["test"], medium[name]["test, published"], measured], name


def test_the_page_of_the_installation_names_all_extras_and_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "install.md").read_text()
    rows = table_cells(page.partition("\n| extra |")[2].partition("\n\n")[0])
    assert [name for cells in rows for name in cells[0]] == [*project["optional-dependencies"]]
    minors = re.findall(r"3\.(\d+)", page.partition("Python ")[2].partition("|")[0])
    assert project["requires-python"] == f">=3.{minors[0]},<3.{int(minors[-1]) + 1}"
    (torch,) = (name for name in project["dependencies"] if name.startswith("torch"))
    assert f"PyTorch {torch.partition('>=')[2]} or newer" in page


def predict_section(heading: str) -> str:
    """A section of the page of predictions, without the sections below it."""
    page = (ROOT / "docs" / "predict.md").read_text()
    return page.partition(f"\n## {heading}\n")[2].partition("\n#")[0]


def test_the_page_of_predictions_names_all_columns_and_endings() -> None:
    columns = {name for cells in table_cells(predict_section("Ratings")) for name in cells[1]}
    assert columns == {*prediction.COLUMNS, "line", "text", "passes", "error"}
    columns = {name for cells in table_cells(predict_section("Language models")) for name in cells[0]}
    rows = {"ppl", "words", "surprises", word_prediction.INFORMATION}
    assert columns == rows | {"word", "read_as", "place", "bits"}
    assert {*re.findall(r"`(\.\w+)`", predict_section("Input"))} == {*ENDINGS}


def table_cells(text: str) -> list[list[list[str]]]:
    """The names in backticks of each cell of the tables' rows."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[re.findall(r"`([a-z_]+)`", cell) for cell in row] for row in rows]


def test_the_prediction_that_is_quoted_is_its_record() -> None:
    """Numbers are rounded; the record has earlier names of two of them."""
    (row,) = re.findall(r'^\{"line": .*', (ROOT / "docs" / "predict.md").read_text(), re.MULTILINE)
    quoted = json.loads(row)
    records = ROOT / "outputs" / "record" / "ratings_predicted" / "predictions.jsonl"
    recorded = json.loads(records.read_text().splitlines()[quoted["line"] - 1])
    names = {"std_model": "deviation", "std_noise": "noise"}
    for name in prediction.COLUMNS:
        assert quoted[name] == round(recorded[names.get(name, name)], 3), name
    assert recorded["text"].startswith(quoted["text"].removesuffix("…"))


def demo_record(name: str) -> dict[str, str]:
    """Test perplexities of the demo by dropout, as the page writes them."""
    _, header, *rows = (ROOT / "outputs" / "record" / name).read_text().splitlines()
    place = header.split().index("test_ppl")  # the first column, of names, has no heading
    return {row: f"{float(cells[place]):.1f}" for row, *cells in map(str.split, rows[:3])}


def test_the_figures_of_the_demo_are_those_of_its_records() -> None:
    text = " ".join((ROOT / "docs" / "index.md").read_text().split()).partition("The demo ends with")[2]
    quoted = re.findall(r"(none|variational|naive) (\d+\.\d)", text.partition(")")[0])
    assert demo_record("demo.txt") == dict(quoted) and len(quoted) == 3
    other = re.findall(r"\d+\.\d", text.partition("an AMD EPYC ends at ")[2].partition("(")[0])
    names = [name for name, _ in quoted]
    assert demo_record("demo_amd_epyc.txt") == dict(zip(names, other, strict=True))
