"""Prints rows of predictions as a table, JSON or CSV, and reports problems and unknown words in texts."""

import codecs
import json
import math
import sys
from typing import Any, TextIO

from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.prediction_inputs import Line, columns, origin
from vdrop_cli.settings.choices import OutputFormat
from vdrop_cli.settings.commands import Predict
from vdrop_cli.settings.data import Data
from vdrop_cli.tasks import Predictor, is_unknown_untrained
from vdrop_cli.text_tables import write_csv_row
from vdrop_cli.trained_model import BROKEN_WEIGHTS, TrainedModel


class RowPrinter:
    """Prints a row for each text in the format of the settings: the columns of the input, then those of the
    prediction. A column of the prediction that has the name of one of the input is called `predicted_…`.
    """

    def __init__(self, settings: Predict, texts: list[Line], predicted: tuple[str, ...]) -> None:
        self.format = settings.format
        names = columns(texts)
        self.output_names = {name: name for name in predicted}
        if self.format is not OutputFormat.table:
            self.output_names |= {name: f"predicted_{name}" for name in predicted if name in names}
            output = ("line", *self.output_names.values(), "error")
            twice = [name for name in names if name in output]
            if twice:
                raise ConfigError(
                    f"{origin(settings)} has a column {twice[0]}, as the output has; rename it in the file"
                )
            for name, new in self.output_names.items():
                if new != name:
                    print(
                        f"vdrop: {origin(settings)} has a column {name}, so the predicted one is called "
                        f"{new}",
                        file=sys.stderr,
                    )
        if self.format is OutputFormat.csv:
            self.header = ["line", *names, *self.output_names.values(), "error"]
            if not is_utf8(sys.stdout):  # files with texts are read as UTF-8
                sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
            write_csv_row(sys.stdout, self.header)

    def write(self, line: Line, values: dict[str, Any], shown: str) -> None:
        """Prints the row of a text. `values` are the columns of the prediction, `shown` is the whole row as a
        table has it.
        """
        values = {new: values[name] for name, new in self.output_names.items()}
        if self.format is OutputFormat.table:
            print(shown)
        elif self.format is OutputFormat.json:
            print(as_json(line.row | values))
        else:
            row = line.row | values
            write_csv_row(sys.stdout, [as_cell(row.get(name)) for name in self.header])


def as_cell(value: Any) -> str:
    """Returns a value as CSV has it: text as it is, a missing value empty, all else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_json(row: dict[str, Any]) -> str:
    """Returns a row as one line of JSON; where the terminal has no UTF-8, in ASCII with JSON's escapes."""
    return json.dumps(row, ensure_ascii=not is_utf8(sys.stdout), allow_nan=False)


def is_utf8(stream: TextIO) -> bool:
    return codecs.lookup(stream.encoding or "utf-8").name == "utf-8"


class UnknownWords:
    """Counts words that are not in the vocabulary, over all lines."""

    def __init__(self, predictor: Predictor, data: Data) -> None:
        """`data`: the settings of the training text."""
        self.predictor, self.data = predictor, data
        self.words = 0
        self.unknown = 0

    def count(self, words: list[str]) -> None:
        """Adds the words of a line."""
        self.words += len(words)
        self.unknown += sum(map(self.predictor.is_unknown, words))

    def report(self) -> None:
        """Prints the counts if a word is unknown."""
        if self.unknown:
            print(
                f"vdrop: {self.unknown:,} of {self.words:,} words unknown: the vocabulary of the model does "
                "not have them",
                file=sys.stderr,
            )
            if is_unknown_untrained(self.predictor, self.data):
                print(
                    "vdrop: they are read as the unknown word, which was never trained: the training text "
                    "has none",
                    file=sys.stderr,
                )


class Problems:
    """Lines from which nothing can be predicted.

    Each is reported when it is read. They are an error after all other lines are finished.
    """

    def __init__(self, settings: Predict) -> None:
        self.settings, self.count = settings, 0

    def report(self, line: Line) -> None:
        """Prints why nothing is predicted from a line; raises ConfigError where it is the only text."""
        assert line.problem is not None
        if self.settings.text is not None:
            raise ConfigError(f"text: {line.problem}")
        print(f"vdrop: {origin(self.settings)}, line {line.number}: {line.problem}", file=sys.stderr)
        self.count += 1

    def end(self, lines: int) -> None:
        """Raises ConfigError if a line had a problem, after standard output is flushed."""
        if self.count:
            sys.stdout.flush()
            raise ConfigError(
                f"{origin(self.settings)}: nothing is predicted from {self.count} of {lines} lines; see above"
            )


def require_finite(value: float, what: str, trained: TrainedModel, line: Line) -> float:
    """Returns `value`; raises RunError where it is not finite. `what` names the value in the message."""
    if not math.isfinite(value):
        raise RunError(f"{trained.path}: the {what} of line {line.number} is {value}; {BROKEN_WEIGHTS}")
    return value
