"""Data sets that the `datasets` library can load; here from folders, read by the same calls as the Hub's."""

import gzip
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vdrop_cli import corpora
from vdrop_cli.corpora import hub
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.data import HubText, TextFiles


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two configurations as folders of parquet files; the library's cache goes to the test's own folder."""
    datasets = pytest.importorskip("datasets")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "cache" / "extracted")
    for name, first in (("one", "first line"), ("two", "another line")):
        (tmp_path / "hub" / name).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            rows = {"line": [first, f"{split} ends"], "other": ["x", "y"]}
            datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "hub" / name / f"{split}.parquet"))
    return tmp_path / "hub"


def data(folder: Path, **changes: str) -> HubText:
    return HubText(**{"name": str(folder / "one"), "column": "line"} | changes, cache=None)  # type: ignore[arg-type]


def test_each_row_is_a_line(folder: Path) -> None:
    corpus = corpora.load_text(data(folder))
    assert corpus.vocabulary == ["first", "line", "<eos>", "train", "ends", "<unk>"]
    assert corpus.test_N.tolist() == [0, 1, 2, 5, 4, 2]
    assert corpora.load_text(data(folder, column="other")).vocabulary == ["x", "<eos>", "y", "<unk>"]


def test_a_file_that_has_changed_is_read_anew_though_its_time_has_not(folder: Path) -> None:
    import datasets

    assert "third" not in corpora.load_text(data(folder)).vocabulary
    for split in ("train", "validation", "test"):
        changed = folder / "one" / f"{split}.parquet"
        before = changed.stat()
        datasets.Dataset.from_dict({"line": ["third line"]}).to_parquet(str(changed))
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "third" in corpora.load_text(data(folder)).vocabulary


def test_rows_that_end_in_a_newline_have_one_end_each(folder: Path) -> None:
    """As WikiText's do."""
    import datasets

    for split in ("train", "validation", "test"):
        datasets.Dataset.from_dict({"line": ["", " = A = \n", " b c \n"]}).to_parquet(
            str(folder / "two" / f"{split}.parquet")
        )
    corpus = corpora.load_text(data(folder, name=str(folder / "two")))
    words = [corpus.vocabulary[number] for number in corpus.test_N]
    assert words == ["<eos>", "=", "A", "=", "<eos>", "b", "c", "<eos>"]


def test_a_folder_of_text_files_is_read_as_the_files_are(folder: Path, tmp_path: Path) -> None:
    """By `data=text`; with a byte order mark, and whatever lies beside them."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "README.md").write_text("# Texts\n")
    (tmp_path / "texts" / ".DS_Store").write_bytes(b"\x00\xff")
    contents = {
        "train": b"\xef\xbb\xbf a b \r\n\r\na\xc2\x85b\rb\n\n",
        "validation": b"\n\na",
        "test": b"a\x0bb\x0c\xe2\x80\xa8a\n",
    }
    for split, content in contents.items():
        (tmp_path / "texts" / f"{split}.txt").write_bytes(content)
    paths = {part: str(tmp_path / "texts" / f"{split}.txt") for part, split in hub.SPLITS.items()}
    one = corpora.load_text(data(folder, name=str(tmp_path / "texts"), column="text"))
    other = corpora.load_text(TextFiles(**paths, cache=None))  # type: ignore[arg-type]
    assert one.train_N.tolist() == [0, 1, 2, 2, 0, 1, 2, 1, 2, 2] and one.test_N.tolist() == [0, 1, 0, 2]
    assert one.fingerprint == other.fingerprint and one.vocabulary == other.vocabulary


def card(folder: Path, options: str) -> None:
    """A description of the two splits of a folder."""
    files = "\n".join(f"  - split: {split}\n    path: {split}/*" for split in ("train", "validation", "test"))
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n  {options}\n---\n"
    )


def tables(folder: Path) -> Path:
    """Three splits of two files each, one of them compressed, with tabs, whatever their names say."""
    for split in ("train", "validation", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / "0.csv").write_text('line\tnumber\n"a\t1\nNA\t2\n')
        (folder / split / "1.csv.gz").write_bytes(gzip.compress(b'number\tline\n3\tb"\n'))
    return folder


def test_tables_are_read_as_the_description_of_a_data_set_separates_them(
    folder: Path, tmp_path: Path
) -> None:
    card(tables(tmp_path / "tables"), r'sep: "\t"')
    corpus = corpora.load_text(data(folder, name=str(tmp_path / "tables")))
    assert corpus.vocabulary == ['"a', "<eos>", "NA", 'b"', "<unk>"] and corpus.train_N.tolist() == [
        0,
        1,
        2,
        1,
        3,
        1,
    ]


@pytest.mark.parametrize(
    ("options", "name"),
    [("skiprows: 1", "skiprows"), ('sep: "::"', "sep"), ("column_names: [a, b]", "column_names")],
)
def test_a_description_that_cannot_be_followed_is_refused(
    options: str, name: str, folder: Path, tmp_path: Path
) -> None:
    card(tables(tmp_path / "tables"), options)
    with pytest.raises(
        ConfigError,
        match=rf"^data\.name=.*tables: its description sets {name}, .*; write its files "
        r"without",
    ):
        corpora.load_text(data(folder, name=str(tmp_path / "tables")))


def test_tables_of_the_hub_are_read_as_those_of_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    for split in ("train", "validation", "test"):
        (folder / "two" / f"{split}.parquet").unlink()
        (folder / "two" / f"{split}.tsv").write_text('line\n"good w1\nnull\nsaid good"\n')
    builder = datasets.load_dataset_builder(str(folder / "two"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    monkeypatch.chdir(tmp_path)
    corpus = corpora.load_text(data(folder, name="owner/two"))
    assert (
        corpus.vocabulary == ['"good', "w1", "<eos>", "null", "said", 'good"', "<unk>"]
        and corpus.origin == "Hub: owner/two"
    )
    with pytest.raises(
        ConfigError,
        match=r"^data\.column=text is not a column of data\.name=owner/two: train\.tsv; choose from line$",
    ):
        corpora.load_text(data(folder, name="owner/two", column="text"))


def test_a_copy_that_was_read_by_other_rules_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the library holds them where the Hub cannot be reached."""
    datasets = pytest.importorskip("datasets")

    builder = SimpleNamespace(
        info=SimpleNamespace(builder_name="csv"), download_and_prepare=lambda: None, as_dataset=dict
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    with pytest.raises(
        ConfigError,
        match=r"^data\.name=owner/name: the Hub cannot be reached, .*; name a folder that has them$",
    ):
        corpora.read(HubText(name="owner/name", column="text"))


def test_a_wrong_name_or_column_is_an_error_that_names_it(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.column=text is not a column of .*choose from line, other"):
        corpora.load_text(data(folder, column="text"))
    with pytest.raises(ConfigError, match=r"data\.name=.*nowhere cannot be loaded from the Hub"):
        corpora.load_text(data(folder, name=str(folder / "nowhere")))
    with pytest.raises(ConfigError, match=r"cannot be loaded from this folder \(.*onfig"):
        corpora.load_text(data(folder, config="three"))
    with pytest.raises(ConfigError, match=r"^data\.revision must be null, .* is a folder, got v1$"):
        corpora.load_text(data(folder, revision="v1"))


def test_a_missing_text_is_a_line_without_words_and_what_is_no_text_is_refused(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")

    for split in ("train", "validation", "test"):
        rows = {"line": ["a", None], "number": [1, 2]}
        datasets.Dataset.from_dict(rows).to_parquet(str(folder / "two" / f"{split}.parquet"))
    corpus = corpora.load_text(data(folder, name=str(folder / "two")))
    assert corpus.vocabulary == ["a", "<eos>", "<unk>"] and corpus.train_N.tolist() == [0, 1, 1]
    with pytest.raises(
        ConfigError, match=r"^data\.column=number: row 0 of train holds '1', .*; choose another column"
    ):
        corpora.load_text(data(folder, name=str(folder / "two"), column="number"))


def test_a_missing_split_is_an_error_that_lists_those_there_are(folder: Path) -> None:
    (folder / "one" / "validation.parquet").unlink()
    with pytest.raises(ConfigError, match=r"has no split validation, only train, test"):
        corpora.load_text(data(folder))


def test_name_configuration_and_revision_go_to_the_library_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing of the Hub can be reached in a test; what it would be asked can be seen."""
    datasets = pytest.importorskip("datasets")

    asked = []

    def refuse(*arguments: object, **named: object) -> None:
        asked.append((arguments, named))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(
        ConfigError,
        match=r"data\.name=owner/name cannot be loaded from the Hub \(ConnectionError: no network\)",
    ):
        corpora.read(HubText(name="owner/name", config="c", revision="r", column="text"))
    assert asked == [(("owner/name", "c"), {"revision": "r", "cache_dir": None})]
