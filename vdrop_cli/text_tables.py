"""Tables as a terminal shows them."""

from collections.abc import Iterable

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
    """Lines of columns: the first on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]
