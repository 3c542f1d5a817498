"""The embedded corpus."""

from pathlib import Path

import torch

from vdrop_cli import corpora
from vdrop_cli.corpora.text import PARTS
from vdrop_cli.settings.data import PythonTopics, TextFiles


def test_it_is_real_english_in_three_parts_eight_to_one_to_one() -> None:
    corpus = corpora.load_text(PythonTopics(min_count=2, cache=None))
    sizes = {part: len(stream) for part, stream in corpus.parts.items()}
    assert 50_000 < sizes["train"] < 200_000
    for part in ("valid", "test"):
        assert 0.08 < sizes[part] / sizes["train"] < 0.17
    words = {corpus.vocabulary[i] for i in corpus.train_N[:2000].tolist()}
    assert {"the", "statement", "<eos>", "."} <= words


def test_the_parts_are_different_text() -> None:
    raw = corpora.read(PythonTopics())
    lines = [set(content.decode().splitlines()) for content in raw.parts.values()]
    assert not lines[1] & lines[0] and not lines[2] & lines[0] and not lines[1] & lines[2]


def test_as_files_it_is_the_same_text(tmp_path: Path) -> None:
    """Written with the line ends of Windows, and none at the end."""
    paths = {part: tmp_path / part for part in PARTS}
    for part, content in corpora.read(PythonTopics()).parts.items():
        paths[part].write_bytes(content.removesuffix(b"\n").replace(b"\n", b"\r\n"))
    files = {part: str(path) for part, path in paths.items()}
    one = corpora.load_text(PythonTopics(min_count=2, cache=None))
    other = corpora.load_text(TextFiles(**files, min_count=2, cache=None))  # type: ignore[arg-type]
    assert one.fingerprint == other.fingerprint and one.vocabulary == other.vocabulary
    assert all(torch.equal(one.parts[part], other.parts[part]) for part in PARTS)


def test_unknown_words_are_trained_and_more_frequent_where_they_are_new() -> None:
    corpus = corpora.load_text(PythonTopics(min_count=2, cache=None))
    shares = [corpora.unknown_share(stream_N, corpus) for stream_N in corpus.parts.values()]
    assert 0 < shares[0] < min(shares[1:]) < max(shares) < 0.1
    assert len(corpus.vocabulary) == len(set(corpus.train_N.tolist())), "all words are in the training part"
