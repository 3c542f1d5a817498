"""Tables as a terminal shows them, and rows of CSV files."""

import csv
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

Rows = list[list[str]]  # headings first


def fitted(rows: Rows, columns: int) -> list[str]:
    """The lines of a table, transposed if it is wider than `columns` and narrower when transposed."""
    lines = aligned(rows)
    if width(lines) <= columns:
        return lines
    transposed = aligned([list(column) for column in zip(*rows, strict=True)])
    return transposed if width(transposed) < width(lines) else lines


def width(lines: Iterable[str]) -> int:
    return max(map(len, lines), default=0)


def aligned(rows: Rows) -> list[str]:
    """Returns lines of aligned columns: the first is flush left, all others are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]


def write_csv_row(stream: TextIO, fields: Sequence[Any]) -> None:
    """Writes a row of a CSV file.

    Where a field has a carriage return, all fields are quoted, since some readers end a row there. Python's
    `csv` would quote a field only for a line feed.
    """
    if any("\r" in field for field in fields if isinstance(field, str)):
        csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(fields)
    else:
        csv.writer(stream, lineterminator="\n").writerow(fields)
