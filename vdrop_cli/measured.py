"""What an evaluation measures: metrics by name, and tables with details."""

from typing import NamedTuple

from vdrop_cli.assessment import Assessment, Row


class Measured(NamedTuple):
    """The metrics and tables of an evaluation.

    `metrics` are single numbers by name. `tables` are lists of rows by the name of the table; the table `mc`
    has the error by the number of passes.
    """

    metrics: dict[str, float]
    tables: dict[str, list[Row]]
    assessment: Assessment | None = None  # of ratings
