"""Corpora by name: text → ids. This package does not know models."""

from vdrop_cli.corpora import cornell, hub, ptb, pydoc, text, text_regression, vader
from vdrop_cli.corpora import rated as rated_texts
from vdrop_cli.corpora.rated import Rated
from vdrop_cli.corpora.text import Corpus, Raw, first_part, unknown_share, with_fraction
from vdrop_cli.settings.choices import CorpusName
from vdrop_cli.settings.train import Data

__all__ = [
    "Corpus",
    "Rated",
    "Raw",
    "first_part",
    "load",
    "rated",
    "read",
    "unknown_share",
    "with_fraction",
    "words",
]


def read(data: Data) -> Raw:
    """Returns the text of the three parts; downloads and verifies it where the source says so."""
    readers = {
        CorpusName.ptb: ptb.read,
        CorpusName.pydoc: pydoc.read,
        CorpusName.text: text.read,
        CorpusName.hub: hub.read,
    }
    return readers[data.source](data)


def load(data: Data, fingerprint: str | None = None) -> Corpus:
    """Returns the corpus as ids.

    `fingerprint` is that of a checkpoint's corpus: the text is encoded as it was then.
    """
    corpus = text.encoded(read(data), data, fingerprint)
    if data.source is CorpusName.ptb:
        ptb.check_counts(corpus)
    return corpus if data.fraction == 1 else corpus.with_fraction(data.fraction)


def rated(data: Data) -> Rated:
    """Returns texts with their ratings."""
    readers = {
        CorpusName.cornell: cornell.read,
        CorpusName.vader: vader.read,
        CorpusName.text_regression: text_regression.read,
    }
    return readers[data.source](data)


def words(splitting: str, text: str) -> list[str]:
    """Splits a new text into words by the rule of the training texts, "cornell" or "plain"."""
    return cornell.words(text) if splitting == "cornell" else rated_texts.words(text)
