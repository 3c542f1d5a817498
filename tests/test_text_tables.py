"""Tables fit the terminal."""

from vdrop_cli.text_tables import aligned, fitted


def test_a_table_is_transposed_only_where_that_makes_it_narrower() -> None:
    rows = [["", "a long heading", "another long heading"], ["x", "1", "2"]]
    assert fitted(rows, 80) == [
        "   a long heading  another long heading",
        "x               1                     2",
    ]
    assert fitted(rows, 10)[0].split() == ["x"]
    narrow = [list(column) for column in zip(*rows, strict=True)]
    assert fitted(narrow, 10) == aligned(narrow)
