"""Dropout policies as plain data: what is dropped, with which probability, and for how long. No torch and no
Hydra here.
"""

import numbers
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from typing import TypeVar


class Choice(Enum):
    """A setting with a few values, written by name."""

    def __str__(self) -> str:
        return self.name


class Cell(Choice):
    lstm = "lstm"
    gru = "gru"


class Policy(Choice):
    none = "none"
    zaremba = "zaremba"  # new masks every step, on layer inputs and the output (Zaremba et al. 2014)
    naive = "naive"  # new masks every step and gate, on layer inputs and the recurrence
    moon = "moon"  # one mask over time on the cell state (Moon et al. 2015, rnnDrop)
    variational = (
        "variational"  # one mask over time on layer inputs, the recurrence, word types and the output
    )


class Tie(Choice):
    """Which gates of a layer share a mask."""

    all = "all"  # one mask for all gates (Gal & Ghahramani 2016, eq. 7)
    none = "none"  # a mask for each gate (eq. 5)
    gates = "gates"  # one for the sigmoid gates, another for the candidate (LSTM g, GRU n)


class WordMask(Choice):
    type = "type"  # a word that is dropped is dropped wherever it stands in the sequence
    token = "token"  # each occurrence for itself, as in the authors' code until 2017-01


NEW_EVERY_STEP = (Policy.zaremba, Policy.naive)
PLACES = ("p_word", "p_x", "p_h", "p_c", "p_out")
BY_LAYER = ("p_x", "p_h", "p_c")  # may differ from layer to layer
ALLOWED = {  # the probabilities that each policy uses
    Policy.none: (),
    Policy.zaremba: ("p_x", "p_out"),
    Policy.naive: ("p_word", "p_x", "p_h", "p_out"),
    Policy.moon: ("p_word", "p_c"),
    Policy.variational: ("p_word", "p_x", "p_h", "p_out"),
}

AnyChoice = TypeVar("AnyChoice", bound=Choice)
Probability = float | Sequence[float]  # of dropping, in [0, 1); a sequence has one for each layer


def choice(kind: type[AnyChoice], name: str, value: object) -> AnyChoice:
    """A member of `kind`, given as such or by its name; a ValueError names the setting."""
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value in kind.__members__:
        return kind[value]
    raise ValueError(f"{name} must be a {kind.__name__}: {', '.join(kind.__members__)}; got {value!r}")


def checked_probability(name: str, p: object) -> float:
    """`p`, if it is a probability of dropping; a ValueError that names it otherwise."""
    if isinstance(p, bool) or not isinstance(p, numbers.Real) or not 0 <= float(p) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {p!r}")
    return float(p)


@dataclass(frozen=True)
class Dropout:
    """A policy and its probabilities of dropping, each in [0, 1).

    Policies, ties and word masks may be given by name, as in `Dropout("variational", p_x=0.3, p_h=0.3)`.
    `p_x`, `p_h` and `p_c` may be sequences with a probability for each layer. `tie` is `none` for the policy
    naive and `all` for the others, unless given. Raises ValueError for a probability that is out of range or
    that the policy does not use.
    """

    policy: Policy | str
    _: KW_ONLY
    tie: Tie | str | None = None
    p_word: float = 0.0  # a word of the vocabulary
    p_x: Probability = 0.0  # the input of each layer
    p_h: Probability = 0.0  # the previous hidden state where it enters the recurrent product
    p_c: Probability = 0.0  # the cell state
    p_out: float = 0.0  # the output of the last layer
    word_mask: WordMask | str = WordMask.type

    def __post_init__(self) -> None:
        policy = choice(Policy, "policy", self.policy)
        usual = Tie.none if policy is Policy.naive else Tie.all
        tie = usual if self.tie is None else choice(Tie, "tie", self.tie)
        if tie is not usual and policy not in (Policy.variational, Policy.naive):
            raise ValueError(f"tie must be {usual} with policy={policy}, got {tie}")
        word_mask = choice(WordMask, "word_mask", self.word_mask)
        for name, value in (("policy", policy), ("tie", tie), ("word_mask", word_mask)):
            object.__setattr__(self, name, value)
        for name in PLACES:
            given = getattr(self, name)
            if name in BY_LAYER and isinstance(given, Sequence) and not isinstance(given, str):
                given = tuple(given)
                object.__setattr__(self, name, given)
            for p in given if isinstance(given, tuple) else (given,):
                if checked_probability(name, p) > 0 and name not in ALLOWED[policy]:
                    raise ValueError(f"{name} must be 0 with policy={policy}, which does not use it, got {p}")
        if word_mask is WordMask.token and self.p_word == 0:
            raise ValueError("word_mask must be type where p_word=0, there is nothing to mask, got token")

    def of_layers(self, name: str, layers: int) -> tuple[float, ...]:
        """The probability `p_x`, `p_h` or `p_c` of each layer; a ValueError where there are not so many."""
        p = getattr(self, name)
        if not isinstance(p, tuple):
            return (p,) * layers
        if len(p) != layers:
            raise ValueError(f"{name} must be one probability or {layers}, one for each layer, got {len(p)}")
        return p

    @property
    def drops(self) -> bool:
        """Whether anything is ever dropped."""
        return self.largest > 0

    @property
    def largest(self) -> float:
        """The largest of all probabilities."""
        given = [getattr(self, name) for name in PLACES]
        return float(max(p for one in given for p in (one if isinstance(one, tuple) else (one,))))

    @property
    def new_every_step(self) -> bool:
        """Whether masks are drawn anew at every step, rather than held over the sequence."""
        return self.policy in NEW_EVERY_STEP


NO_DROPOUT = Dropout(Policy.none)
