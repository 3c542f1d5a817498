"""What is known of predicted numbers: error, Gaussian predictive likelihood, and whether intervals hold what
they promise.

R texts  S passes of MC dropout
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = (50, 80, 95)  # per cent of the texts that intervals are to cover
GRID = 801  # noise deviations that are tried, evenly spaced in the logarithm
SMALLEST = 1e-6  # of them, where nothing is off


def rmse(predicted_R: Tensor, ratings_R: Tensor) -> float:
    return (predicted_R.double() - ratings_R.double()).square().mean().sqrt().item()


class Predictive(NamedTuple):
    """A Gaussian for each text: the passes' mean, and their variance plus that of the observation noise."""

    mean_R: Tensor
    model_variance_R: Tensor  # over passes; zero in the standard approximation
    noise: float  # deviation of the observations, τ^(-1/2) of Gal & Ghahramani

    @property
    def deviation_R(self) -> Tensor:
        return (self.model_variance_R + self.noise**2).sqrt()

    def log_likelihood(self, ratings_R: Tensor) -> float:
        """Mean over texts, in nats."""
        return log_likelihood(self.mean_R, self.model_variance_R + self.noise**2, ratings_R).item()

    def half_width(self, level: float) -> Tensor:
        """Of the interval about the mean that holds `level` per cent [R]."""
        return self.deviation_R * math.sqrt(2) * torch.erfinv(torch.tensor(level / 100, dtype=torch.float64))

    def coverage(self, ratings_R: Tensor, level: float) -> float:
        """The share of texts whose rating lies in that interval."""
        return ((ratings_R.double() - self.mean_R).abs() <= self.half_width(level)).double().mean().item()

    def measures(self, ratings_R: Tensor, of: str) -> dict[str, float]:
        """`of` ends the names: nothing, or _mc50."""
        shares = {f"test_coverage_{level}{of}": self.coverage(ratings_R, level) for level in LEVELS}
        return {f"test_log_likelihood{of}": self.log_likelihood(ratings_R), f"noise{of}": self.noise} | shares


def log_likelihood(mean_R: Tensor, variance_R: Tensor, ratings_R: Tensor) -> Tensor:
    """Of Gaussians, the mean over texts."""
    off_R = ratings_R.double() - mean_R.double()
    return -0.5 * (off_R.square() / variance_R + variance_R.log() + math.log(2 * math.pi)).mean()


def moments(passes_SR: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over passes, [R] each."""
    passes_SR = passes_SR.double()
    return passes_SR.mean(0), passes_SR.var(0, correction=0)


def fit_noise(passes_SR: Tensor, ratings_R: Tensor) -> float:
    """The deviation of the observations under which the ratings are most likely."""
    mean_R, variance_R = moments(passes_SR)
    error = max(rmse(mean_R, ratings_R), SMALLEST)
    if not variance_R.any():
        return error
    noises = torch.logspace(math.log10(error) - 3, math.log10(error) + 1, GRID, dtype=torch.float64).tolist()
    return float(
        max(noises, key=lambda noise: log_likelihood(mean_R, variance_R + noise**2, ratings_R).item())
    )


def predictive(passes_SR: Tensor, noise: float) -> Predictive:
    return Predictive(*moments(passes_SR), noise)
