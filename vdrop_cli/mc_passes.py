"""Passes of MC dropout with any model: their options, and how they stop and resume.

The table `mc` shows the error by the number of passes that are averaged.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdrop_cli.assessment import Row
from vdrop_cli.measured import Measured


@dataclass(frozen=True)
class PassOptions:
    """How passes are made."""

    samples: int  # passes of each model
    batch: int  # passes of a language model that may share a batch
    seed: int  # of the masks
    word_dropout: bool  # whether words are dropped, too
    factors: Sequence[float] = ()  # on dropout probabilities; the best on validation is used. Empty: 1
    calibration: bool = False  # whether they measure how sure a language model is of the next word


class McPasses(ABC):
    """MC dropout that can stop, and that resumes from `state_dict` to the same result bit for bit."""

    @property
    @abstractmethod
    def words(self) -> int:
        """The number of words read so far, over all passes."""

    @property
    @abstractmethod
    def total(self) -> int:
        """The number of words to read, over all passes."""

    @abstractmethod
    def run(self) -> Iterator[int]:
        """Reads to the end; yields the number of words of each part. It can be stopped after any part."""

    @abstractmethod
    def results(self) -> Measured:
        """Returns the metrics and tables, once all passes are finished.

        The table `mc` has a row, made by `mc_row`, for each of `sample_counts`.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns how far the passes have come, as tensors on the CPU and plain values."""

    @abstractmethod
    def require_fitting(self, state: dict[str, Any]) -> None:
        """Raises ValueError where `state` cannot be a state of these passes."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Restores a state that `require_fitting` accepts."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a state. Raises ValueError, and changes nothing, if it does not fit these passes."""
        self.require_fitting(state)
        self.restore(state)

    def finish(self) -> Measured:
        """Reads to the end and returns the results."""
        for _ in self.run():
            pass
        return self.results()


def sample_counts(samples: int) -> list[int]:
    """Returns 1, 2, 5, 10, 20, 50, … below `samples`, and `samples`."""
    counts = [factor * 10**power for power in range(len(str(samples))) for factor in (1, 2, 5)]
    return sorted({*(count for count in counts if count < samples), samples})


def mc_row(measure: str, count: int, values: list[float]) -> Row:
    """Returns a row of the table `mc`: mean and standard deviation of a measure over disjoint groups.

    Each group averages `count` passes; `values` has the measure of each group. A single group has no standard
    deviation.
    """
    mean = sum(values) / len(values)  # `fmean` would round differently from recorded numbers
    return {"samples": count, measure: mean, "deviation": std(values), "groups": len(values)}


def std(values: list[float]) -> float | None:
    """Returns the standard deviation of a sample, None of a single value."""
    return torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else None


def is_numeric(value: Any, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Returns whether `value` is a tensor of that shape and type, without NaN."""
    return (
        isinstance(value, Tensor)
        and value.shape == torch.Size(shape)
        and value.dtype == dtype
        and not bool(value.isnan().any())
    )


def is_state_of(parts: Any, zeros: Sequence[Tensor]) -> bool:
    """Returns whether `parts` can be the carried state of a model whose zero state is `zeros`.

    It must be a list of tensors of the same shapes and types, without NaN.
    """
    return (
        isinstance(parts, list)
        and len(parts) == len(zeros)
        and all(is_numeric(part, zero.shape, zero.dtype) for part, zero in zip(parts, zeros, strict=True))
    )


def place_in_text(number: Any, tokens: int, steps: int) -> int:
    """Returns `number`, the index of the next segment of `steps` tokens.

    Raises ValueError unless it is in [0, number of segments].
    """
    if type(number) is not int or not 0 <= number <= -(-tokens // steps):
        raise ValueError("its place is outside the text")
    return number
