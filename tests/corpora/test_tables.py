"""Tables are read as their rows say, or not at all."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdrop_cli.corpora.tables import Table, default_delimiter
from vdrop_cli.corpora.text import decode
from vdrop_cli.errors import ConfigError


def table(folder: Path, content: str | bytes, name: str = "a.csv", delimiter: str | None = None) -> Table:
    where = f"data.csv={folder / name}"
    text = decode(content if isinstance(content, bytes) else content.encode(), where)
    return Table(text, delimiter or default_delimiter(name), where)


def read(
    folder: Path, content: str | bytes, name: str = "a.csv", delimiter: str | None = None
) -> list[tuple[int, list[str]]]:
    return [tuple(row) for row in table(folder, content, name, delimiter).rows()]


def test_quotation_marks_in_tsv_are_text(tmp_path: Path) -> None:
    content = 'stars\ttext\n3\t"good w1\n4\tbad w2\n5\tw3 w4\n2\tsaid good"\n'
    rows = [(2, ["3", '"good w1']), (3, ["4", "bad w2"]), (4, ["5", "w3 w4"]), (5, ["2", 'said good"'])]
    assert (
        read(tmp_path, content, "a.tsv")
        == rows
        == read(tmp_path, content, "A.TSV")
        == read(tmp_path, content, "a.csv", "\t")
    )
    assert (
        read(tmp_path, content.replace("\n", "\r\n"), "a.tsv")
        == rows
        == read(tmp_path, content[:-1], "a.tsv")
    )


def test_csv_is_that_of_rfc_4180(tmp_path: Path) -> None:
    """Quoted fields may hold commas, doubled quotation marks and line ends; lines count as an editor counts
    them.
    """
    content = 'text,stars\r\n"a, ""b""\r\nc",1\r\n,""\r\n d ,2'
    assert read(tmp_path, content) == [(2, ['a, "b"\r\nc', "1"]), (4, ["", ""]), (5, [" d ", "2"])]
    assert read(tmp_path, 'text;stars\n"a;b";1\nc,d;2\n', delimiter=";") == [
        (2, ["a;b", "1"]),
        (3, ["c,d", "2"]),
    ]


@given(
    rows=st.lists(
        st.lists(st.text(alphabet='ab",;\n\r é\u2028', max_size=6), min_size=2, max_size=2), max_size=6
    ),
    end=st.booleans(),
)
def test_what_another_program_writes_is_read_back(
    rows: list[list[str]], end: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, written = tmp_path_factory.getbasetemp(), io.StringIO(newline="")
    csv.writer(written, quoting=csv.QUOTE_ALL).writerows([["text", "stars"], *rows])
    content = written.getvalue() if end else written.getvalue().removesuffix("\r\n")
    assert [fields for _, fields in read(folder, content)] == rows


HEADER = "text,stars\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,1\nb,2,3\n", r"line 3 has 3 fields, its header 2"),
        ("a,1\nb\n", r"line 3 has 1 field, its header 2"),
        ("a,1\n\nb,2\n", r"line 3 is blank"),
        ("a,1\n  \n\nb,2\n", r"line 3 is blank"),
        ('"a\nb",1\nb\n', r"line 4 has 1 field, its header 2"),
        ('a,1\n"b,2\nc,3\n', r"line 3 begins a field with a quotation mark that is never closed"),
        ('a,1\n"b,2\nc,"3"\n', r"line 3 begins a quoted field after which '3\"\\n' follows in line 4"),
        ('"a" b,1\n', r"line 2 begins a quoted field after which ' b,1\\n' follows in line 2"),
        ('a,1\nb "c",2\n', r"line 3 holds a quotation mark in a field that does not begin with one"),
        ('a, "b, c"\n', r"line 2 holds a quotation mark in a field that does not begin with one"),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_its_line(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.csv={tmp_path}/a\.csv: {message}"):
        read(tmp_path, HEADER + content)


def test_a_row_of_a_tsv_that_does_not_fit_is_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"line 3 has 3 fields, its header 2; fields with a tab cannot be in such a file"
    ):
        read(tmp_path, "text\tstars\na\t1\nb\tc\t2\n", "a.tsv")


def test_blank_lines_at_the_end_are_none(tmp_path: Path) -> None:
    assert read(tmp_path, f"{HEADER}a,1\n\n  \n\n") == [(2, ["a", "1"])] == read(tmp_path, f"{HEADER}a,1\r\r")


def test_an_empty_field_alone_is_a_row_where_it_is_quoted(tmp_path: Path) -> None:
    assert read(tmp_path, 'text\na\n""\nb\n""\n\n') == [(2, ["a"]), (3, [""]), (4, ["b"]), (5, [""])]
    with pytest.raises(ConfigError, match=r"line 3 is blank; .* give it 1 field, as the header has"):
        read(tmp_path, "text\na\n\nb\n")


@pytest.mark.parametrize(
    ("separator", "name", "advice"),
    [(";", "a semicolon", ";"), ("\t", "a tab", "tab"), ("|", "a vertical bar", r"\|"), (", ", "", "")],
)
def test_another_separator_is_named(separator: str, name: str, advice: str, tmp_path: Path) -> None:
    if name:
        message = (
            rf"^data\.csv=.* has {name} between its columns, .* with a comma; give "
            rf"'data\.delimiter=\"{advice}\"'"
        )
        with pytest.raises(ConfigError, match=message):
            table(tmp_path, f'id{separator}"stars"{separator}text\n').column_index(
                "stars", "data.rating_column"
            )
        with pytest.raises(ConfigError, match=message):
            table(tmp_path, f"id{separator}stars{separator}text\n").column_index(
                "stars", "data.rating_column"
            )
    else:  # a comma, and names that begin with a blank
        made = table(tmp_path, "id, stars, text\n")
        with pytest.raises(
            ConfigError,
            match=r"^data\.rating_column=stars is not a column of .*; choose from id, ' stars', ' text'$",
        ):
            made.column_index("stars", "data.rating_column")
        assert made.column_index(" stars", "data.rating_column") == 1


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.csv=.*: line 1 names more than one column 'stars'"):
        table(tmp_path, "text,stars,stars\na,1,2\n")
    assert read(tmp_path, ",text,stars,\n0,a,1,\n") == [(2, ["0", "a", "1", ""])], (
        "columns without a name cannot be chosen, nor confused"
    )
