"""Corpora by name: text → ids. This package does not know models."""

from vdrop_cli.corpora import cornell, hub, ptb, pydoc, rated, text, text_regression, vader
from vdrop_cli.corpora.rated import Rated
from vdrop_cli.corpora.text import Corpus, Raw, first_part, read_tokens, unknown_share, with_fraction
from vdrop_cli.settings.data import (
    CornellReviews,
    HubText,
    PennTreebank,
    PythonTopics,
    RatedData,
    RatedTable,
    TextData,
    TextFiles,
    VaderSnippets,
)

__all__ = [
    "Corpus",
    "Rated",
    "first_part",
    "load_rated",
    "load_text",
    "read_tokens",
    "split_words",
    "unknown_share",
    "with_fraction",
]


def read(data: TextData) -> Raw:
    """Returns the text of the three parts; downloads and verifies it where the source says so."""
    match data:
        case PennTreebank():
            return ptb.read(data)
        case PythonTopics():
            return pydoc.read(data)
        case TextFiles():
            return text.read(data)
        case HubText():
            return hub.read(data)
    raise TypeError(data)


def load_text(data: TextData) -> Corpus:
    """Returns the corpus as ids."""
    corpus = text.load_encoded(read(data), data)
    if isinstance(data, PennTreebank):
        ptb.check_counts(corpus)
    return corpus if data.fraction == 1 else corpus.with_fraction(data.fraction)


def load_rated(data: RatedData) -> Rated:
    """Returns texts with their ratings."""
    match data:
        case CornellReviews():
            return cornell.read(data)
        case VaderSnippets():
            return vader.read(data)
        case RatedTable():
            return text_regression.read(data)
    raise TypeError(data)


def split_words(splitting: str, text: str) -> list[str]:
    """Splits a new text into words by the rule of the training texts, "cornell" or "plain"."""
    return cornell.words(text) if splitting == "cornell" else rated.words(text)
