"""Two columns of a table: CSV files, and data sets of the Hub's library, here in folders of this machine."""

from pathlib import Path

import pytest

from vdrop_cli import corpora
from vdrop_cli.config import ConfigError, Data, Source


def from_csv(path: Path, content: str | bytes, column: str = "text", rating: str = "stars") -> corpora.Rated:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return corpora.rated(Data(Source.text_regression, csv=str(path), column=column, rating_column=rating))


ROWS = [(f"Film {n}, {'good' if n % 2 else 'bad'}", n / 2) for n in range(12)]


@pytest.mark.parametrize(("name", "separator", "mark"), [("a.csv", ",", ""), ("a.tsv", "\t", ""), ("a.csv", ",", "\ufeff")])
def test_a_file_of_columns(tmp_path: Path, name: str, separator: str, mark: str) -> None:
    lines = ["stars,other,text".replace(",", separator), *(separator.join((str(stars), "x", f'"{text}"')) for text, stars in ROWS)]
    rated = from_csv(tmp_path / name, mark + "\n".join(lines))
    assert rated.ratings == [n / 2 for n in range(12)] and not rated.parts
    assert rated.texts[3] == ["film", "3", ",", "good"] and rated.origin == str(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,stars\n" + "a,1\n" * 5 + "b,many\n" + "c,2\n" * 9, r"^data\.csv=.*: line 7 holds 'many', which is no rating"),
        ("text,stars\n" + "a,1\n" * 5 + "b\n" + "c,2\n" * 9, r"^data\.csv=.*: line 7 holds 'None', which is no rating"),
        ("words,stars\na,1\n", r"^data\.column=text is not a column of .*; there are words, stars"),
        ("text,points\na,1\n", r"^data\.rating_column=stars is not a column of .*; there are text, points"),
        ("", r"^data\.column=text is not a column of .*; there are none"),
        (b"text,stars\n\xff,1\n", r"^data\.csv=.* is not UTF-8 \(invalid start byte at byte 11\); convert the file"),
        ('text,stars\n"a" b,1\n', r"^data\.csv=.*: line \d is not as in a CSV file .*; quotes within quotes are doubled"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_csv(tmp_path / "a.csv", content)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.csv=.*none\.csv cannot be read"):
        corpora.rated(Data(Source.text_regression, csv=str(tmp_path / "none.csv"), column="a", rating_column="b"))


def on_hub(folder: Path, *splits: str, rating: str = "stars") -> corpora.Rated:
    import datasets

    folder.mkdir()
    for number, split in enumerate(splits):
        rows = [(f"{split} {text}", stars + number) for text, stars in ROWS]
        table = {"text": [text for text, _ in rows], "stars": [stars for _, stars in rows]}
        datasets.Dataset.from_dict(table).to_csv(str(folder / f"{split}.csv"))
    return corpora.rated(Data(Source.text_regression, name=str(folder), column="text", rating_column=rating))


def test_a_data_sets_own_parts_are_kept(tmp_path: Path) -> None:
    rated = on_hub(tmp_path / "set", "train", "validation", "test")
    assert [(part, rated.parts.count(part)) for part in ("train", "valid", "test")] == [("train", 12), ("valid", 12), ("test", 12)]
    assert all(text[0].replace("validation", "valid") == part for text, part in zip(rated.texts, rated.parts, strict=True))
    assert rated.ratings[:2] == [0, 0.5]


def test_a_data_set_in_one_piece_has_no_parts(tmp_path: Path) -> None:
    rated = on_hub(tmp_path / "set", "train")
    assert len(rated.texts) == 12 and rated.parts == []


def test_a_data_set_without_a_part_to_test_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.name=.* has no split test beside train and validation"):
        on_hub(tmp_path / "set", "train", "validation")


def test_a_long_text_is_a_text_too(tmp_path: Path) -> None:
    rated = from_csv(tmp_path / "a.csv", "text,stars\n" + "".join(f"{'a ' * 70_000},{n}\n" for n in range(10)))
    assert len(rated.texts[0]) == 70_000


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.rating_column=points is not a column of .*; there are text, stars"):
        on_hub(tmp_path / "set", "train", rating="points")
