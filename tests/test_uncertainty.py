"""Errors, likelihoods and intervals of predicted numbers, by law."""

import math

import pytest
import torch

from vdrop_cli.uncertainty import LEVELS, fit_noise, log_likelihood, moments, predictive, rmse


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
    prediction = predictive(passes_SR, noise)
    for level in LEVELS:
        assert prediction.coverage(ratings, level) == pytest.approx(level / 100, abs=0.02)
    assert prediction.log_likelihood(ratings) > max(
        predictive(passes_SR, noise * off).log_likelihood(ratings) for off in (0.8, 1.25)
    )
    measures = prediction.measures(ratings, "_mc40")
    assert measures["noise_mc40"] == noise and measures["test_coverage_95_mc40"] == prediction.coverage(
        ratings, 95
    )
    assert measures["test_log_likelihood_mc40"] == pytest.approx(prediction.log_likelihood(ratings))


def test_half_of_a_gaussian_lies_within_0_674_deviations() -> None:
    prediction = predictive(torch.zeros(1, 3), 2.0)
    assert prediction.half_width(50).tolist() == pytest.approx([2 * 0.6744898] * 3, rel=1e-6)
    assert prediction.half_width(95).tolist() == pytest.approx([2 * 1.959964] * 3, rel=1e-6)


def test_ratings_that_are_met_exactly_need_no_noise() -> None:
    assert fit_noise(torch.ones(1, 4), torch.ones(4)) < 1e-4
