"""Texts with a number each, as all sources of the regression task provide them."""

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass, field

from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.fields import FLOAT32_LIMIT

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
SIGNS = re.compile(r"(.)\1*")  # repetitions of one sign are one word
MIN_TEXTS = 10  # so that each part of a split has one


@dataclass(frozen=True)
class Rated:
    """Texts as words, each with its rating, in the order of the source."""

    texts: list[list[str]] = field(repr=False)
    ratings: list[float] = field(repr=False)
    origin: str  # the source, for messages
    # train, valid or test for each text, where the source has parts
    parts: list[str] = field(default_factory=list, repr=False)
    # the position of each text in the source, such as "line 3", for messages
    places: list[str] = field(default_factory=list, repr=False)
    # who or what each text is from, such as its reviewer, where the source says so
    sources: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if len(self.texts) < MIN_TEXTS:
            raise ConfigError(f"{self.origin} has {len(self.texts)} texts; it needs at least {MIN_TEXTS}")
        if not any(self.texts):
            raise ConfigError(
                f"{self.origin} has no word in any of its {len(self.texts):,} texts; choose another "
                "data.column"
            )
        if min(self.ratings) == max(self.ratings):
            raise ConfigError(
                f"{self.origin} gives every text the same rating, {self.ratings[0]:g}; choose "
                "another data.rating_column"
            )

    def shortened(self, train: int, others: int, words: int | None) -> "Rated":
        """A small part: evenly spaced texts of each part, with their first `words` words (None: all). `train`
        is the number of texts of the training part, or of all texts if the source has no parts. Each other
        part has `others` texts.
        """
        chosen: list[int] = []
        for part in sorted({*self.parts}) or [""]:
            texts = [number for number in range(len(self.texts)) if not part or self.parts[number] == part]
            count = min(len(texts), train if part in ("train", "") else others)
            chosen += [texts[i * len(texts) // count] for i in range(count)]
        chosen.sort()
        return Rated(
            [self.texts[number][:words] for number in chosen],
            [self.ratings[number] for number in chosen],
            self.origin,
            [self.parts[number] for number in chosen] if self.parts else [],
            [self.places[number] for number in chosen] if self.places else [],
            [self.sources[number] for number in chosen] if self.sources else [],
        )

    @property
    def without_words(self) -> list[int]:
        """The numbers of the texts that have no words."""
        return [number for number, text in enumerate(self.texts) if not text]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(json.dumps([self.texts, self.ratings, self.parts]).encode()).hexdigest()


def words(text: str) -> list[str]:
    """Splits a text at white space into lower-case words.

    Punctuation and symbols at the ends of a word become words of their own.
    """
    result = []
    for word in unicodedata.normalize("NFC", text).lower().split():
        first = next((n for n, character in enumerate(word) if not is_sign(character)), len(word))
        end = len(word) - next(
            (n for n, character in enumerate(reversed(word[first:])) if not is_sign(character)), 0
        )
        result += [*signs(word[:first]), *([word[first:end]] if first < end else []), *signs(word[end:])]
    return result


def is_sign(character: str) -> bool:
    """Whether a character is punctuation or a symbol."""
    return unicodedata.category(character)[0] in "PS"


def signs(row: str) -> list[str]:
    return [match[0] for match in re.finditer(SIGNS, row)]


def number(value: object, where: str) -> float:
    """Parses a rating; raises a ConfigError that begins with `where`."""
    try:
        if not isinstance(value, str) or NUMBER.fullmatch(value.strip(" ")):
            rating = float(value)  # type: ignore[arg-type]
            if abs(rating) < FLOAT32_LIMIT:
                return rating
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(
        f"{where} holds {str(value)[:40]!r}, which is not a rating; write a finite number, such as 3.5 or "
        "1e-2"
    )
