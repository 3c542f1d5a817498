"""Table 1 for other programs: CSV, LaTeX, and text for a terminal."""

import csv
import io
import re
from collections.abc import Iterable

from vdrop_cli import runs
from vdrop_cli.studies.study import Column, Line
from vdrop_cli.studies.table1 import COLUMNS, by_headings, compares

ROW: Column = ("row", lambda line: line.row.labels[0])
SEEDS: Column = ("seeds", lambda line: line.seeds or "not yet run")
PRECISION: Column = ("precision", lambda line: line.environment_cells[0] if line.runs else "–")


def columns(*names: str) -> list[Column]:
    """Columns of the page by their headings, between the row and its seeds."""
    by_name = dict(COLUMNS)
    return [ROW, *((name, by_name[name]) for name in names), SEEDS]


def as_text(lines: Iterable[Line]) -> str:
    """Returns the most important columns, aligned for a terminal."""
    shown = columns("valid, published", "valid, as published", "test, published", "test", "words/s")
    shown.append(PRECISION)
    lines = list(lines)
    rows = [[heading for heading, _ in shown], *([cell(line) for _, cell in shown] for line in lines)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(shown))]
    texts = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    by_line = dict(zip(map(id, lines), texts[1:], strict=True))
    parts = [texts[0]]
    for headings, size_lines in by_headings(lines):
        parts.append("\n".join([headings[0], *(by_line[id(line)] for line in size_lines)]))
    return "\n\n".join(parts)


PUBLISHED = (
    "row",
    "source",
    "confirmed",
    "same_settings",
    "valid",
    "valid_deviation",
    "test",
    "test_deviation",
)
MEASURED = (
    "seeds",
    "mc_samples",
    "members",
    "precision",
    "device",
    "date",
    "commit",
    "dirty",
    "valid_ppl_as_published",
    "valid_ppl",
    "test_ppl",
    "words_per_second",
)


def as_csv(lines: Iterable[Line]) -> str:
    """A line for each run, and a line for each row that was not run. Numbers are not rounded."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    names = [*PUBLISHED, "words_per_second"]
    writer.writerow(["experiment", *(f"published_{name}" for name in names), *MEASURED])
    for line in lines:
        reference, how = line.row.reference, line.row.evaluation
        numbers = [part for number in (reference.valid, reference.test) for part in number or (None, None)]
        is_confirmed = reference.source is not None and reference.confirmed
        has_same = reference.source is not None and compares(line.row)
        published = [line.row.labels[0], reference.source, is_confirmed, has_same, *numbers]
        row = [line.row.name, *published, reference.words_per_second]
        for measured in line.runs:
            last = measured.environments[-1]
            made = [last.get(name) for name in ("precision", "device", "date", "commit")]
            metrics = ("valid_as_published", "valid", "test", "words_per_second")
            writer.writerow(
                [
                    *row,
                    *(measured.seeds, how.samples, how.members),
                    *(*made, runs.code_differed(measured.environments)),
                    *(measured.metrics.get(name) for name in metrics),
                ]
            )
        if not line.runs:
            writer.writerow([*row, *[""] * len(MEASURED)])
    return content.getvalue()


def is_csv(content: bytes) -> bool:
    """Whether a file starts as those that `as_csv` makes, or is empty."""
    return not content or content.startswith(b"experiment,published_row,")


def as_latex(lines: Iterable[Line]) -> str:
    """A tabular environment for each size."""
    shown = columns("valid, published", "valid, as published", "test, published", "test")
    parts = []
    for headings, size_lines in by_headings(lines):
        rows = [
            [heading for heading, _ in shown],
            *([cell(line) for _, cell in shown] for line in size_lines),
        ]
        body = "".join("  " + " & ".join(map(escape, row)) + r" \\" + "\n" for row in rows)
        alignment = f"l{'r' * (len(shown) - 1)}"
        parts.append(f"% {headings[0]}\n\\begin{{tabular}}{{{alignment}}}\n{body}\\end{{tabular}}\n")
    return "\n".join(parts)


def is_latex(content: bytes) -> bool:
    """Whether a file starts as those that `as_latex` makes, or is empty."""
    return not content or re.match(rb"% [^\n]+\n\\begin\{tabular\}", content) is not None


def escape(text: str) -> str:
    replacements = (
        ("±", r"$\pm$"),
        ("–", "--"),
        ("†", r"$^\dagger$"),
        ("‡", r"$^\ddagger$"),
        ("&", r"\&"),
        ("_", r"\_"),
    )
    for plain, latex in replacements:
        text = text.replace(plain, latex)
    return text
