"""What an evaluation measures: metrics by name, and tables that say more."""

from typing import NamedTuple

from vdrop_cli.assessment import Assessment, Row


class Measured(NamedTuple):
    """`metrics` are single numbers. `tables` are lists of rows by the table's name, such as `mc`, the error
    by number of passes.
    """

    metrics: dict[str, float]
    tables: dict[str, list[Row]]
    assessment: Assessment | None = None  # of ratings
