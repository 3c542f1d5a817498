"""Text → ids, and its cache."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import TINY, settings
from vdrop_cli import corpora, tasks
from vdrop_cli.corpora import Corpus
from vdrop_cli.corpora.text import PARTS, Raw, from_rows, load_encoded
from vdrop_cli.errors import ConfigError
from vdrop_cli.files import write_tensors
from vdrop_cli.settings.data import HubText, PennTreebank, TextFiles


def files(folder: Path, train: bytes, valid: bytes = b"a\n", test: bytes = b"a\n") -> TextFiles:
    folder.mkdir(exist_ok=True)
    for part, content in (("train", train), ("valid", valid), ("test", test)):
        (folder / part).write_bytes(content)
    paths = {part: str(folder / part) for part in ("train", "valid", "test")}
    return TextFiles(**paths, cache=None)


def test_ids_follow_first_appearance_and_line_ends_are_words(tmp_path: Path) -> None:
    corpus = corpora.load_text(files(tmp_path, b"the cat\nthe dog\n", b" the dog \n", b"the cat"))
    assert corpus.vocabulary == ["the", "cat", "<eos>", "dog", "<unk>"]
    assert [stream.tolist() for stream in corpus.parts.values()] == [[0, 1, 2, 0, 3, 2], [0, 3, 2], [0, 1, 2]]


def test_words_are_those_of_the_training_part_alone(tmp_path: Path) -> None:
    """What it has not is <unk>, which is always in the vocabulary, also as the user's own word."""
    corpus = corpora.load_text(files(tmp_path / "a", b"the cat\n", b"the bird\n", b"<unk> a cat\n"))
    assert corpus.vocabulary == ["the", "cat", "<eos>", "<unk>"]
    assert [stream.tolist() for stream in corpus.parts.values()] == [[0, 1, 2], [0, 3, 2], [3, 3, 1, 2]]
    corpus = corpora.load_text(files(tmp_path / "b", b"the <unk> cat\n", b"the bird\n"))
    assert corpus.vocabulary == ["the", "<unk>", "cat", "<eos>"] and corpus.valid_N.tolist() == [0, 1, 3]


@pytest.mark.parametrize("fraction", [0.5, 0.3, 0.001])
def test_a_fraction_is_the_first_tokens_with_the_whole_vocabulary(fraction: float, text: list[str]) -> None:
    """The fingerprint, by which runs are named, is another one for each fraction."""
    whole, short = (
        corpora.load_text(settings(*text, "data.cache=null", *more).data)
        for more in ([], [f"data.fraction={fraction}"])
    )
    tokens = max(1, round(fraction * len(whole.train_N)))
    assert short.train_N.tolist() == whole.train_N[:tokens].tolist()
    assert short.vocabulary == whole.vocabulary
    assert short.valid_N.equal(whole.valid_N) and short.test_N.equal(whole.test_N)
    assert f"data.fraction={fraction}" in short.origin
    again = corpora.load_text(settings(*text, "data.cache=null", "data.fraction=1").data)
    assert again.fingerprint == whole.fingerprint != short.fingerprint
    other = corpora.load_text(settings(*text, "data.cache=null", "data.fraction=0.4").data)
    assert other.fingerprint != short.fingerprint


def test_a_fraction_is_not_cached_as_the_whole_text(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lengths = [
        len(corpora.load_text(settings(*text, "data.cache=cache", f"data.fraction={fraction}").data).train_N)
        for fraction in (0.5, 1, 0.5)
    ]
    assert lengths[0] == lengths[2] < lengths[1] and len(list(Path("cache").iterdir())) == 1


@pytest.mark.parametrize("fraction", ["0", "-0.1", "1.01", "nan", "inf", "all"])
def test_a_fraction_is_in_0_to_1(fraction: str) -> None:
    with pytest.raises((ConfigError, HydraException), match=r"data\.fraction"):
        settings(f"data.fraction={fraction}")


def test_a_fraction_too_small_for_a_batch_is_named(text: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.fraction=0\.001"):
        tasks.load(settings(*TINY, *text, "data.fraction=0.001"), torch.device("cpu"))


def test_words_seen_once_are_unknown_by_default(text: list[str], tmp_path: Path) -> None:
    """So that <unk> is trained."""
    (tmp_path / "train").write_text("a a b\na c\n")
    for data in (
        settings(*text, f"data.train={tmp_path}/train").data,
        settings("data=hub", "data.name=a", "data.column=b").data,
    ):
        assert data.min_count == 2
    corpus = corpora.load_text(settings(*text, f"data.train={tmp_path}/train", "data.cache=null").data)
    assert corpus.vocabulary == ["a", "<unk>", "<eos>"] and corpus.train_N.tolist() == [0, 0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("train", "min_count"), [(b"a b c\n", 2), (b"a a b b", 3), (b"<unk> <unk>\n\n", 1)])
def test_a_text_that_would_be_all_unknown_is_refused(train: bytes, min_count: int, tmp_path: Path) -> None:
    data = files(tmp_path, train)
    data.min_count = min_count
    with pytest.raises(
        ConfigError, match=rf"^data\.min_count={min_count}: .* training part of .* all would be <unk>"
    ):
        corpora.load_text(data)


def test_the_end_of_the_only_line_is_no_rare_word(tmp_path: Path) -> None:
    data = files(tmp_path, b"a a b b")
    data.min_count = 2
    assert corpora.load_text(data).vocabulary == ["a", "b", "<eos>", "<unk>"]


SPACES = [" ", "\t", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", "\xa0"]
LINES = st.lists(
    st.lists(st.sampled_from(["a", "b", "é", *SPACES]), max_size=5).map("".join), min_size=1, max_size=6
)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


@given(lines=LINES, data=st.data())
def test_a_text_has_the_same_tokens_whatever_its_lines_end_with_and_wherever_they_are_from(
    lines: list[str], data: st.DataObject
) -> None:
    """As a file, as rows without and with line ends, several lines to a row; as the definition says: its
    words and one <eos> a line.
    """
    lines = [*lines, "a"]  # a part needs a word
    expected = [word for line in lines for word in [*line.split(), "<eos>"]]
    ends = [data.draw(ENDS) for _ in lines]
    for n in reversed(range(len(ends) - 1)):
        if ends[n] == "\r" and lines[n + 1] + ends[n + 1] == "\n":
            ends[n] = "\n"  # else the two would be one line end
    rows = [line + end for line, end in zip(lines, ends, strict=True)]
    place = data.draw(st.integers(0, len(rows)))
    contents = {
        "file": "".join(rows).encode(),
        "file without the last line's end": "".join([*rows[:-1], lines[-1]]).encode(),
        "a row a line": from_rows(lines),
        "rows with line ends": from_rows(rows),
        "some with": from_rows([data.draw(st.sampled_from(pair)) for pair in zip(lines, rows, strict=True)]),
        "several lines a row": from_rows(
            part for part in ("".join(rows[:place]), "".join(rows[place:])) if part
        ),
    }
    fingerprints = {}
    for name, content in contents.items():
        corpus = load_encoded(
            Raw(dict.fromkeys(PARTS, content), "here"), HubText(name="a", column="b", cache=None)
        )
        assert [corpus.vocabulary[number] for number in corpus.test_N] == expected, name
        fingerprints[name] = corpus.fingerprint
    assert len(set(fingerprints.values())) == 1, fingerprints


def test_rows_that_end_in_a_newline_have_one_end_each() -> None:
    """WikiText's rows."""
    assert from_rows(["", " = A = \n", " b c \n"]) == b"\n = A = \n b c \n"


def test_penn_treebank_has_the_first_encoding() -> None:
    """A \\r is no line end, a last line may have no <eos>, and words come from all parts."""
    contents = {"train": b"a\rb\n\na", "valid": b"c\n", "test": b"d"}
    first = hashlib.sha256(b"1 1")
    for content in contents.values():
        first.update(len(content).to_bytes(8, "little") + content)
    corpus = load_encoded(Raw(contents, "here"), PennTreebank(cache=None))
    assert corpus.fingerprint == first.hexdigest() and corpus.vocabulary == ["a", "b", "<eos>", "c", "d"]
    assert [stream.tolist() for stream in corpus.parts.values()] == [[0, 1, 2, 2, 0], [3, 2], [4]]
    other = load_encoded(Raw(contents, "here"), HubText(name="a", column="b", min_count=1, cache=None))
    assert other.train_N.tolist() == [0, 1, 2, 1, 1, 0, 1] and other.fingerprint != corpus.fingerprint


def test_windows_line_ends_make_the_same_words(tmp_path: Path) -> None:
    one, other = (
        corpora.load_text(files(tmp_path / name, b"the cat" + end + b"sat" + end))
        for name, end in (("a", b"\n"), ("b", b"\r\n"))
    )
    assert one.vocabulary == other.vocabulary and one.train_N.tolist() == other.train_N.tolist()
    assert one.fingerprint == other.fingerprint


def test_rare_words_of_the_training_part_become_unknown_in_all(tmp_path: Path) -> None:
    data = files(tmp_path, b"a a b c\n\n", b"b a\n", b"c\n")
    data.min_count = 2
    corpus = corpora.load_text(data)
    assert corpus.vocabulary == ["a", "<unk>", "<eos>"]
    assert [stream.tolist() for stream in corpus.parts.values()] == [[0, 0, 1, 1, 2, 2], [1, 0, 2], [1, 2]]


def test_a_byte_order_mark_is_no_part_of_a_word(tmp_path: Path) -> None:
    one, other = (
        corpora.load_text(files(tmp_path / name, mark + b"the cat\n"))
        for name, mark in (("a", b""), ("b", b"\xef\xbb\xbf"))
    )
    assert one.vocabulary == other.vocabulary and one.fingerprint == other.fingerprint


def test_a_line_of_ten_million_words_is_a_text_too(tmp_path: Path) -> None:
    corpus = corpora.load_text(files(tmp_path, b"one two " * 5_000_000))
    assert len(corpus.train_N) == 10_000_001 and corpus.vocabulary == ["one", "two", "<eos>", "<unk>"]


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
def test_a_cache_that_holds_something_else_is_made_anew(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = replace(files(tmp_path, b"the cat\n"), cache=str(tmp_path / "cache"))
    first = corpora.load_text(data)
    (cached,) = (tmp_path / "cache").iterdir()
    write_tensors(cached, {"vocabulary": first.vocabulary, **first.parts} | CACHES[damage])
    again = corpora.load_text(data)
    assert again.vocabulary == first.vocabulary and all(
        torch.equal(again.parts[part], first.parts[part]) for part in first.parts
    )
    assert "cannot be used" in capsys.readouterr().err
    corpora.load_text(data)
    assert capsys.readouterr().err == ""


BAD = [
    (b"", "is empty"),
    (b" \t ", "is empty"),
    (b"\n\r\n\n", "is empty"),
    (b"ab \xff", r"is not UTF-8 \(invalid start byte at byte 3\); convert it to UTF-8"),
    (b"ab\r\n\n\0", "NUL character in line 3; convert it to UTF-8"),
    ("ab\n".encode("utf-16"), r"is not UTF-8 \(invalid start byte at byte 0\)"),
    ("ab\n".encode("utf-16-le"), "NUL character in line 1"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_a_part_that_is_empty_or_not_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.valid: the valid part of .* {message}"):
        corpora.load_text(files(tmp_path, b"a\n", content))


def test_a_missing_file_is_named_with_its_setting(tmp_path: Path) -> None:
    data = files(tmp_path, b"a\n")
    Path(str(data.test)).unlink()
    with pytest.raises(
        ConfigError, match=rf"data\.test={data.test} cannot be read \(No such file or directory\)"
    ):
        corpora.load_text(data)


def test_the_cache_is_found_by_content_not_by_path(tmp_path: Path) -> None:
    """The same text elsewhere is read from the cache; another text at the same place is not."""
    cache = tmp_path / "cache"

    def load(folder: str, train: bytes) -> Corpus:
        data = files(tmp_path / folder, train)
        data.cache = str(cache)
        return corpora.load_text(data)

    first = load("a", b"one two\n")
    (entry,) = cache.iterdir()
    values = torch.load(entry, weights_only=True)
    write_tensors(entry, {**values, "vocabulary": ["seen", "in", "the", "cache"]})
    assert load("b", b"one two\n").vocabulary == ["seen", "in", "the", "cache"]
    second = load("a", b"three\n")
    assert second.vocabulary == ["three", "<eos>", "<unk>"]
    assert second.fingerprint != first.fingerprint and len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_said_and_no_obstacle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = files(tmp_path, b"a b\n")
    (tmp_path / "file").write_text("in the way")
    data.cache = str(tmp_path / "file" / "cache")
    assert corpora.load_text(data).vocabulary == ["a", "b", "<eos>", "<unk>"]
    assert "data.cache=" in capsys.readouterr().err


def test_min_count_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    data = files(tmp_path, b"a a b\n")
    first = corpora.load_text(data).fingerprint
    data.min_count = 2
    assert corpora.load_text(data).fingerprint != first


def test_parts_cannot_be_confused_by_moving_text_from_one_to_the_next(tmp_path: Path) -> None:
    one = corpora.load_text(files(tmp_path, b"a b ", b"c d"))
    other = corpora.load_text(files(tmp_path, b"a b c ", b"d"))
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("damage", [b"", b"not a cache"])
def test_a_damaged_cache_is_made_anew_and_said_so(
    tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    data = files(tmp_path, b"a b\n")
    data.cache = str(tmp_path / "cache")
    expected = corpora.load_text(data)
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(damage)
    assert corpora.load_text(data).vocabulary == expected.vocabulary
    assert f"{entry} cannot be used" in capsys.readouterr().err
    assert entry.stat().st_size > len(damage), "written again"
