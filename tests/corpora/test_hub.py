"""Data sets that the `datasets` library can load; here from folders, read by the same calls as the Hub's."""

from pathlib import Path

import pytest

from vdrop_cli import corpora
from vdrop_cli.config import ConfigError, Data, Source
from vdrop_cli.corpora import hub


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two configurations as folders of parquet files; the library's cache goes to the test's own folder."""
    datasets = pytest.importorskip("datasets")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, first in (("one", "first line"), ("two", "another line")):
        (tmp_path / "hub" / name).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            rows = {"line": [first, f"{split} ends"], "other": ["x", "y"]}
            datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "hub" / name / f"{split}.parquet"))
    return tmp_path / "hub"


def data(folder: Path, **changes: str) -> Data:
    return Data(Source.hub, **{"name": str(folder / "one"), "column": "line"} | changes, cache=None)  # type: ignore[arg-type]


def test_each_row_is_a_line(folder: Path) -> None:
    corpus = corpora.load(data(folder))
    assert corpus.vocabulary == ["first", "line", "<eos>", "train", "ends", "<unk>"]
    assert corpus.test_N.tolist() == [0, 1, 2, 5, 4, 2]
    assert corpora.load(data(folder, column="other")).vocabulary == ["x", "<eos>", "y", "<unk>"]


def test_rows_that_end_in_a_newline_have_one_end_each(folder: Path) -> None:
    """As WikiText's do."""
    import datasets

    for split in ("train", "validation", "test"):
        datasets.Dataset.from_dict({"line": ["", " = A = \n", " b c \n"]}).to_parquet(str(folder / "two" / f"{split}.parquet"))
    corpus = corpora.load(data(folder, name=str(folder / "two")))
    words = [corpus.vocabulary[number] for number in corpus.test_N]
    assert words == ["<eos>", "=", "A", "=", "<eos>", "b", "c", "<eos>"]


def test_a_folder_of_text_files_is_read_as_the_files_are(folder: Path, tmp_path: Path) -> None:
    """By the library's own reader of text files, and by `data=text`."""
    contents = {"train": b" a b \r\n\r\na\xc2\x85b\rb\n\n", "validation": b"\n\na", "test": b"a\x0bb\x0c\xe2\x80\xa8a\n"}
    (tmp_path / "texts").mkdir()
    for split, content in contents.items():
        (tmp_path / "texts" / f"{split}.txt").write_bytes(content)
    paths = {part: str(tmp_path / "texts" / f"{split}.txt") for part, split in hub.SPLITS.items()}
    one = corpora.load(data(folder, name=str(tmp_path / "texts"), column="text"))
    other = corpora.load(Data(Source.text, **paths, cache=None))  # type: ignore[arg-type]
    assert one.train_N.tolist() == [0, 1, 2, 2, 0, 1, 2, 1, 2, 2] and one.test_N.tolist() == [0, 1, 0, 2]
    assert one.fingerprint == other.fingerprint and one.vocabulary == other.vocabulary


def test_a_wrong_name_or_column_is_an_error_that_names_it(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.column=text is not a column of .*there are line, other"):
        corpora.load(data(folder, column="text"))
    with pytest.raises(ConfigError, match=r"data\.name=.*nowhere cannot be loaded from the Hub"):
        corpora.load(data(folder, name=str(folder / "nowhere")))
    with pytest.raises(ConfigError, match=r"cannot be loaded from the Hub \(.*onfig"):
        corpora.load(data(folder, config="three"))


def test_what_is_not_there_is_a_line_without_words_and_what_is_no_text_is_told(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")

    for split in ("train", "validation", "test"):
        rows = {"line": ["a", None], "number": [1, 2]}
        datasets.Dataset.from_dict(rows).to_parquet(str(folder / "two" / f"{split}.parquet"))
    corpus = corpora.load(data(folder, name=str(folder / "two")))
    assert corpus.vocabulary == ["a", "<eos>", "<unk>"] and corpus.train_N.tolist() == [0, 1, 1]
    with pytest.raises(ConfigError, match=r"^data\.column=number: row 0 of train holds '1', which is no text; choose another column"):
        corpora.load(data(folder, name=str(folder / "two"), column="number"))


def test_a_missing_split_is_an_error_that_lists_those_there_are(folder: Path) -> None:
    (folder / "one" / "validation.parquet").unlink()
    with pytest.raises(ConfigError, match=r"has no split validation, only train, test"):
        corpora.load(data(folder))


def test_name_configuration_and_revision_go_to_the_library_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the Hub can be reached in a test; what it would be asked can be seen."""
    datasets = pytest.importorskip("datasets")

    asked = []

    def refuse(*arguments: object, **named: object) -> None:
        asked.append((arguments, named))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError, match=r"data\.name=owner/name cannot be loaded from the Hub \(ConnectionError: no network\)"):
        corpora.read(Data(Source.hub, name="owner/name", config="c", revision="r", column="text"))
    assert asked == [(("owner/name", "c"), {"revision": "r"})]
