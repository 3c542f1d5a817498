"""Errors, likelihoods and scores of predicted numbers, by law."""

import math

import pytest
import torch

from vdrop_cli.intervals import LEVELS, gaussian
from vdrop_cli.uncertainty import Predictive, fit_noise, log_likelihood, moments, rmse


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_the_error_is_the_root_of_the_mean_square() -> None:
    assert rmse(torch.tensor([1.0, 2]), torch.tensor([4.0, 6])) == pytest.approx(math.sqrt((9 + 16) / 2))


def test_the_likelihood_is_the_gaussians() -> None:
    mean = drawn(5)
    variance = drawn(5).square() + 0.1
    at = drawn(5)
    expected = torch.distributions.Normal(mean, variance.sqrt()).log_prob(at).mean()
    assert log_likelihood(mean, variance, at).item() == pytest.approx(expected.item())


def test_moments_are_over_passes() -> None:
    mean, variance = moments(torch.tensor([[1.0, 5], [3.0, 5]]))
    assert (mean.tolist(), variance.tolist()) == ([2, 5], [1, 0])


@pytest.mark.parametrize("model_deviation", [0.0, 0.3])
def test_the_noise_that_made_the_ratings_is_found_and_its_intervals_hold_what_they_promise(
    model_deviation: float,
) -> None:
    """5,000 texts, passes and truth scatter about a mean of its own by `model_deviation`, and noise of 0.5
    comes on top.
    """
    truth, passes = drawn(5_000), 40
    passes_SR = truth + model_deviation * drawn(passes, 5_000)
    ratings = truth + model_deviation * drawn(5_000) + 0.5 * drawn(5_000)
    noise = fit_noise(passes_SR, ratings)
    assert noise == pytest.approx(0.5, rel=0.05)
    predicted = Predictive(passes_SR, noise)
    for level in LEVELS:
        assert gaussian(predicted)(level).coverage(ratings) == pytest.approx(level / 100, abs=0.02)
    for off in (0.8, 1.25):
        other = Predictive(passes_SR, noise * off)
        assert predicted.log_likelihood(ratings) > other.log_likelihood(ratings)
        assert predicted.crps(ratings) < other.crps(ratings), "both scores are proper"


def test_half_of_a_gaussian_lies_within_0_674_deviations() -> None:
    predicted = Predictive(torch.zeros(1, 3), 2.0)
    assert predicted.half_width(50).tolist() == pytest.approx([2 * 0.6744898] * 3, rel=1e-6)
    assert predicted.half_width(95).tolist() == pytest.approx([2 * 1.959964] * 3, rel=1e-6)


def test_ratings_that_are_met_exactly_need_no_noise() -> None:
    assert fit_noise(torch.ones(1, 4), torch.ones(4)) < 1e-4


def test_the_crps_is_the_integral_that_defines_it() -> None:
    """∫ (F(x) - [x ≥ rating])² dx, by the trapezoidal rule on either side of the rating."""
    passes_SR = drawn(7, 20)
    ratings = 2 * drawn(20)
    predicted = Predictive(passes_SR, 0.4)
    integrals = []
    for mean, std, rating in zip(predicted.mean_R, predicted.std_R, ratings, strict=True):
        distribution = torch.distributions.Normal(mean, std)
        below = torch.linspace(float(rating) - 20, float(rating), 40_001, dtype=torch.float64)
        above = torch.linspace(float(rating), float(rating) + 20, 40_001, dtype=torch.float64)
        integrals.append(
            torch.trapezoid(distribution.cdf(below).square(), below)
            + torch.trapezoid((1 - distribution.cdf(above)).square(), above)
        )
    assert predicted.crps(ratings) == pytest.approx(float(torch.stack(integrals).mean()), rel=1e-6)


def test_the_crps_without_uncertainty_is_the_mean_absolute_error() -> None:
    mean = drawn(1, 50)
    ratings = drawn(50)
    assert Predictive(mean, 1e-9).crps(ratings) == pytest.approx(float((mean[0] - ratings).abs().mean()))


def test_the_distribution_is_the_mixture_of_the_passes() -> None:
    """Two passes far apart: a quarter lies below the lower one, half between them."""
    predicted = Predictive(torch.tensor([[0.0], [100.0]]), 1.0)
    for value, expected in ((0.0, 0.25), (50.0, 0.5), (100.0, 0.75)):
        assert predicted.cdf(torch.tensor([value])).item() == pytest.approx(expected)
