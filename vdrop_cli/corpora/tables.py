"""Tables in text files: CSV as RFC 4180 has it, and TSV, where quotation marks are text. A row that does not
fit the header is an error.

Lines are counted as an editor counts them; a quoted field may hold several.
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


class Row(NamedTuple):
    line: int  # where it begins
    fields: list[str]  # none in a blank line


def delimiter_of(name: str) -> str:
    """That of a file by its name: a tab in a .tsv, which may be compressed, else a comma."""
    return TAB if ".tsv" in map(str.lower, PurePath(name).suffixes) else ","


class Table:
    """A text whose first row names the columns. `where` is what an error names; `settable`: whether
    `data.delimiter` can be set for it.
    """

    def __init__(self, text: str, delimiter: str, where: str, settable: bool = True) -> None:
        self.text, self.delimiter, self.where, self.settable = text, delimiter, where, settable
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
        text, place, line, begin, fields = self.text, 0, 1, 1, list[str]()
        while True:
            found = field.match(text, place)
            if found is None:
                raise self.misquoted(place)
            quoted, plain, end = found.groups()
            fields.append(plain if quoted is None else quoted.replace('""', '"'))
            line += line_ends(quoted) if quoted else 0
            place = found.end()
            if end != self.delimiter:
                is_blank = len(fields) == 1 and quoted is None and not plain.strip(" ")
                yield Row(begin, fields if not is_blank else [])
                if place == len(text):
                    return
                line += 1
                begin, fields = line, []

    def misquoted(self, place: int) -> ConfigError:
        """What is wrong with the field that begins there."""
        begin, closed = self.line_at(place), re.compile(QUOTED).match(self.text, place)
        if begin == 1 and (separator := self.another_separator()):
            return separator
        if not self.text.startswith('"', place):
            told = (
                "holds a quotation mark in a field that does not begin with one; put the field in "
                "quotation marks, and double those in it"
            )
        elif closed is None:
            told = (
                "begins a field with a quotation mark that is never closed; close it, or double it and "
                "put the field in quotation marks"
            )
        else:
            end = self.line_at(closed.end())
            told = (
                f"begins a quoted field after which {self.text[closed.end() :][:20]!r} follows in line "
                f"{end}; "
                "quotation marks in a quoted field are doubled"
            )
        return ConfigError(f"{self.where}: line {begin} {told}")

    def place(self, name: str, setting: str) -> int:
        """Of a column among the fields of a row."""
        if name not in self.names and (separator := self.another_separator(name)):
            raise separator
        require_column(name, self.names, setting, self.where)
        return self.names.index(name)

    def another_separator(self, name: str | None = None) -> ConfigError | None:
        """Where the header has columns, or the one of that name, if another sign separates them."""
        advice = (
            """give 'data.delimiter="{}"'"""
            if self.settable
            else "write the file with commas, or with tabs as .tsv"
        )
        header = LINE_END.split(self.text, maxsplit=1)[0]
        for other, spoken in DELIMITERS.items():
            names = [field.strip(' "') for field in header.split(other)]
            if other != self.delimiter and len(names) > 1 and name in (None, *names):
                return ConfigError(
                    f"{self.where} has {spoken} between its columns, it was read with "
                    f"{DELIMITERS.get(self.delimiter, self.delimiter)}; "
                    f"{advice.format(other if other != TAB else 'tab')}"
                )
        return None

    def rows(self) -> Iterator[Row]:
        """All but the header. Blank lines are allowed at the end alone."""
        blank = None
        for row in self.all_rows:
            if not row.fields:
                blank = blank or row.line
                continue
            if blank is not None:
                raise ConfigError(
                    f"{self.where}: line {blank} is blank; take it out, or give it "
                    f"{field_count(len(self.names))}, as the header has"
                )
            if len(row.fields) != len(self.names):
                separator = DELIMITERS.get(self.delimiter, repr(self.delimiter))
                told = "cannot be in such a file" if self.delimiter == TAB else "are put in quotation marks"
                raise ConfigError(
                    f"{self.where}: line {row.line} has {field_count(len(row.fields))}, its header "
                    f"{len(self.names)}; "
                    f"fields that hold {separator} {told}"
                )
            yield row


class Lines:
    """A text as a table: each line is a row of the one column `text`."""

    names = ("text",)

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where

    def place(self, name: str, setting: str) -> int:
        require_column(name, self.names, setting, self.where)
        return 0

    def rows(self) -> Iterator[Row]:
        return (Row(number, [line]) for number, line in enumerate(lines(self.text), 1))


def field_count(count: int) -> str:
    """So many, for a person."""
    return f"{count} field{'s' if count != 1 else ''}"


def require_column(name: str | None, names: Sequence[str], setting: str, where: str) -> None:
    """Raises ConfigError where `name`, which a setting gave, is not one of the names of columns."""
    if name not in names:
        raise ConfigError(
            f"{setting}={shown(name)} is not a column of {where}; there are "
            f"{', '.join(map(shown, names)) or 'none'}"
        )


def shown(name: str | None) -> str:
    """A column's name so that it can be told from others: quoted where it is not words alone."""
    return str(name) if name and re.fullmatch(r"\w([\w .-]*\w)?", name) else repr(name)
