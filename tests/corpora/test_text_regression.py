"""Two columns of a table: CSV files, and data sets of the Hub's library, here in folders of this machine."""

import gzip
import shutil
from pathlib import Path

import pytest

from vdrop_cli import corpora
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.data import RatedTable


def from_csv(path: Path, content: str | bytes, delimiter: str | None = None) -> corpora.Rated:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return corpora.load_rated(
        RatedTable(csv=str(path), delimiter=delimiter, column="text", rating_column="stars")
    )


ROWS = [(f"Film {n}, {'good' if n % 2 else 'bad'}", n / 2) for n in range(12)]


@pytest.mark.parametrize(
    ("name", "separator", "mark"), [("a.csv", ",", ""), ("a.tsv", "\t", ""), ("a.csv", ",", "\ufeff")]
)
def test_a_file_of_columns(tmp_path: Path, name: str, separator: str, mark: str) -> None:
    quote = "" if name.endswith(".tsv") else '"'
    lines = [
        "stars,other,text".replace(",", separator),
        *(separator.join((str(s), "x", f"{quote}{text}{quote}")) for text, s in ROWS),
    ]
    rated = from_csv(tmp_path / name, mark + "\n".join(lines))
    assert rated.ratings == [n / 2 for n in range(12)] and not rated.parts
    assert rated.texts[3] == ["film", "3", ",", "good"] and rated.origin == str(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "text,stars\n" + "a,1\n" * 5 + "b,many\n" + "c,2\n" * 9,
            r"^data\.csv=.*: line 7 holds 'many', which is not a rating",
        ),
        (
            "text,stars\n" + "a,1\n" * 5 + "b\n" + "c,2\n" * 9,
            r"^data\.csv=.*: line 7 has 1 field, its header 2",
        ),
        (
            "text,stars\n" + '"a\nb",1\n' * 5 + "b,1_0\n" + "c,2\n" * 9,
            r"^data\.csv=.*: line 12 holds '1_0', which is not a rating",
        ),
        ("text,stars,stars\na,1,2\n", r"^data\.csv=.*: line 1 names more than one column 'stars'"),
        ("text;stars\na;1\n", r"^data\.csv=.* has a semicolon between its columns, .*data\.delimiter"),
        (
            "text, stars\na,1\n",
            r"^data\.rating_column=stars is not a column of .*; choose from text, ' stars'",
        ),
        (
            "text,stars\n" + "".join(f'" ",{n}\n' for n in range(12)),
            r"^.*a\.csv has no word in any of its 12 texts",
        ),
        ("words,stars\na,1\n", r"^data\.column=text is not a column of .*; choose from words, stars"),
        ("text,points\na,1\n", r"^data\.rating_column=stars is not a column of .*; choose from text, points"),
        ("", r"^data\.csv=.* is empty; its first line must have the names of the columns"),
        (
            b"text,stars\n\xff,1\n",
            r"^data\.csv=.* is not UTF-8 \(invalid start byte at byte 11\); convert it",
        ),
        (b"text,stars\na,1\nb\0,2\n", r"^data\.csv=.* has a NUL character in line 3"),
        ('text,stars\n"a" b,1\n', r"^data\.csv=.*: line 2 begins a quoted field after which ' b,1"),
    ],
)
def test_an_error_in_a_file_names_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_csv(tmp_path / "a.csv", content)


def test_quotation_marks_in_tsv_are_text(tmp_path: Path) -> None:
    content = 'stars\ttext\n3\t"good w1\n4\tbad w2\n5\tw3 w4\n2\tsaid good"\n' + "".join(
        f"{n}\tx\n" for n in range(8)
    )
    rated = from_csv(tmp_path / "a.tsv", content)
    assert rated.texts[:4] == [['"', "good", "w1"], ["bad", "w2"], ["w3", "w4"], ["said", "good", '"']]
    assert rated.ratings == [3, 4, 5, 2, *range(8)] and rated.places[0] == "line 2"


@pytest.mark.parametrize(
    ("delimiter", "separator"), [(";", ";"), ("|", "|"), ("tab", "\t"), ("\\t", "\t"), ("]", "]")]
)
def test_another_separator_can_be_given(delimiter: str, separator: str, tmp_path: Path) -> None:
    lines = [f"text{separator}stars", *(f"a, b{separator}{n}.5" for n in range(10))]
    rated = from_csv(tmp_path / "a.csv", "\n".join(lines), delimiter)
    assert rated.texts[0] == ["a", ",", "b"] and rated.ratings == [n + 0.5 for n in range(10)]


def test_texts_without_words_are_counted(tmp_path: Path) -> None:
    rated = from_csv(
        tmp_path / "a.csv", "text,stars\n" + "".join(f"{'a' if n % 5 else ' '},{n}\n" for n in range(12))
    )
    assert rated.without_words == [0, 5, 10] and rated.places[5] == "line 7"


def test_a_file_that_is_not_there_or_no_regular_one_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match=rf"^data\.csv={path} cannot be read \(.*\); name a CSV file"):
            corpora.load_rated(RatedTable(csv=str(path), column="a", rating_column="b"))


def on_hub(folder: Path, *splits: str, rating: str = "stars") -> corpora.Rated:
    datasets = pytest.importorskip("datasets")

    folder.mkdir()
    for number, split in enumerate(splits):
        rows = [(f"{split} {text}", stars + number) for text, stars in ROWS]
        table = {"text": [text for text, _ in rows], "stars": [stars for _, stars in rows]}
        datasets.Dataset.from_dict(table).to_csv(str(folder / f"{split}.csv"))
    return corpora.load_rated(RatedTable(name=str(folder), column="text", rating_column=rating))


@pytest.mark.usefixtures("own_cache")
def test_a_data_sets_own_parts_are_used(tmp_path: Path) -> None:
    rated = on_hub(tmp_path / "set", "train", "validation", "test")
    assert [(part, rated.parts.count(part)) for part in ("train", "valid", "test")] == [
        ("train", 12),
        ("valid", 12),
        ("test", 12),
    ]
    assert all(
        text[0].replace("validation", "valid") == part
        for text, part in zip(rated.texts, rated.parts, strict=True)
    )
    assert rated.ratings[:2] == [0, 0.5]


def load_folder(folder: Path, **contents: str | bytes) -> corpora.Rated:
    """Files by name, in which two underscores stand for the dot; the library's cache goes to the test's own
    folder.
    """
    folder.mkdir()
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return corpora.load_rated(RatedTable(name=str(folder), column="text", rating_column="stars"))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "cache" / "extracted")


@pytest.mark.usefixtures("own_cache")
def test_a_compressed_table_that_was_corrected_is_read_anew(tmp_path: Path) -> None:
    for text in ("first", "other"):
        table = "".join(["text,stars\n", *(f"{text} {n},{n}\n" for n in range(40))])
        rated = load_folder(tmp_path / "set", train__csv__gz=gzip.compress(table.encode()))
        assert rated.texts[0] == [text, "0"]
        shutil.rmtree(tmp_path / "set")


@pytest.mark.usefixtures("own_cache")
def test_splits_of_other_names_are_named_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = "".join(["text,stars\n", *(f"w {n},{n}\n" for n in range(40))])

    def splits(name: str, *names: str) -> corpora.Rated:
        files = "".join(f"  - split: {split}\n    path: {split}.csv\n" for split in names)
        card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
        return load_folder(tmp_path / name, README__md=card, **{f"{split}__csv": table for split in names})

    rated = splits("set", "train", "more", "test")
    assert {*rated.parts} == {"train", "test"}
    assert "/set: more left out; only the splits train, validation and test are" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"/languages has the splits de, en, and none of train, validation"):
        splits("languages", "de", "en")


MORE = "".join(f"{n},x\n" for n in range(8))
TEXTS = {
    "tsv": 'stars\ttext\n3\t"good w1\n4\tbad w2\n5\tw3 w4\n2\tsaid good"\n' + MORE.replace(",", "\t"),
    "csv": "\ufeffstars,text\r\n3,NA\r\n4,null\n1e1,None\n.5,nan\n2,\n1,1.50\n" + MORE,
}


@pytest.mark.parametrize(
    "others", [{}, {"README__md": "# A data set", "__DS_Store": b"\0\0\0\1Bud1", "notes__json": "{}"}]
)
@pytest.mark.parametrize("ending", TEXTS)
@pytest.mark.usefixtures("own_cache")
def test_a_table_in_a_folder_is_read_as_one_that_is_named(
    ending: str, others: dict[str, str | bytes], tmp_path: Path
) -> None:
    """Whatever lies beside it."""
    rated = load_folder(tmp_path / "set", **{f"train__{ending}": TEXTS[ending]}, **others)
    alone = from_csv(tmp_path / f"train.{ending}", TEXTS[ending])
    assert (rated.texts, rated.ratings) == (alone.texts, alone.ratings)
    assert (
        rated.texts[0] == (['"', "good", "w1"] if ending == "tsv" else ["na"])
        and rated.places[0] == f"line 2 of train.{ending}"
    )
    assert ending == "tsv" or rated.without_words == [4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("3,a b,x", r"^data\.name=.*set: test\.csv: line 10 has 3 fields, its header 2"),
        ("4", r"^data\.name=.*set: test\.csv: line 10 has 1 field, its header 2"),
        ("\n1,a", r"^data\.name=.*set: test\.csv: line 10 is blank"),
        ("many,a", r"^data\.rating_column=stars: line 10 of test\.csv holds 'many', which is not a rating"),
        ("3,a\0", r"^data\.name=.*set: test\.csv has a NUL character in line 10"),
    ],
)
@pytest.mark.usefixtures("own_cache")
def test_a_row_of_a_folders_table_that_does_not_fit_is_named(row: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_folder(
            tmp_path / "set", train__csv=f"stars,text\n{MORE}", test__csv=f"stars,text\n{MORE}{row}\n"
        )


@pytest.mark.usefixtures("own_cache")
def test_another_separator_in_a_folder_is_refused_without_advice_that_cannot_be_followed(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"train\.csv has a semicolon between its columns, .*; write the file with commas, or with tabs",
    ):
        load_folder(tmp_path / "set", train__csv=f"stars;text\n{MORE.replace(',', ';')}1;a, b\n")


@pytest.mark.usefixtures("own_cache")
def test_a_data_set_in_one_piece_has_no_parts(tmp_path: Path) -> None:
    rated = on_hub(tmp_path / "set", "train")
    assert len(rated.texts) == 12 and rated.parts == []


@pytest.mark.usefixtures("own_cache")
def test_a_data_set_without_a_part_to_test_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.name=.* has the splits train and validation, but no split test"
    ):
        on_hub(tmp_path / "set", "train", "validation")


def test_a_long_text_is_a_text_too(tmp_path: Path) -> None:
    rated = from_csv(
        tmp_path / "a.csv", "text,stars\n" + "".join(f"{'a ' * 70_000},{n}\n" for n in range(10))
    )
    assert len(rated.texts[0]) == 70_000


@pytest.mark.usefixtures("own_cache")
def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.rating_column=points is not a column of .*; choose from text, stars"
    ):
        on_hub(tmp_path / "set", "train", rating="points")
