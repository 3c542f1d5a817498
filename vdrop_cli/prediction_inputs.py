"""Texts to predict from: as lines, a table or JSON objects.

They come from the command line, a file or standard input.
"""

import codecs
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from vdrop_cli import stored
from vdrop_cli.corpora.tables import TAB, Table, field_count, require_column
from vdrop_cli.corpora.text import lines as lines_of
from vdrop_cli.corpora.text import read_file
from vdrop_cli.errors import ConfigError
from vdrop_cli.files import Damaged, printable
from vdrop_cli.settings.choices import InputFormat
from vdrop_cli.settings.commands import Predict

COLUMN = "text"  # default name of the column with the texts
UNDECODED = "surrogateescape"  # preserves bytes that are not UTF-8, until `decoded` reports them
SHOWN = 60  # characters of a text in the table
ENDINGS = {
    ".csv": InputFormat.csv,
    ".tsv": InputFormat.tsv,
    ".json": InputFormat.jsonl,
    ".jsonl": InputFormat.jsonl,
    ".ndjson": InputFormat.jsonl,
}


@dataclass(frozen=True)
class Line:
    """One text to predict from, which becomes a row of the output.

    `number` is the number of its first line in the input, from 1.
    """

    number: int
    text: str | None  # None: it could not be read
    problem: str | None = None  # why nothing can be predicted from it
    fields: dict[str, Any] | None = None  # all columns of its row in the input; None: a plain line

    @property
    def is_blank(self) -> bool:
        """Whether the text was read and has no words."""
        return self.text is not None and not self.text.strip()

    @property
    def row(self) -> dict[str, Any]:
        """Returns the columns of the output's row that come before those of the prediction."""
        plain = {"text": "" if self.is_blank else self.text}
        fields = plain if self.fields is None else self.fields
        return {"line": self.number} | fields | ({"error": self.problem} if self.problem else {})

    @property
    def shown(self) -> str:
        """Returns the text in one line of at most `SHOWN` characters, then its problem, if there is one."""
        if self.is_blank:
            return "(blank line)"
        return shortened(self.text or "") + (f" ({self.problem})" if self.problem else "")


def shortened(text: str) -> str:
    """Returns the text in one line of at most `SHOWN` characters."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def origin(settings: Predict) -> str:
    """Returns where the texts are from, for messages."""
    if settings.text is not None:
        return "text"
    return "standard input" if settings.file is None else f"file={settings.file}"


def lines(settings: Predict) -> list[Line]:
    """Returns the texts to predict from.

    A text on the command line is line 1, whatever it contains. Otherwise the texts are those of the file or
    of standard input. Raises ConfigError where no text exists, or where the texts cannot be read.
    """
    if settings.text is not None:
        return [Line(1, settings.text)]
    kind = format_of(settings)
    if kind is InputFormat.lines and settings.column is not None:
        raise ConfigError(
            f"column must be null, {origin(settings)} is read as lines, which have no columns, got "
            f"{settings.column}; give input=csv or input=jsonl if it is such a file"
        )
    if kind is not InputFormat.csv and settings.delimiter is not None:
        raise ConfigError(
            f"delimiter must be null, {origin(settings)} is read as {kind}, got {settings.delimiter!r}; it "
            "is for input=csv"
        )
    text = content_of(settings).removeprefix(codecs.BOM_UTF8).decode(errors=UNDECODED)
    column = COLUMN if settings.column is None else settings.column
    if kind is InputFormat.lines:
        texts = [plain_line(number, line) for number, line in enumerate(lines_of(text), 1)]
    elif kind is InputFormat.jsonl:
        texts = [json_line(number, line, column) for number, line in enumerate(lines_of(text), 1)]
        require_objects_with(column, texts, origin(settings))
    else:
        delimiter = TAB if kind is InputFormat.tsv else settings.delimiter or ","
        advice = """give 'delimiter="{}"' with input=csv"""
        texts = list(table_lines(Table(text, delimiter, origin(settings), advice), column))
    if not texts:
        raise ConfigError(f"{origin(settings)} holds no text; give text=…, or one text a line")
    return texts


def format_of(settings: Predict) -> InputFormat:
    """Returns the format of the input: that of the settings, else by the ending of the file's name."""
    if settings.input is not None or settings.file is None:
        return settings.input or InputFormat.lines
    return ENDINGS.get(PurePath(settings.file).suffix.lower(), InputFormat.lines)


def content_of(settings: Predict) -> bytes:
    """Returns the bytes of the file or of standard input. Raises ConfigError where they cannot be read."""
    if settings.file is not None:
        return read_file(Path(settings.file), origin(settings), "a text file, or give text=…")
    advice = "give text=… or file=…"
    if sys.stdin is None:
        raise ConfigError(f"there is no standard input; {advice}")
    try:
        if sys.stdin.isatty():
            print("vdrop: type one text per line; Ctrl-D on a new line ends the input", file=sys.stderr)
        return sys.stdin.buffer.read()
    except OSError as error:
        raise ConfigError(f"standard input cannot be read ({error.strerror}); {advice}") from None


def decoded(text: str, whole: str) -> str:
    """Returns `text`, which was decoded with `UNDECODED`. Raises Damaged where it holds bytes that are not
    UTF-8, or NUL, as text in UTF-16 does; `whole` says, in the message, what holds them.
    """
    try:
        plain = text.encode(errors=UNDECODED).decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"not UTF-8, {error.reason} at byte {error.start} of the {whole}; convert it") from None
    if "\0" in plain:
        raise Damaged(f"a NUL character in the {whole}; convert it to UTF-8 (UTF-16 has them), or remove it")
    return plain


def plain_line(number: int, line: str) -> Line:
    """Returns a line of a text file as the text to predict from."""
    try:
        return Line(number, decoded(line, "line"))
    except Damaged as reason:
        return Line(number, None, str(reason))


def table_lines(table: Table, column: str) -> Iterator[Line]:
    """Yields a text for each row below the header; a blank line is a row without values. Raises ConfigError
    where the header cannot be read, or quotation marks leave open where rows end.
    """
    if table.names.count("") > 1:
        raise ConfigError(f"{table.where}: line 1 has more than one column without a name; name them")
    try:
        decoded("".join(table.names), "names")
    except Damaged as reason:
        raise ConfigError(f"{table.where}: line 1 is {reason}") from None
    place = table.column_index(column, "column")
    for number, values in table.all_rows:
        if not values:
            yield Line(number, "", fields=dict.fromkeys(table.names))
            continue
        fields: dict[str, Any] = dict.fromkeys(table.names)
        problems = []
        if len(values) != len(table.names):
            problems = [f"{field_count(len(values))}, the header has {len(table.names)}"]
        else:
            for name, value in zip(table.names, values, strict=True):
                try:
                    fields[name] = decoded(value, f"field {name}")
                except Damaged as reason:
                    problems.append(str(reason))
        text = fields[table.names[place]]
        yield Line(number, None if problems else text, problems[0] if problems else None, fields)


def json_line(number: int, line: str, column: str) -> Line:
    """Returns the text of a line with a JSON object; a blank line is an object without values."""
    fields: dict[str, Any] = {}
    try:
        text = decoded(line, "line")
        if not text.strip():
            return Line(number, "", fields={column: ""})
        fields = stored.parse_json(text.encode())
        try:
            json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            fields = {}
            raise Damaged("it has half of a surrogate pair, which is not text") from None
        except ValueError:
            fields = {}
            raise Damaged("it has a number that is too large") from None
        if column not in fields:
            raise Damaged(f"it has no field {column}")
        if not isinstance(fields[column], str):
            raise Damaged(f"its field {column} is not text")
    except Damaged as reason:
        return Line(number, None, str(reason), fields)
    return Line(number, fields[column], fields=fields)


def require_objects_with(column: str, texts: list[Line], where: str) -> None:
    """Raises ConfigError where there are JSON objects, and none has the field of the texts."""
    names = list(dict.fromkeys(name for line in texts for name in line.fields or {}))
    if names:
        require_column(column, names, "column", where)


def columns(texts: list[Line]) -> list[str]:
    """Returns the names of the input's columns, in order of first appearance."""
    plain = {"text": None}
    return list(
        dict.fromkeys(name for line in texts for name in (plain if line.fields is None else line.fields))
    )
