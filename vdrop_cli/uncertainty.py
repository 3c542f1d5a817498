"""Predicted numbers with their uncertainty: error, likelihood and CRPS, and the observation noise.

R texts  S passes: of MC dropout, of the members of an ensemble, or both
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

NOISE_CANDIDATES = 801  # noise levels to try, evenly spaced in the logarithm
MIN_NOISE = 1e-6  # the noise where every prediction is exact


def rmse(predicted_R: Tensor, ratings_R: Tensor) -> float:
    """Returns the root of the mean squared error, in rating units."""
    return (predicted_R.double() - ratings_R.double()).square().mean().sqrt().item()


@dataclass(frozen=True)
class Predictive:
    """The predictive distribution of each text's rating: a mixture of Gaussians, one around each pass.

    All passes are equally probable, and the standard deviation of each Gaussian is the observation noise.
    Likelihood, CRPS and `std_R` are of the single Gaussian with the same mean and variance as the mixture;
    `cdf` is of the mixture.
    """

    passes_SR: Tensor
    noise: float  # standard deviation of the observations, τ^(-1/2) of Gal & Ghahramani

    @cached_property
    def mean_R(self) -> Tensor:
        """The mean over passes: the predicted rating."""
        return moments(self.passes_SR)[0]

    @cached_property
    def model_variance_R(self) -> Tensor:
        """The variance over passes; zero in the standard approximation."""
        return moments(self.passes_SR)[1]

    @property
    def std_R(self) -> Tensor:
        """The standard deviation of a rating: of the passes and of the observation noise together."""
        return (self.model_variance_R + self.noise**2).sqrt()

    def log_likelihood(self, ratings_R: Tensor) -> float:
        """Returns the log-likelihood of ratings under Gaussians in nats, averaged over texts."""
        return log_likelihood(self.mean_R, self.model_variance_R + self.noise**2, ratings_R).item()

    def crps(self, ratings_R: Tensor) -> float:
        """Returns the continuous ranked probability score, averaged over texts, in rating units.

        It is ∫ (F(x) - [x ≥ rating])² dx of the Gaussians, in closed form (Gneiting & Raftery 2007, section
        4.2). The lower, the better; without uncertainty it is the mean absolute error.
        """
        z_R = (ratings_R.double() - self.mean_R) / self.std_R
        density_R = (-0.5 * z_R.square()).exp() / math.sqrt(2 * math.pi)
        scaled_R = z_R * torch.erf(z_R / math.sqrt(2)) + 2 * density_R - 1 / math.sqrt(math.pi)
        return (self.std_R * scaled_R).mean().item()

    def cdf(self, values_R: Tensor) -> Tensor:
        """Returns the probability of a rating of at most `values_R`, [R]."""
        below_SR: Tensor = torch.special.ndtr((values_R - self.passes_SR.double()) / self.noise)
        return below_SR.mean(0)

    def half_width(self, level: float) -> Tensor:
        """Returns half the width of the central interval that contains `level` per cent, [R]."""
        return self.std_R * math.sqrt(2) * torch.erfinv(torch.tensor(level / 100, dtype=torch.float64))


def log_likelihood(mean_R: Tensor, variance_R: Tensor, ratings_R: Tensor) -> Tensor:
    """Returns the log-likelihood of Gaussians, nats, the mean over texts.

    `torch.distributions.Normal` is not used: it takes a root and squares it again, which would round
    differently from the recorded numbers.
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
