"""Measures predicted numbers: error, Gaussian predictive likelihood, and coverage of intervals.

R texts  S passes of MC dropout
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = (50, 80, 95)  # per cent of the texts that intervals are to cover
NOISE_CANDIDATES = 801  # noise levels to try, evenly spaced in the logarithm
MIN_NOISE = 1e-6  # where every prediction is exact


def rmse(predicted_R: Tensor, ratings_R: Tensor) -> float:
    return (predicted_R.double() - ratings_R.double()).square().mean().sqrt().item()


class Predictive(NamedTuple):
    """A Gaussian for each text: the passes' mean, and their variance plus that of the observation noise."""

    mean_R: Tensor
    model_variance_R: Tensor  # over passes; zero in the standard approximation
    noise: float  # standard deviation of the observations, τ^(-1/2) of Gal & Ghahramani

    @property
    def std_R(self) -> Tensor:
        return (self.model_variance_R + self.noise**2).sqrt()

    def log_likelihood(self, ratings_R: Tensor) -> float:
        """Returns the log-likelihood of ratings under Gaussians in nats, averaged over texts."""
        return log_likelihood(self.mean_R, self.model_variance_R + self.noise**2, ratings_R).item()

    def half_width(self, level: float) -> Tensor:
        """Returns half the width of the central interval that contains `level` per cent, [R]."""
        return self.std_R * math.sqrt(2) * torch.erfinv(torch.tensor(level / 100, dtype=torch.float64))

    def coverage(self, ratings_R: Tensor, level: float) -> float:
        """Returns the share of texts whose rating lies in the central interval."""
        return ((ratings_R.double() - self.mean_R).abs() <= self.half_width(level)).double().mean().item()

    def measures(self, ratings_R: Tensor, suffix: str) -> dict[str, float]:
        """Returns all measures by name; names end with `suffix`, such as _mc50."""
        shares = {f"test_coverage_{level}{suffix}": self.coverage(ratings_R, level) for level in LEVELS}
        return {
            f"test_log_likelihood{suffix}": self.log_likelihood(ratings_R),
            f"noise{suffix}": self.noise,
        } | shares


def log_likelihood(mean_R: Tensor, variance_R: Tensor, ratings_R: Tensor) -> Tensor:
    """Of Gaussians, the mean over texts.

    `torch.distributions.Normal` takes a root and squares it again, which rounds otherwise than the recorded
    numbers.
    """
    error_R = ratings_R.double() - mean_R.double()
    return -0.5 * (error_R.square() / variance_R + variance_R.log() + math.log(2 * math.pi)).mean()


def moments(passes_SR: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and variance over passes, [R] each."""
    passes_SR = passes_SR.double()
    return passes_SR.mean(0), passes_SR.var(0, correction=0)


def fit_noise(passes_SR: Tensor, ratings_R: Tensor) -> float:
    """Returns the standard deviation of the observations that makes the ratings most likely."""
    mean_R, variance_R = moments(passes_SR)
    error = max(rmse(mean_R, ratings_R), MIN_NOISE)
    if not variance_R.any():
        return error
    noises = torch.logspace(
        math.log10(error) - 3, math.log10(error) + 1, NOISE_CANDIDATES, dtype=torch.float64
    ).tolist()
    return float(
        max(noises, key=lambda noise: log_likelihood(mean_R, variance_R + noise**2, ratings_R).item())
    )


def predictive(passes_SR: Tensor, noise: float) -> Predictive:
    return Predictive(*moments(passes_SR), noise)
