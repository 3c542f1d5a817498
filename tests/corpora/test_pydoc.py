"""The embedded corpus."""

from vdrop_cli import corpora
from vdrop_cli.config import Data, Source


def test_it_is_real_english_in_three_parts_eight_to_one_to_one() -> None:
    corpus = corpora.load(Data(Source.pydoc, min_count=2, cache=None))
    sizes = {part: len(stream) for part, stream in corpus.parts.items()}
    assert 50_000 < sizes["train"] < 200_000
    for part in ("valid", "test"):
        assert 0.08 < sizes[part] / sizes["train"] < 0.17
    words = {corpus.vocabulary[i] for i in corpus.train_N[:2000].tolist()}
    assert {"the", "statement", "<eos>", "."} <= words


def test_the_parts_are_different_text() -> None:
    raw = corpora.read(Data(Source.pydoc))
    lines = [set(content.decode().splitlines()) for content in raw.parts.values()]
    assert not lines[1] & lines[0] and not lines[2] & lines[0] and not lines[1] & lines[2]
