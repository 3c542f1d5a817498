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
