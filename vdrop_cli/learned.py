"""What a model knows of its training text beside its weights: all that prediction needs of it, as plain
values in the checkpoint.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from vdrop_cli.stored import is_finite

LINE_END, UNKNOWN_WORD = "<eos>", "<unk>"  # as they stand in a language model's vocabulary


@dataclass(frozen=True)
class Words:
    """Of a language model: `vocabulary[id]` is the word."""

    vocabulary: list[str] = field(repr=False)
    line_end: str | None  # the word that stands for the end of a line; None: the text had one line
    unknown: str | None  # the word that stands for all that are not in the vocabulary; None: there is none

    def __post_init__(self) -> None:
        require_vocabulary(self.vocabulary)
        for name, expected in (("line_end", LINE_END), ("unknown", UNKNOWN_WORD)):
            wanted = expected if expected in self.vocabulary else None
            require(getattr(self, name) == wanted, name, repr(wanted))

    @classmethod
    def of(cls, vocabulary: list[str]) -> "Words":
        known = set(vocabulary)
        return cls(vocabulary, *(word if word in known else None for word in (LINE_END, UNKNOWN_WORD)))


@dataclass(frozen=True)
class Ratings:
    """Of a model of ratings: ids of words are given from 2 on, after <start> and <unknown>."""

    vocabulary: list[str] = field(repr=False)
    mean: float  # of the training part's ratings
    deviation: float  # their standard deviation
    chunk_words: int | None  # longer texts are cut into chunks of so many words
    splitting: str  # how a text becomes words: "cornell" or "plain"
    noise_part: str  # the part that the observation noise is fitted to: "valid" or "train"
    noise: float | None = (
        # standard deviation of the observations, by the standard approximation; None: not known at that
        # moment
        None
    )

    def __post_init__(self) -> None:
        require_vocabulary(self.vocabulary)
        require(is_number(self.mean), "mean", "a finite number")
        require(is_number(self.deviation) and self.deviation > 0, "deviation", "above 0")
        chunk = self.chunk_words
        require(
            chunk is None or (type(chunk) is int and 2 <= chunk < 2**31), "chunk_words", "at least 2, or null"
        )
        require(self.splitting in ("cornell", "plain"), "splitting", "cornell or plain")
        require(self.noise_part in ("valid", "train"), "noise_part", "valid or train")
        require(self.noise is None or (is_number(self.noise) and self.noise > 0), "noise", "above 0, or null")


Learned = Words | Ratings


def require(holds: bool, name: str, wanted: str) -> None:
    if not holds:
        raise ValueError(f"learned.{name} must be {wanted}")


def is_number(value: object) -> bool:
    """A finite float: torch does not reckon with all integers."""
    return type(value) is float and is_finite(value)


def require_vocabulary(vocabulary: object) -> None:
    words = isinstance(vocabulary, list) and all(type(word) is str for word in vocabulary)
    require(words and len(set(vocabulary)) == len(vocabulary), "vocabulary", "a list of different words")  # type: ignore[arg-type,call-overload]


def plain(learned: Learned) -> dict[str, Any]:
    """As it is written into a checkpoint."""
    return {f.name: getattr(learned, f.name) for f in dataclasses.fields(learned)}


def read(held: dict[str, Any], of_ratings: bool) -> Learned:
    """From what `plain` wrote. Raises ValueError or TypeError where it is something else."""
    return Ratings(**held) if of_ratings else Words(**held)
