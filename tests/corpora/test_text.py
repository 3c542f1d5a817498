"""Text → ids, and its cache."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vdrop_cli import corpora
from vdrop_cli.config import ConfigError, Data, Source
from vdrop_cli.corpora import Corpus
from vdrop_cli.files import write_tensors


def files(folder: Path, train: bytes, valid: bytes = b"a\n", test: bytes = b"a\n") -> Data:
    folder.mkdir(exist_ok=True)
    for part, content in (("train", train), ("valid", valid), ("test", test)):
        (folder / part).write_bytes(content)
    paths = {part: str(folder / part) for part in ("train", "valid", "test")}
    return Data(Source.text, **paths, cache=None)


def test_ids_follow_first_appearance_and_line_ends_are_words(tmp_path: Path) -> None:
    corpus = corpora.load(files(tmp_path, b"the cat\nthe dog\n", b" the bird \n", b"a cat"))
    assert corpus.vocabulary == ["the", "cat", "<eos>", "dog", "bird", "a"]
    assert [stream.tolist() for stream in corpus.parts.values()] == [[0, 1, 2, 0, 3, 2], [0, 4, 2], [5, 1]]


def test_windows_line_ends_make_the_same_words(tmp_path: Path) -> None:
    one, other = (corpora.load(files(tmp_path / name, b"the cat\nsat" + end)) for name, end in (("a", b"\n"), ("b", b"\r\n")))
    assert one.vocabulary == other.vocabulary and one.train_N.tolist() == other.train_N.tolist()


def test_rare_words_of_the_training_part_become_unknown_in_all(tmp_path: Path) -> None:
    data = files(tmp_path, b"a a b c\n\n", b"b a\n", b"c\n")
    data.min_count = 2
    corpus = corpora.load(data)
    assert corpus.vocabulary == ["a", "<unk>", "<eos>"]
    assert [stream.tolist() for stream in corpus.parts.values()] == [[0, 0, 1, 1, 2, 2], [1, 0, 2], [1, 2]]


def test_a_byte_order_mark_is_no_part_of_a_word(tmp_path: Path) -> None:
    one, other = (corpora.load(files(tmp_path / name, mark + b"the cat\n")) for name, mark in (("a", b""), ("b", b"\xef\xbb\xbf")))
    assert one.vocabulary == other.vocabulary and one.fingerprint == other.fingerprint


def test_a_line_of_ten_million_words_is_a_text_too(tmp_path: Path) -> None:
    corpus = corpora.load(files(tmp_path, b"one two " * 5_000_000))
    assert len(corpus.train_N) == 10_000_000 and corpus.vocabulary == ["one", "two", "a", "<eos>"]


CACHES: dict[str, dict[str, object]] = {
    "a vocabulary of another type": {"vocabulary": "the cat"},
    "words of another type": {"vocabulary": ["the", "cat", 3, "a"]},
    "a word twice": {"vocabulary": ["the", "cat", "the", "a"]},
    "no stream": {"valid": [0, 1]},
    "ids of another type": {"valid": torch.tensor([0.0, 1.0])},
    "ids of another shape": {"train": torch.tensor([[0, 1]])},
    "an id beyond the vocabulary": {"test": torch.tensor([4])},
    "a negative id": {"test": torch.tensor([-1])},
    "an empty stream": {"train": torch.tensor([], dtype=torch.int64)},
    "a stream of one id, again and again": {"train": torch.tensor([0]).expand(10**12)},
}


@pytest.mark.parametrize("damage", CACHES)
def test_a_cache_that_holds_something_else_is_made_anew(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = replace(files(tmp_path, b"the cat\n"), cache=str(tmp_path / "cache"))
    first = corpora.load(data)
    (cached,) = (tmp_path / "cache").iterdir()
    write_tensors(cached, {"vocabulary": first.vocabulary, **first.parts} | CACHES[damage])
    again = corpora.load(data)
    assert again.vocabulary == first.vocabulary and all(torch.equal(again.parts[part], first.parts[part]) for part in first.parts)
    assert "cannot be used" in capsys.readouterr().err
    corpora.load(data)
    assert capsys.readouterr().err == ""


BAD = [
    (b"", "is empty"),
    (b" \t ", "is empty"),
    (b"\n\r\n\n", "is empty"),
    (b"ab \xff", "byte 3 of the valid part"),
    (b"ab\n\0", "byte 3 of the valid part .* is NUL"),
    ("ab\n".encode("utf-16"), "byte 0 of the valid part .* is not UTF-8"),
    ("ab\n".encode("utf-16-le"), "byte 1 of the valid part .* is NUL"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_a_part_that_is_empty_or_not_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.valid: .*{message}"):
        corpora.load(files(tmp_path, b"a\n", content))


def test_a_missing_file_is_named_with_its_setting(tmp_path: Path) -> None:
    data = files(tmp_path, b"a\n")
    Path(str(data.test)).unlink()
    with pytest.raises(ConfigError, match=rf"data\.test={data.test} cannot be read \(No such file or directory\)"):
        corpora.load(data)


def test_the_cache_is_found_by_content_not_by_path(tmp_path: Path) -> None:
    """The same text elsewhere is read from the cache; another text at the same place is not."""
    cache = tmp_path / "cache"

    def load(folder: str, train: bytes) -> Corpus:
        data = files(tmp_path / folder, train)
        data.cache = str(cache)
        return corpora.load(data)

    first = load("a", b"one two\n")
    (entry,) = cache.iterdir()
    held = torch.load(entry, weights_only=True)
    write_tensors(entry, {**held, "vocabulary": ["seen", "in", "the", "cache"]})
    assert load("b", b"one two\n").vocabulary == ["seen", "in", "the", "cache"]
    second = load("a", b"three\n")
    assert second.vocabulary == ["three", "<eos>", "a"]
    assert second.fingerprint != first.fingerprint and len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_said_and_no_obstacle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = files(tmp_path, b"a b\n")
    (tmp_path / "file").write_text("in the way")
    data.cache = str(tmp_path / "file" / "cache")
    assert corpora.load(data).vocabulary == ["a", "b", "<eos>"]
    assert "data.cache=" in capsys.readouterr().err


def test_min_count_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    data = files(tmp_path, b"a a b\n")
    first = corpora.load(data).fingerprint
    data.min_count = 2
    assert corpora.load(data).fingerprint != first


def test_parts_cannot_be_confused_by_moving_text_from_one_to_the_next(tmp_path: Path) -> None:
    one, other = corpora.load(files(tmp_path, b"a b ", b"c d")), corpora.load(files(tmp_path, b"a b c ", b"d"))
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("damage", [b"", b"not a cache"])
def test_a_damaged_cache_is_made_anew_and_said_so(tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    data = files(tmp_path, b"a b\n")
    data.cache = str(tmp_path / "cache")
    expected = corpora.load(data)
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(damage)
    assert corpora.load(data).vocabulary == expected.vocabulary
    assert f"{entry} cannot be used" in capsys.readouterr().err
    assert entry.stat().st_size > len(damage), "written again"
