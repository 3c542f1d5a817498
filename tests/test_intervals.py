"""Intervals contain what their level says, by law and by numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from vdrop_cli.intervals import (
    CURVE,
    Bounds,
    TooFewTexts,
    calibration_error,
    conformal,
    conformal_quantile,
    conformal_scores,
    gaussian,
    quantile,
)
from vdrop_cli.uncertainty import Predictive


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_coverage_width_and_score_are_those_of_the_definition() -> None:
    """Two ratings inside, one 1 below, one 2 above: at 80 % the penalty is 10 times the distance."""
    bounds = Bounds(torch.tensor([0.0, 0, 0, 0]), torch.tensor([1.0, 1, 2, 4]))
    ratings = torch.tensor([0.0, 1, -1, 6])
    assert bounds.contains(ratings).tolist() == [True, True, False, False]
    assert bounds.coverage(ratings) == 0.5 and bounds.width() == 2
    assert bounds.score(ratings, 80) == pytest.approx(2 + 10 * (1 + 2) / 4)


@pytest.mark.parametrize("level", [50, 90, 99.9])
def test_with_one_pass_quantiles_are_the_gaussians(level: float) -> None:
    predicted = Predictive(drawn(1, 30), 0.3)
    for own, other in zip(quantile(predicted)(level), gaussian(predicted)(level), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", [10, 80, 95])
def test_the_ends_of_a_quantile_interval_have_the_tails_outside(level: float) -> None:
    """Also where the passes are far apart, and their mixture has gaps."""
    predicted = Predictive(10 * drawn(9, 40), 0.2)
    low, high = quantile(predicted)(level)
    tail = torch.full((40,), (1 - level / 100) / 2, dtype=torch.float64)
    torch.testing.assert_close(predicted.cdf(low), tail, rtol=0, atol=1e-9)
    torch.testing.assert_close(predicted.cdf(high), 1 - tail, rtol=0, atol=1e-9)


def test_a_skewed_mixture_has_a_skewed_interval() -> None:
    """Nine passes at 0 and one at 10: the interval of 80 % ends near 0 below, beyond the mean above."""
    predicted = Predictive(torch.tensor([[0.0]] * 9 + [[10.0]]), 0.01)
    low, high = quantile(predicted)(90)
    assert low.item() == pytest.approx(0, abs=0.03) and high.item() == pytest.approx(10, abs=0.03)
    assert gaussian(predicted)(90).low_R.item() < -2


@pytest.mark.parametrize(
    ("scores", "level", "expected"),
    [
        (range(1, 20), 95, 19),  # ⌈20 · 0.95⌉
        (range(1, 10), 90, 9),
        (range(1, 11), 50, 6),  # ⌈11 · 0.5⌉
        (range(1, 1000), 99.9, 999),  # exactly 999, though 1000 · 0.999 is more in floating point
        (range(1, 4), 25, 1),
    ],
)
def test_the_conformal_quantile_is_the_score_of_that_rank(
    scores: range, level: float, expected: float
) -> None:
    assert conformal_quantile(torch.tensor(scores, dtype=torch.float64), level) == expected


@pytest.mark.parametrize(("level", "needed"), [(50, 1), (80, 4), (90, 9), (95, 19), (99.9, 999)])
def test_too_few_validation_texts_are_an_error_that_says_how_many_it_takes(level: float, needed: int) -> None:
    scores = drawn(needed).abs().sort().values
    assert conformal_quantile(scores, level) == scores[-1]
    with pytest.raises(TooFewTexts, match=rf"need {needed:,} validation texts, got {needed - 1:,}"):
        conformal_quantile(scores[1:], level)


@pytest.mark.parametrize("level", [50, 80, 90, 95])
def test_conformal_coverage_is_guaranteed_whatever_the_model(level: float) -> None:
    """A model that is wrong in mean, in spread and in shape: its Gaussian intervals fail. Over 2,000 draws of
    39 validation texts and one more, the conformal ones cover between level and level + 1/40.
    """
    draws, texts = 2_000, 40
    passes = drawn(3, draws * texts) * 0.2
    ratings = 1 + drawn(draws * texts).abs() ** 1.5
    predicted = Predictive(passes, 0.1)
    assert gaussian(predicted)(level).coverage(ratings) < level / 200
    scores = ((ratings - predicted.mean_R).abs() / predicted.std_R).view(draws, texts)
    inside = []
    for own in scores:
        limit = conformal_quantile(own[:-1].sort().values, level)
        inside.append(float(own[-1] <= limit))
    expected = math.ceil(texts * level / 100) / texts
    assert sum(inside) / draws == pytest.approx(expected, abs=3 * math.sqrt(0.25 / draws))


def test_conformal_intervals_reach_the_rank_of_the_validation_errors() -> None:
    """On the validation texts themselves just ⌈(n + 1) · level⌉ of n are covered."""
    predicted = Predictive(drawn(5, 99), 0.5)
    ratings = 3 * drawn(99)
    scores = conformal_scores(predicted, ratings)
    assert scores.tolist() == sorted(scores.tolist())
    for level in (50, 80, 95):
        assert conformal(predicted, scores)(level).coverage(ratings) == pytest.approx(level / 99)


def test_the_calibration_error_is_the_mean_distance_from_the_level() -> None:
    everything = calibration_error(
        lambda level: Bounds(torch.tensor([-1.0]), torch.tensor([1.0])), torch.zeros(1)
    )
    assert everything == pytest.approx(sum(1 - level / 100 for level in CURVE) / len(CURVE))
    ratings = drawn(20_000)
    assert calibration_error(gaussian(Predictive(torch.zeros(1, 20_000), 1.0)), ratings) < 0.005
    assert calibration_error(gaussian(Predictive(torch.zeros(1, 20_000), 0.5)), ratings) > 0.1
