"""Tables in text files: CSV by RFC 4180, and TSV, where quotation marks are text.

A row that does not fit the header is an error. Lines are counted as an editor counts them; a quoted field may
have several.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import NamedTuple

from vdrop_cli.corpora.text import LINE_END, line_ends, lines
from vdrop_cli.errors import ConfigError

TAB = "\t"
DELIMITERS = {",": "a comma", ";": "a semicolon", TAB: "a tab", "|": "a vertical bar"}
QUOTED = r'"([^"]*+(?:""[^"]*+)*+)"'
DELIMITER_ADVICE = """give 'data.delimiter="{}"'"""  # where another one separates the columns


class Row(NamedTuple):
    line: int  # its first line
    fields: list[str]  # empty for a blank line


def default_delimiter(name: str) -> str:
    """Returns the delimiter that a file's name implies: a tab for .tsv, compressed or not, else a comma."""
    return TAB if ".tsv" in map(str.lower, PurePath(name).suffixes) else ","


class Table:
    """A text whose first row names the columns.

    Errors begin with `where`; `advice` says what to do where other delimiters separate the columns, which {}
    stands for.
    """

    def __init__(self, text: str, delimiter: str, where: str, advice: str = DELIMITER_ADVICE) -> None:
        self.text = text
        self.delimiter = delimiter
        self.where = where
        self.advice = advice
        self.all_rows = self.split_by_tabs() if delimiter == TAB else self.split_as_csv()
        self.names = next(self.all_rows).fields if text else []
        repeated = [name for name, count in Counter(self.names).items() if count > 1 and name]
        if repeated:
            raise ConfigError(
                f"{where}: line 1 names more than one column {repeated[0]!r}; give each a name of its own"
            )

    def line_at(self, place: int) -> int:
        return 1 + line_ends(self.text[:place])

    def split_by_tabs(self) -> Iterator[Row]:
        for number, line in enumerate(lines(self.text), 1):
            yield Row(number, line.split(TAB) if line.strip(" ") else [])

    def split_as_csv(self) -> Iterator[Row]:
        by = re.escape(self.delimiter)
        field = re.compile(rf'(?:{QUOTED}|([^"{by}\r\n]*+))({by}|{LINE_END.pattern}|\Z)')
        text, position = self.text, 0
        line = first_line = 1
        fields: list[str] = []
        while True:
            match = field.match(text, position)
            if match is None:
                raise self.quoting_error(position)
            quoted, plain, end = match.groups()
            fields.append(plain if quoted is None else quoted.replace('""', '"'))
            line += line_ends(quoted) if quoted else 0
            position = match.end()
            if end != self.delimiter:
                is_blank = len(fields) == 1 and quoted is None and not plain.strip(" ")
                yield Row(first_line, fields if not is_blank else [])
                if position == len(text):
                    return
                line += 1
                first_line, fields = line, []

    def quoting_error(self, position: int) -> ConfigError:
        """Returns the error in the field that begins at a position."""
        line, closed = self.line_at(position), re.compile(QUOTED).match(self.text, position)
        if line == 1 and (error := self.separator_error()):
            return error
        if not self.text.startswith('"', position):
            problem = (
                "holds a quotation mark in a field that does not begin with one; put the field in "
                "quotation marks, and double those in it"
            )
        elif closed is None:
            problem = (
                "begins a field with a quotation mark that is never closed; close it, or double it and "
                "put the field in quotation marks"
            )
        else:
            end = self.line_at(closed.end())
            problem = (
                f"begins a quoted field after which {self.text[closed.end() :][:20]!r} follows in line "
                f"{end}; "
                "quotation marks in a quoted field are doubled"
            )
        return ConfigError(f"{self.where}: line {line} {problem}")

    def column_index(self, name: str, setting: str) -> int:
        """Returns the position of a column among the fields of a row."""
        if name not in self.names and (error := self.separator_error(name)):
            raise error
        require_column(name, self.names, setting, self.where)
        return self.names.index(name)

    def separator_error(self, name: str | None = None) -> ConfigError | None:
        """Returns an error where another sign separates columns, with `name` among them, or None."""
        header = LINE_END.split(self.text, maxsplit=1)[0]
        for other, spoken in DELIMITERS.items():
            names = [field.strip(' "') for field in header.split(other)]
            if other != self.delimiter and len(names) > 1 and name in (None, *names):
                return ConfigError(
                    f"{self.where} has {spoken} between its columns, and was read with "
                    f"{DELIMITERS.get(self.delimiter, self.delimiter)}; "
                    f"{self.advice.format(other if other != TAB else 'tab')}"
                )
        return None

    def rows(self) -> Iterator[Row]:
        """Yields all rows but the header; blank lines are allowed at the end alone."""
        blank = None
        for row in self.all_rows:
            if not row.fields:
                blank = blank or row.line
                continue
            if blank is not None:
                raise ConfigError(
                    f"{self.where}: line {blank} is blank; remove it, or give it "
                    f"{field_count(len(self.names))}, as the header has"
                )
            if len(row.fields) != len(self.names):
                separator = DELIMITERS.get(self.delimiter, repr(self.delimiter))
                rule = "cannot be in such a file" if self.delimiter == TAB else "are put in quotation marks"
                raise ConfigError(
                    f"{self.where}: line {row.line} has {field_count(len(row.fields))}, its header "
                    f"{len(self.names)}; fields with {separator} {rule}"
                )
            yield row


class Lines:
    """A text as a table: each line is a row of the only column, `text`."""

    names = ("text",)

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where

    def column_index(self, name: str, setting: str) -> int:
        require_column(name, self.names, setting, self.where)
        return 0

    def rows(self) -> Iterator[Row]:
        return (Row(number, [line]) for number, line in enumerate(lines(self.text), 1))


def field_count(count: int) -> str:
    """Writes a number of fields."""
    return f"{count} field{'s' if count != 1 else ''}"


def require_column(name: str | None, names: Sequence[str], setting: str, where: str) -> None:
    """Raises ConfigError where `name`, the value of a setting, is not among the names of columns."""
    if not names:
        raise ConfigError(f"{where} is empty; its first line must have the names of the columns")
    if name not in names:
        raise ConfigError(
            f"{setting}={shown(name)} is not a column of {where}; choose from {', '.join(map(shown, names))}"
        )


def shown(name: str | None) -> str:
    """Writes a column's name, quoted unless it consists of words."""
    return str(name) if name and re.fullmatch(r"\w([\w .-]*\w)?", name) else repr(name)
