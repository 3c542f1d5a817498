"""The results of an evaluation as a terminal shows them: metrics, then tables."""

from collections.abc import Mapping
from typing import Any

from vdrop_cli.assessment import LEVEL, Row
from vdrop_cli.metric_names import OTHER_TEXT, TEXTS, decimals, in_digits, metric_line
from vdrop_cli.settings.choices import Interval
from vdrop_cli.text_tables import Rows, aligned

TITLES = {
    "reliability": "{part} tokens by the probability of the most probable word",
    "positions": "{part} tokens by their position in the sentence",
    "frequencies": "{part} tokens by how often the training text has the word",
    "factors": "perplexity of the validation text by the factor on dropout probabilities",
    "calibration": "share of test ratings in intervals, by their level in %",
    "intervals": f"width and interval score of the intervals of {LEVEL} %, and calibration error",
    "groups": f"test RMSE, and share of ratings in intervals of {LEVEL} %, by group",
    "selective": "test RMSE of the most certain texts, by their share in %: by standard deviation,\n"
    "by length, and by the error itself, which is the lowest possible",
}


def print_results(results: dict[str, Any], interval: Interval | None = None) -> None:
    """Prints metrics and tables; of the kinds of interval only `interval`, or all where it is None."""
    for metric, value in results["metrics"].items():
        print(metric_line(metric, value))
    part = evaluated_part(results)
    if "mc" in results:
        print_passes(results["mc"], part)
    for name, rows in results.get("tables", {}).items():
        if shown := without_other_intervals(rows, interval):  # a kind of interval may be left out
            print(f"\n{title(name, part)}")
            print("\n".join(aligned(cells(shown))))


def evaluated_part(results: Mapping[str, Any]) -> str:
    """Returns the first part of metric names: "test", or "file" where another text was evaluated."""
    return OTHER_TEXT if "file" in results else "test"


def title(table: str, part: str) -> str:
    """Returns the title of a table of `evaluated_part`; of MC samples where its name ends in _mc."""
    name = table.removesuffix("_mc")
    return TITLES[name].format(part=TEXTS[part]) + (", MC samples averaged" if name != table else "")


def print_passes(rows: list[Row], part: str) -> None:
    """Prints the table of the error by number of passes."""
    measure = next(key for key in rows[0] if key not in ("samples", "deviation", "groups"))
    digits = 2 if measure == "ppl" else 4
    print(f"\n{'MC samples':<24}{part}_{measure}  standard deviation over groups of samples")
    for row in rows:
        spread = "        –"
        if row["deviation"] is not None:
            spread = f"{in_digits(row['deviation'], digits):>9} of {row['groups']}"
        print(f"{row['samples']:<24}{in_digits(row[measure], digits):>8} {spread}")


def without_other_intervals(rows: list[Row], interval: Interval | None) -> list[Row]:
    """Returns rows without the columns and rows of other kinds of interval; None: all of them."""
    others = {str(kind) for kind in Interval} - {str(interval)} if interval is not None else set()
    return [
        {key: value for key, value in row.items() if key not in others}
        for row in rows
        if row.get("intervals") not in others
    ]


def cells(rows: list[Row]) -> Rows:
    """Returns the headings, and a line for each row; – where a value is missing."""
    columns = list(rows[0])
    return [columns, *([cell(row[column]) for column in columns] for row in rows)]


def cell(value: str | int | float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return in_digits(value, decimals(value))
    return f"{value:,}" if isinstance(value, int) else value
