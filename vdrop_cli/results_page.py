"""The page of results that is there already: whose it is, and which numbers a new one would lose."""

import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from vdrop_cli import IS_CHECKOUT, RECORDS, ROOT, files, ownership, runs
from vdrop_cli.errors import ConfigError

MARK = "Written by `vdrop table`"  # on every page, near its start
PAGE = "RESULTS.md"
FINDINGS = "## Findings"
OTHERS = "give file= another name, or move this one away"
LABELS = ("row", "cell", "dropout")  # columns that name a row, as far as a table has them
UNMEASURED = ("–", "not yet run")
Name = tuple[str, ...]  # of a row: the headings that it stands below, and its labels


def path_of(file: str | None, outputs: str) -> Path:
    """Where a page goes: `file`, or beside the outputs; for those of a checkout that is the page at its
    root.
    """
    if file is not None:
        return Path(file)
    if IS_CHECKOUT and Path(outputs).resolve() == (ROOT / "outputs").resolve():
        return Path(os.path.relpath(ROOT / PAGE))
    return Path(outputs) / PAGE


def record_folders(outputs: Path) -> list[Path]:
    """Where records are: those that come with a checkout, then those below `outputs`."""
    shipped = [RECORDS] if RECORDS is not None and (outputs / "record").resolve() != RECORDS else []
    return [*shipped, outputs / "record"]


def is_page(content: bytes) -> bool:
    """Whether vdrop wrote it. An empty one has nothing to lose."""
    return not content or MARK.encode() in content[:4000]


def require_own(path: Path) -> None:
    """Raises ConfigError where somebody else's page would be overwritten."""
    ownership.require_own(path, is_page, OTHERS)


def require_nothing_lost(path: Path, new: str, planned: Collection[Name] = ()) -> None:
    """Raises ConfigError where the page at `path` holds numbers that the new one has not, but for rows that
    are still to get theirs.
    """
    require_own(path)
    try:
        old = files.read(path).decode(errors="replace")
    except FileNotFoundError:
        return
    lost = lost_numbers(old, new, planned)
    if lost:
        more = f" and {len(lost) - ownership.MAX_NAMES} more" if len(lost) > ownership.MAX_NAMES else ""
        raise ConfigError(
            f"{path} would lose numbers of {'; '.join(lost[: ownership.MAX_NAMES])}{more}; {OTHERS}"
        )


def lost_numbers(old: str, new: str, planned: Collection[Name] = ()) -> list[str]:
    """Names of what has numbers on the old page, and fewer on the new one; not of rows that are `planned`."""
    lost = []
    (before, settings), (after, others) = measured(old), measured(new)
    if before and settings != others:
        lost.append(f"runs with {settings or 'the published settings'}")
    columns = {heading for _, row in rows(new) for heading in row}
    for name, numbers in before.items():
        if name in planned:
            continue
        if name not in after:
            lost.append(" ".join(name))
        elif fewer := [of for of in numbers - after[name] if of in columns or of.startswith("seed ")]:
            lost.append(f"{' '.join(name)} ({', '.join(fewer)})")
    lost += [f"the choice of {setting}" for setting in chosen(old) if setting not in chosen(new)]
    if FINDINGS in old and FINDINGS not in new:
        lost.append("the section Findings")
    return lost


def rows(page: str) -> list[tuple[Name, dict[str, str]]]:
    """Every row of the tables of runs, by its headings and labels."""
    found: list[tuple[Name, dict[str, str]]] = []
    place: list[str] = []
    names: list[str] = []
    for line in page.split(f"\n{FINDINGS}\n")[0].splitlines():
        if heading := re.match(r"(##+) (.*)", line):
            place = [*place[: len(heading[1]) - 2], heading[2]]
        cells = [cell.strip() for cell in line.strip()[1:-1].split(" | ")] if line.startswith("| ") else []
        if not cells:
            names = []
        elif not names:
            names = cells
        elif "seeds" in names and len(cells) == len(names) and set(cells) != {"---"}:
            row = dict(zip(names, cells, strict=True))
            found.append(((*place, *(row[label] for label in LABELS if label in row)), row))
    return found


def measured(page: str) -> tuple[dict[Name, Counter[str]], str]:
    """How many numbers rows have in each column, and how often each seed; and the settings that all runs were
    made with.
    """
    found: dict[Name, Counter[str]] = {}
    for name, row in rows(page):
        if row["seeds"] not in UNMEASURED:
            numbers = [
                heading
                for heading, cell in row.items()
                if heading not in (*LABELS, *runs.MADE) and re.search(r"\d", cell)
            ]
            found.setdefault(name, Counter()).update(
                [*numbers, *(f"seed {seed}" for seed in row["seeds"].split())]
            )
    return found, next(iter(re.findall(r"All runs with `([^`]*)`", page)), "")


def chosen(page: str) -> list[str]:
    """Settings whose values were tried, as the page names them."""
    return re.findall(r"^- (`[^`]+` \([^)]*\)): .*; the lowest at ", page, re.MULTILINE)
