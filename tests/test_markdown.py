"""Pieces of a page."""

from pathlib import Path

from vdrop_cli import markdown


def test_a_table_has_a_rule_below_its_headings() -> None:
    assert (
        markdown.table(("a", "b"), [("1", "2"), ("3", "4")])
        == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"
    )


def test_a_picture_is_found_from_where_the_page_lies() -> None:
    assert markdown.picture("It", Path("outputs/a.png"), Path("RESULTS.md")) == "![It](outputs/a.png)"
    assert markdown.picture("It", Path("outputs/a.png"), Path("pages/R.md")) == "![It](../outputs/a.png)"


def test_a_mean_has_a_deviation_where_there_are_several_values() -> None:
    assert [markdown.mean(values, 2) for values in ([], [1.0], [1.0, 3.0])] == ["–", "1.00", "2.00 ± 1.41"]
    assert markdown.mean([1e12, 3e12], 2) == "2.00e+12 ± 1.41e+12", "not in full"


def test_numbers_that_follow_each_other_are_a_range() -> None:
    assert [markdown.ranges(numbers) for numbers in ([], [3], [3, 1, 2], [1, 2, 4, 6, 7, 8])] == [
        "",
        "3",
        "1–3",
        "1–2 4 6–8",
    ]
