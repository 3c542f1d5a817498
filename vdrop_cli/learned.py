"""What prediction needs of the training text beside the weights, as plain values in the checkpoint."""

from dataclasses import dataclass, field
from typing import Any

from vdrop_cli.stored import is_finite

LINE_END_WORD, UNKNOWN_WORD = "<eos>", "<unk>"  # their names in a language model's vocabulary


@dataclass(frozen=True)
class Words:
    """What a language model learned of its text; `vocabulary[id]` is the word."""

    vocabulary: list[str] = field(repr=False)
    line_end: str | None  # the token for the end of a line; None: the training text had one line
    unknown: str | None  # the token for words outside the vocabulary; None: the vocabulary has none

    def __post_init__(self) -> None:
        require_vocabulary(self.vocabulary)
        for name, expected in (("line_end", LINE_END_WORD), ("unknown", UNKNOWN_WORD)):
            token = expected if expected in self.vocabulary else None
            require(getattr(self, name) == token, name, repr(token))

    @classmethod
    def from_vocabulary(cls, vocabulary: list[str]) -> "Words":
        """Returns `Words`, with the tokens for line ends and unknown words if the vocabulary has them."""
        known = set(vocabulary)
        return cls(vocabulary, *(word if word in known else None for word in (LINE_END_WORD, UNKNOWN_WORD)))


@dataclass(frozen=True)
class Ratings:
    """What a model of ratings learned of its texts; ids of words start at 2, after <start> and <unknown>."""

    vocabulary: list[str] = field(repr=False)
    mean: float  # of the training part's ratings
    deviation: float  # their standard deviation
    chunk_words: int | None  # longer texts are cut into chunks of this many words
    splitting: str  # how a text becomes words: "cornell" or "plain"
    noise_part: str  # the part that the observation noise is fitted to: "valid" or "train"
    # standard deviation of the observations, by the standard approximation; None: not known yet
    noise: float | None = None

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


def require(holds: bool, name: str, expected: str) -> None:
    """Raises ValueError, which names the value, unless the condition holds."""
    if not holds:
        raise ValueError(f"learned.{name} must be {expected}")


def is_number(value: object) -> bool:
    """Returns whether a value is a finite float; torch cannot compute with all integers."""
    return type(value) is float and is_finite(value)


def require_vocabulary(vocabulary: object) -> None:
    """Raises ValueError unless it is a list of different words."""
    words = isinstance(vocabulary, list) and all(type(word) is str for word in vocabulary)
    require(words and len(set(vocabulary)) == len(vocabulary), "vocabulary", "a list of different words")  # type: ignore[arg-type,call-overload]


def to_dict(learned: Learned) -> dict[str, Any]:
    """Returns the values that a checkpoint stores."""
    return dict(vars(learned))


def from_dict(values: dict[str, Any], is_regression: bool) -> Learned:
    """Returns the object from the values of `to_dict`; raises ValueError or TypeError for any others."""
    return Ratings(**values) if is_regression else Words(**values)
