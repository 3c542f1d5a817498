"""Dropout policies as plain data: what is dropped, with which probability, and for how long.

This module imports neither torch nor Hydra.
"""

import numbers
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from enum import Enum
from typing import Any, TypeVar


class Choice(Enum):
    """A setting with a fixed set of values, written by name."""

    def __str__(self) -> str:
        return self.name


class Cell(Choice):
    lstm = "lstm"
    gru = "gru"


class Policy(Choice):
    none = "none"
    zaremba = "zaremba"  # new masks every step, on layer inputs and the output (Zaremba et al. 2014)
    naive = "naive"  # new masks every step and gate, on layer inputs, the recurrence and the output
    moon = "moon"  # one mask over time on the cell state (Moon et al. 2015, rnnDrop)
    # one mask over time on layer inputs, the recurrence, word types and the output
    variational = "variational"


class Tie(Choice):
    """Which gates of a layer share a mask."""

    all = "all"  # one mask for all gates (Gal & Ghahramani 2016, eq. 7)
    none = "none"  # a mask for each gate (eq. 5)
    gates = "gates"  # one for the sigmoid gates, another for the candidate (LSTM g, GRU n)


class WordMask(Choice):
    type = "type"  # a dropped word is dropped wherever it occurs in the sequence
    token = "token"  # each occurrence independently, as in the authors' code until 2017-01


NEW_EVERY_STEP = (Policy.zaremba, Policy.naive)
WEIGHT = "p_weight"
PLACES = ("p_word", "p_x", "p_h", "p_c", "p_out", "p_head", WEIGHT)
BY_LAYER = ("p_x", "p_h", "p_c")  # may differ between layers
BETWEEN = "p_between"  # the inputs of all layers but the first, where they differ from the first one's
RESAMPLABLE = ("p_x", BETWEEN, "p_h", "p_out", "p_head")  # whose masks can be held or new at every step
STATE_PLACES = (BETWEEN, "p_h", "p_out")  # places where the hidden state of a layer is used
ALLOWED = {  # the probabilities that each policy uses
    Policy.none: (),
    Policy.zaremba: ("p_x", "p_out", "p_head"),
    Policy.naive: ("p_word", "p_x", "p_h", "p_out", "p_head"),
    Policy.moon: ("p_word", "p_c"),
    Policy.variational: ("p_word", "p_x", "p_h", "p_out", "p_head", WEIGHT),
}

AnyChoice = TypeVar("AnyChoice", bound=Choice)
Probability = float | Sequence[float]  # of dropping, in [0, 1); a sequence has one for each layer


def choice(kind: type[AnyChoice], name: str, value: object) -> AnyChoice:
    """Returns a member of `kind` from itself or its name; raises a ValueError that names the setting."""
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value in kind.__members__:
        return kind[value]
    raise ValueError(f"{name} must be a {kind.__name__}: {', '.join(kind.__members__)}; got {value!r}")


def checked_probability(name: str, p: object) -> float:
    """Returns `p` as a float; raises a ValueError that names it unless it is in [0, 1)."""
    if isinstance(p, bool) or not isinstance(p, numbers.Real) or not 0 <= float(p) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {p!r}")
    return float(p)


@dataclass(frozen=True)
class Dropout:
    """A policy and its probabilities of dropping, each in [0, 1).

    Policies, ties and word masks may be names, as in `Dropout("variational", p_x=0.3, p_h=0.3)`. `p_x`, `p_h`
    and `p_c` may be sequences with a probability for each layer. `tie` defaults to `none` for the policy
    naive and to `all` for variational; the others take no `tie`. `new_each_step` is for the policy
    variational: it lists places of `RESAMPLABLE` whose masks are new at every step instead of held over the
    sequence (Melis et al. 2018 hold only the mask on the recurrence). With `one_state_mask`, the mask on the
    hidden state of a layer is used in three places: on the recurrence, on the input of the next layer, and on
    the output of the last layer (Inan et al. 2017). `p_h` is the probability of all three, and `p_x` is that
    of the first layer's input. Raises ValueError for a probability that is out of range or that the policy
    does not use.
    """

    policy: Policy | str
    _: KW_ONLY
    tie: Tie | str | None = None
    p_word: float = 0.0  # a word of the vocabulary
    p_x: Probability = 0.0  # the input of each layer
    # the inputs of all layers but the first; None: p_x. In `new_each_step`, p_x means the first layer alone
    p_between: float | None = None
    p_h: Probability = 0.0  # the previous hidden state where it enters the recurrent product
    p_c: Probability = 0.0  # the cell state
    p_out: float = 0.0  # the output of the last layer
    # the projected output of a language model with tied word vectors, where it enters the head; 0 in layers
    p_head: float = 0.0
    # an element of the recurrent weights, for all sequences of a batch (Merity et al. 2018)
    p_weight: float = 0.0
    word_mask: WordMask | str = WordMask.type
    new_each_step: Sequence[str] = ()
    one_state_mask: bool = False  # of the policy variational; p_between and p_out are then unset

    def __post_init__(self) -> None:
        policy = choice(Policy, "policy", self.policy)
        default = Tie.none if policy is Policy.naive else Tie.all
        tie = default if self.tie is None else choice(Tie, "tie", self.tie)
        if tie is not default and policy not in (Policy.variational, Policy.naive):
            raise ValueError(f"tie must be {default} with policy={policy}, got {tie}")
        word_mask = choice(WordMask, "word_mask", self.word_mask)
        for name, member in (("policy", policy), ("tie", tie), ("word_mask", word_mask)):
            object.__setattr__(self, name, member)
        for name in PLACES:
            value = getattr(self, name)
            if name in BY_LAYER and isinstance(value, Sequence) and not isinstance(value, str):
                value = tuple(value)
                object.__setattr__(self, name, value)
            for p in value if isinstance(value, tuple) else (value,):
                if checked_probability(name, p) > 0 and name not in ALLOWED[policy]:
                    raise ValueError(f"{name} must be 0 with policy={policy}, which does not use it, got {p}")
        self.check_between(policy)
        self.check_new_each_step(policy)
        if self.one_state_mask:
            self.check_one_state_mask(policy, tie)
        if word_mask is WordMask.token and self.p_word == 0:
            raise ValueError("word_mask must be type where p_word=0, which masks no words, got token")

    def check_between(self, policy: Policy) -> None:
        """Raises ValueError for a `p_between` that the policy does not use, or that `p_x` contradicts."""
        if self.p_between is None:
            return
        if checked_probability(BETWEEN, self.p_between) > 0 and "p_x" not in ALLOWED[policy]:
            raise ValueError(
                f"{BETWEEN} must be unset with policy={policy}, which does not use it, got {self.p_between}"
            )
        if isinstance(self.p_x, tuple):
            raise ValueError(f"{BETWEEN} must be unset where p_x has a probability for each layer")

    def check_new_each_step(self, policy: Policy) -> None:
        """Raises ValueError for places outside `RESAMPLABLE`, or for a policy other than variational."""
        if isinstance(self.new_each_step, str):
            raise ValueError(f"new_each_step must be a list of places, got {self.new_each_step!r}")
        places = tuple(self.new_each_step)
        if places and policy is not Policy.variational:
            raise ValueError(f"new_each_step must be empty with policy={policy}, got {', '.join(places)}")
        for place in places:
            if place not in RESAMPLABLE:
                raise ValueError(f"new_each_step must be of {', '.join(RESAMPLABLE)}, got {place!r}")
        object.__setattr__(self, "new_each_step", tuple(p for p in RESAMPLABLE if p in places))

    def check_one_state_mask(self, policy: Policy, tie: Tie) -> None:
        """Raises ValueError for values that contradict `one_state_mask`."""
        if policy is not Policy.variational:
            raise ValueError(f"one_state_mask must be False with policy={policy}, got True")
        if tie is not Tie.all:
            raise ValueError(f"one_state_mask must be False with tie={tie}, got True")
        if self.p_between is not None:
            raise ValueError(f"p_between must be unset with one_state_mask=True, got {self.p_between}")
        if self.p_out > 0:
            raise ValueError(f"p_out must be 0 with one_state_mask=True, got {self.p_out}")
        if isinstance(self.p_x, tuple):
            raise ValueError(
                "p_x must be one probability with one_state_mask=True, that of the first layer's input, got "
                f"{self.p_x}"
            )
        if not any(self.p_h if isinstance(self.p_h, tuple) else (self.p_h,)):
            raise ValueError("one_state_mask must be False with p_h=0, got True")
        fixed_places = [place for place in self.new_each_step if place in STATE_PLACES]
        if fixed_places:
            raise ValueError(
                f"new_each_step must be without {', '.join(fixed_places)} with one_state_mask=True, which "
                "holds their mask"
            )

    def is_new_each_step(self, place: str) -> bool:
        """Whether the masks of a place, one of `RESAMPLABLE`, are resampled at every step."""
        return self.policy in NEW_EVERY_STEP or place in self.new_each_step

    def scaled(self, factor: float) -> "Dropout":
        """Returns the policy with all probabilities multiplied; raises ValueError unless all are below 1."""
        changed: dict[str, Any] = {}
        for name in (*PLACES, BETWEEN):
            p = getattr(self, name)
            if isinstance(p, tuple):
                changed[name] = tuple(factor * one for one in p)
            elif p is not None:
                changed[name] = factor * p
        return replace(self, **changed)

    def layer_probabilities(self, name: str, layers: int) -> tuple[float, ...]:
        """Returns `p_x`, `p_h` or `p_c` of each layer; raises ValueError for another number of layers."""
        p = getattr(self, name)
        if name == "p_x" and self.one_state_mask:
            return (self.p_x, *self.layer_probabilities("p_h", layers)[:-1])  # type: ignore[arg-type]
        if name == "p_x" and self.p_between is not None:
            return (p, *[self.p_between] * (layers - 1))
        if not isinstance(p, tuple):
            return (p,) * layers
        if len(p) != layers:
            raise ValueError(f"{name} must be one probability or {layers}, one for each layer, got {len(p)}")
        return p

    def without_words(self) -> "Dropout":
        """Returns the same policy without masks on words."""
        return replace(self, p_word=0.0, word_mask=WordMask.type)

    @property
    def drops(self) -> bool:
        """Whether any probability is above 0."""
        return self.max_probability > 0

    @property
    def max_probability(self) -> float:
        """The largest of all probabilities."""
        values = [getattr(self, name) for name in PLACES] + [self.p_between or 0.0]
        return float(max(p for value in values for p in (value if isinstance(value, tuple) else (value,))))

    @property
    def new_every_step(self) -> bool:
        """Whether any mask is resampled at every step, rather than held over the sequence."""
        return self.policy in NEW_EVERY_STEP or bool(self.new_each_step)


NO_DROPOUT = Dropout(Policy.none)
