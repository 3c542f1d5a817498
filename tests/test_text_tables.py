"""Tables fit the terminal."""

import csv
import io

from vdrop_cli.text_tables import aligned, fitted, write_csv_row


def test_a_table_is_transposed_only_where_that_makes_it_narrower() -> None:
    rows = [["", "a long heading", "another long heading"], ["x", "1", "2"]]
    assert fitted(rows, 80) == [
        "   a long heading  another long heading",
        "x               1                     2",
    ]
    assert fitted(rows, 10)[0].split() == ["x"]
    narrow = [list(column) for column in zip(*rows, strict=True)]
    assert fitted(narrow, 10) == aligned(narrow)


def test_rows_of_csv_come_back_whatever_their_fields_hold() -> None:
    rows = [["a", "b"], ["x\ry", "1"], ["x\ny", "2"], ['"x", y', "3"], ["x\r\ny", ""]]
    stream = io.StringIO(newline="")
    for row in rows:
        write_csv_row(stream, row)
    stream.seek(0)
    assert list(csv.reader(stream)) == rows
    assert stream.getvalue().startswith("a,b\n"), "plain fields are not quoted"
