"""Tables in text files: CSV as RFC 4180 has it, and TSV, where quotation marks are text. A row that does not fit the header is an error.

Lines are counted as an editor counts them; a quoted field may hold several.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vdrop_cli import files
from vdrop_cli.config import ConfigError
from vdrop_cli.files import Damaged

TAB = "\t"
DELIMITERS = {",": "a comma", ";": "a semicolon", TAB: "a tab", "|": "a vertical bar"}
LINE_END = r"\r\n?|\n"
QUOTED = r'"([^"]*+(?:""[^"]*+)*+)"'


class Row(NamedTuple):
    line: int  # where it begins
    fields: list[str]


class Table:
    """A file whose first row names the columns. `setting` is what named the file; `delimiter` None: a comma, or a tab in a .tsv."""

    def __init__(self, path: Path, delimiter: str | None, setting: str) -> None:
        self.path, self.where = path, f"{setting}={path}"
        self.delimiter = delimiter or (TAB if path.suffix.lower() == ".tsv" else ",")
        self.text = self.read()
        self.all_rows = self.split_by_tabs() if self.delimiter == TAB else self.split_as_csv()
        self.names = next(self.all_rows).fields if self.text else []
        repeated = [name for name, count in Counter(self.names).items() if count > 1 and name]
        if repeated:
            raise ConfigError(f"{self.where}: line 1 names more than one column {repeated[0]!r}; give each a name of its own")

    def read(self) -> str:
        try:
            content = files.read(self.path).removeprefix(b"\xef\xbb\xbf")
            text = content.decode("utf-8")
        except OSError as error:
            raise ConfigError(f"{self.where} cannot be read ({error.strerror}); name a CSV file") from None
        except Damaged as reason:
            raise ConfigError(f"{self.where} cannot be read ({reason}); name a CSV file") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.where} is not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8") from None
        if "\0" in text:
            raise ConfigError(
                f"{self.where}: line {self.line_at(text, text.index(chr(0)))} holds NUL, as no text does; convert it to UTF-8"
            )
        return text

    @staticmethod
    def line_at(text: str, place: int) -> int:
        return 1 + len(re.findall(LINE_END, text[:place]))

    def split_by_tabs(self) -> Iterator[Row]:
        lines = re.split(LINE_END, self.text)
        for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
            yield Row(number, line.split(TAB))

    def split_as_csv(self) -> Iterator[Row]:
        by = re.escape(self.delimiter)
        field = re.compile(rf'(?:{QUOTED}|([^"{by}\r\n]*+))({by}|{LINE_END}|\Z)')
        text, place, line, begin, fields = self.text, 0, 1, 1, list[str]()
        while True:
            found = field.match(text, place)
            if found is None:
                raise self.misquoted(place)
            quoted, plain, end = found.groups()
            fields.append(plain if quoted is None else quoted.replace('""', '"'))
            line += len(re.findall(LINE_END, quoted)) if quoted else 0
            place = found.end()
            if end != self.delimiter:
                yield Row(begin, fields)
                if place == len(text):
                    return
                line += 1
                begin, fields = line, []

    def misquoted(self, place: int) -> ConfigError:
        """What is wrong with the field that begins there."""
        begin, closed = self.line_at(self.text, place), re.compile(QUOTED).match(self.text, place)
        if begin == 1 and (separator := self.another_separator()):
            return separator
        if not self.text.startswith('"', place):
            told = (
                "holds a quotation mark in a field that does not begin with one; put the field in quotation marks, and double those in it"
            )
        elif closed is None:
            told = "begins a field with a quotation mark that is never closed; close it, or double it and put the field in quotation marks"
        else:
            end = self.line_at(self.text, closed.end())
            told = (
                f"begins a quoted field after which {self.text[closed.end() :][:20]!r} follows in line {end}; "
                "quotation marks in a quoted field are doubled"
            )
        return ConfigError(f"{self.where}: line {begin} {told}")

    def place(self, name: str, setting: str) -> int:
        """Of a column among the fields of a row."""
        if name in self.names:
            return self.names.index(name)
        if separator := self.another_separator(name):
            raise separator
        raise ConfigError(
            f"{setting}={shown(name)} is not a column of {self.path}; there are {', '.join(map(shown, self.names)) or 'none'}"
        )

    def another_separator(self, name: str | None = None) -> ConfigError | None:
        """Where the header has columns, or the one of that name, if another sign separates them."""
        header = re.split(LINE_END, self.text, maxsplit=1)[0]
        for other, spoken in DELIMITERS.items():
            names = [field.strip(' "') for field in header.split(other)]
            if other != self.delimiter and len(names) > 1 and name in (None, *names):
                return ConfigError(
                    f"{self.where} has {spoken} between its columns, it was read with {DELIMITERS.get(self.delimiter, self.delimiter)}; "
                    f"""give 'data.delimiter="{other if other != TAB else "tab"}"'"""
                )
        return None

    def rows(self) -> Iterator[Row]:
        """All but the header. Blank lines are allowed at the end alone."""
        blank = None
        for row in self.all_rows:
            if len(row.fields) == 1 and not row.fields[0].strip(" "):
                blank = blank or row.line
                continue
            if blank is not None:
                raise ConfigError(
                    f"{self.where}: line {blank} is blank; take it out, or give it {len(self.names)} fields as the header has"
                )
            if len(row.fields) != len(self.names):
                raise ConfigError(
                    f"{self.where}: line {row.line} has {len(row.fields)} field{'s' if len(row.fields) != 1 else ''}, its header "
                    f"{len(self.names)}; fields that hold {DELIMITERS.get(self.delimiter, repr(self.delimiter))} "
                    f"{'cannot be in such a file' if self.delimiter == TAB else 'are put in quotation marks'}"
                )
            yield row


def shown(name: str | None) -> str:
    """A column's name so that it can be told from others: quoted where it is not words alone."""
    return str(name) if name and re.fullmatch(r"\w([\w .-]*\w)?", name) else repr(name)
