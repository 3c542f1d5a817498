"""Intervals of predicted numbers, Gaussian, from quantiles of the passes or conformal; and their quality.

R texts  n validation texts  S passes of MC dropout
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from vdrop_cli.uncertainty import Predictive

LEVELS = (50, 80, 90, 95)  # per cent, of metrics
CURVE = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95)  # per cent, of the calibration curve
BISECTIONS = 60  # halvings of a bracket; a double has 53 bits


class TooFewTexts(ValueError):
    """The validation part is too small for a conformal level; the message says how many texts it takes."""


class Bounds(NamedTuple):
    """The ends of an interval for each text."""

    low_R: Tensor
    high_R: Tensor

    def coverage(self, ratings_R: Tensor) -> float:
        """Returns the share of texts whose rating lies in its interval."""
        return self.contains(ratings_R).double().mean().item()

    def contains(self, ratings_R: Tensor) -> Tensor:
        """Returns whether each rating lies in its interval, [R]; the ends belong to it."""
        return (self.low_R <= ratings_R) & (ratings_R <= self.high_R)

    def width(self) -> float:
        """Returns the mean width over texts, in rating units."""
        return (self.high_R - self.low_R).mean().item()

    def score(self, ratings_R: Tensor, level: float) -> float:
        """Returns the interval score, averaged over texts; the lower, the better.

        It is the width, plus 2 / (1 - level / 100) times the distance of the rating from its interval where
        it lies outside (Gneiting & Raftery 2007, eq. 43).
        """
        outside_R = (self.low_R - ratings_R).clamp(min=0) + (ratings_R - self.high_R).clamp(min=0)
        return self.width() + 2 / (1 - level / 100) * outside_R.mean().item()


Intervals = Callable[[float], Bounds]  # the bounds for a level in per cent, in (0, 100)


def gaussian(predictive: Predictive) -> Intervals:
    """Returns intervals symmetric around the mean that contain `level` per cent of the Gaussian."""

    def bounds(level: float) -> Bounds:
        half_R = predictive.half_width(level)
        return Bounds(predictive.mean_R - half_R, predictive.mean_R + half_R)

    return bounds


def quantile(predictive: Predictive) -> Intervals:
    """Returns intervals between quantiles of the mixture of all passes, each with the observation noise.

    They need not be symmetric. With one pass they are the Gaussian ones.
    """

    def bounds(level: float) -> Bounds:
        tail = (1 - level / 100) / 2
        return Bounds(mixture_quantile(predictive, tail), mixture_quantile(predictive, 1 - tail))

    return bounds


def mixture_quantile(predictive: Predictive, probability: float) -> Tensor:
    """Returns the value below which `probability` of each text's mixture lies, [R], by bisection."""
    # the quantile of the mixture lies between the lowest and the highest of its components' quantiles
    offset = predictive.noise * float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))
    low_R = predictive.passes_SR.amin(0) + offset
    high_R = predictive.passes_SR.amax(0) + offset
    for _ in range(BISECTIONS):
        middle_R = (low_R + high_R) / 2
        is_below_R = predictive.cdf(middle_R) < probability
        low_R = torch.where(is_below_R, middle_R, low_R)
        high_R = torch.where(is_below_R, high_R, middle_R)
    return (low_R + high_R) / 2


def conformal(predictive: Predictive, scores_n: Tensor) -> Intervals:
    """Returns split-conformal intervals: the standard deviation of each text times a quantile of `scores_n`.

    `scores_n` are those of `conformal_scores`. Whatever the model, an interval contains the rating of a new
    text with a probability of at least `level`, and at most `level` + 1 / (n + 1) without ties, if new texts
    and the n validation texts are exchangeable (Lei et al. 2018, theorem 2.2). A call of the result raises
    TooFewTexts where n is too small for the level.
    """

    def bounds(level: float) -> Bounds:
        half_R = predictive.std_R * conformal_quantile(scores_n, level)
        return Bounds(predictive.mean_R - half_R, predictive.mean_R + half_R)

    return bounds


def conformal_scores(predictive: Predictive, ratings_R: Tensor) -> Tensor:
    """Returns the absolute errors of validation texts in standard deviations, ascending [n]."""
    return ((ratings_R.double() - predictive.mean_R).abs() / predictive.std_R).sort().values


def conformal_quantile(scores_n: Tensor, level: float) -> float:
    """Returns the ⌈(n + 1) · level / 100⌉-th smallest score; raises TooFewTexts where n is smaller."""
    share = Fraction(str(level)) / 100
    rank = math.ceil((len(scores_n) + 1) * share)
    if rank > len(scores_n):
        needed = math.ceil(share / (1 - share))
        raise TooFewTexts(
            f"conformal intervals of {level:g} % need {needed:,} validation texts, got {len(scores_n):,}"
        )
    return scores_n[rank - 1].item()


def calibration_error(intervals: Intervals, ratings_R: Tensor) -> float:
    """Returns the mean distance between coverage and level over `CURVE`, in [0, 1)."""
    distances = [abs(intervals(level).coverage(ratings_R) - level / 100) for level in CURVE]
    return sum(distances) / len(distances)
