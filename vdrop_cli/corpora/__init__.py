"""Corpora by name: text → ids. No knowledge of models."""

from vdrop_cli.corpora import cornell, hub, ptb, pydoc, text, text_regression, vader
from vdrop_cli.corpora import rated as of_ratings
from vdrop_cli.corpora.rated import Rated
from vdrop_cli.corpora.text import Corpus, Raw, unknown_share
from vdrop_cli.settings.choices import CorpusName
from vdrop_cli.settings.train import Data

__all__ = ["Corpus", "Rated", "Raw", "load", "rated", "read", "unknown_share", "words"]


def read(data: Data) -> Raw:
    """The text of the three parts, fetched if need be, checked where there is something to check it
    against.
    """
    readers = {
        CorpusName.ptb: ptb.read,
        CorpusName.pydoc: pydoc.read,
        CorpusName.text: text.read,
        CorpusName.hub: hub.read,
    }
    return readers[data.source](data)


def load(data: Data, fingerprint: str | None = None) -> Corpus:
    """The corpus as ids; with the fingerprint that a checkpoint has of it, as it was encoded then."""
    corpus = text.encoded(read(data), data, fingerprint)
    if data.source is CorpusName.ptb:
        ptb.check_counts(corpus)
    return corpus


def rated(data: Data) -> Rated:
    """Texts with their ratings."""
    readers = {
        CorpusName.cornell: cornell.read,
        CorpusName.vader: vader.read,
        CorpusName.text_regression: text_regression.read,
    }
    return readers[data.source](data)


def words(splitting: str, text: str) -> list[str]:
    """Those of a text from elsewhere, as texts with ratings are split: as those of "cornell", or as all
    others.
    """
    return cornell.words(text) if splitting == "cornell" else of_ratings.words(text)
