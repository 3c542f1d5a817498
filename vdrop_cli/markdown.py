"""Pieces of a page such as RESULTS.md."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows))


def picture(title: str, path: Path, page: Path) -> str:
    """As the page shows it that lies at `page`."""
    return f"![{title}]({Path(os.path.relpath(path, page.parent)).as_posix()})"


def mean(values: Sequence[float], digits: int) -> str:
    """And deviation where there are several."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}" if values else "–"


def ranges(numbers: Iterable[int]) -> str:
    """Such as 1–4 6 8–11."""
    found = list[list[int]]()
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return " ".join(
        f"{of_range[0]}–{of_range[-1]}" if len(of_range) > 1 else str(of_range[0]) for of_range in found
    )
