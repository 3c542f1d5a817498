"""The page of results that exists already: whose it is, and which numbers a new one would lose."""

import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from vdrop_cli import IS_CHECKOUT, ROOT, files, ownership, runs
from vdrop_cli.errors import ConfigError

MARK = "Written by `vdrop table`"  # on every page, near its start
PAGE = "RESULTS.md"
REMEDY = "give file= another name, or move this one away"
LABELS = ("row", "cell", "dropout")  # columns that name a row, as far as a table has them
UNMEASURED = ("–", "not yet run")
DERIVED = ("difference",)  # columns that hold nothing measured
SPEED = "words/s"  # a column that is empty as soon as one more run is of another machine or shared its device
Name = tuple[str, ...]  # of a row: the headings that it stands below, and its labels


def path_of(file: str | None, outputs: str) -> Path:
    """Returns the path of the page: `file`, or a file in `outputs`, or one at the root of a checkout."""
    if file is not None:
        return Path(file)
    if IS_CHECKOUT and Path(outputs).resolve() == (ROOT / "outputs").resolve():
        return Path(os.path.relpath(ROOT / PAGE))
    return Path(outputs) / PAGE


def is_page(content: bytes) -> bool:
    """Whether vdrop wrote the page, or the page is empty and has nothing to lose."""
    return not content or MARK.encode() in content[:4000]


def require_own(path: Path) -> None:
    """Raises ConfigError where somebody else's page would be overwritten."""
    ownership.require_own(path, is_page, REMEDY)


def require_nothing_lost(path: Path, new: str, planned: Collection[Name] = ()) -> None:
    """Raises ConfigError if the page at `path` has numbers that the new page lacks. Rows in `planned` are
    exempt: they will get their numbers later.
    """
    require_own(path)
    try:
        old = files.read(path).decode(errors="replace")
    except FileNotFoundError:
        return
    lost = lost_numbers(old, new, planned)
    if lost:
        raise ConfigError(f"{path} would lose numbers of {ownership.first_names(lost, '; ')}; {REMEDY}")


def lost_numbers(old: str, new: str, planned: Collection[Name] = ()) -> list[str]:
    """Returns names of the rows and choices with fewer numbers on the new page than on the old one, except
    planned rows.
    """
    lost = []
    before, old_settings = measured(old)
    after, new_settings = measured(new)
    if before and old_settings != new_settings:
        lost.append(f"runs with {old_settings or 'the published settings'}")
    columns = {heading for _, row in rows(new) for heading in row}
    for name, numbers in before.items():
        if name in planned:
            continue
        if name not in after:
            lost.append(" ".join(name))
            continue
        missing = numbers - after[name]
        counted = (columns - {SPEED}) | {column for column in missing if column.startswith("seed ")}
        fewer = [column for column in missing if column in counted]
        if fewer:
            lost.append(f"{' '.join(name)} ({', '.join(fewer)})")
    lost += [f"the choice of {setting}" for setting in choices(old) if setting not in choices(new)]
    return lost


def rows(page: str) -> list[tuple[Name, dict[str, str]]]:
    """Every row of the tables of runs, by its headings and labels."""
    named_rows: list[tuple[Name, dict[str, str]]] = []
    place: list[str] = []
    names: list[str] = []
    for line in page.splitlines():
        if heading := re.match(r"(##+) (.*)", line):
            place = [*place[: len(heading[1]) - 2], heading[2]]
        cells = [cell.strip() for cell in line.strip()[1:-1].split(" | ")] if line.startswith("| ") else []
        if not cells:
            names = []
        elif not names:
            names = cells
        elif is_of_metrics(names) and len(cells) == len(names) and set(cells) != {"---"}:
            row = dict(zip(names, cells, strict=True))
            named_rows.append(((*place, *(row[label] for label in LABELS if label in row)), row))
    return named_rows


def is_of_metrics(headings: list[str]) -> bool:
    """Whether a table has metrics of runs, and not only how they were made."""
    return "seeds" in headings and bool(set(headings) - {*LABELS, "seeds", *runs.ENVIRONMENT_COLUMNS})


def measured(page: str) -> tuple[dict[Name, Counter[str]], str]:
    """Returns, by row, how many numbers each column has and how often each seed is there; and the settings
    that all runs were made with.
    """
    counts: dict[Name, Counter[str]] = {}
    for name, row in rows(page):
        if row["seeds"] not in UNMEASURED:
            numbers = [
                heading
                for heading, cell in row.items()
                if heading not in (*LABELS, *DERIVED, *runs.ENVIRONMENT_COLUMNS) and re.search(r"\d", cell)
            ]
            counts.setdefault(name, Counter()).update(
                [*numbers, *(f"seed {seed}" for seed in dict.fromkeys(row["seeds"].split()))]
            )
    return counts, next(iter(re.findall(r"All runs with `([^`]*)`", page)), "")


def choices(page: str) -> list[str]:
    """Settings that were chosen on validation, and of which runs, as the page names them."""
    rows_of_choices = re.findall(r"^\| (`[\w.]+`) \| ([^|]+) \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)
    return [f"{setting} ({runs_of})" for setting, runs_of in rows_of_choices]
