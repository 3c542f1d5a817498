"""Pieces of a page such as RESULTS.md."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from vdrop_cli.metric_names import in_digits


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown; cells are text."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows))


def picture(title: str, path: Path, page: Path) -> str:
    """Returns the Markdown of the picture at `path`, for the page at `page`."""
    return f"![{title}]({Path(os.path.relpath(path, page.parent)).as_posix()})"


def mean(values: Sequence[float], digits: int) -> str:
    """Returns the mean of the values, and ± their standard deviation where there are several."""
    spread = f" ± {in_digits(stdev(values), digits)}" if len(values) > 1 else ""
    return f"{in_digits(fmean(values), digits)}{spread}" if values else "–"


def ranges(numbers: Iterable[int]) -> str:
    """Returns whole numbers as ranges, such as 1–4 6 8–11."""
    runs = list[list[int]]()
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
