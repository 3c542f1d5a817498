"""Selective prediction: the error that remains when the texts of the highest uncertainty are left out.

R texts
"""

import torch
from torch import Tensor

SHARES = (100, 90, 80, 70, 60, 50, 40, 30, 20, 10)  # per cent of the texts that a curve keeps


def errors_by_count(uncertainty_R: Tensor, squared_error_R: Tensor) -> Tensor:
    """Returns the RMSE of the 1, 2, … R texts of the lowest uncertainty, [R].

    Texts of equal uncertainty share the mean of their squared errors, so their order does not matter.
    """
    _, group_R, count_U = torch.unique(uncertainty_R, sorted=True, return_inverse=True, return_counts=True)
    sum_U = torch.zeros(len(count_U), dtype=torch.float64).index_add(0, group_R, squared_error_R.double())
    ordered_R: Tensor = (sum_U / count_U).repeat_interleave(count_U)
    counts_R = torch.arange(1, len(ordered_R) + 1, dtype=torch.float64)
    return (ordered_R.cumsum(0) / counts_R).sqrt()


def error_at(errors_R: Tensor, share: float) -> float:
    """Returns the RMSE of `share` per cent of the texts, at least one, from `errors_by_count`."""
    return errors_R[max(round(len(errors_R) * share / 100), 1) - 1].item()


def area(errors_R: Tensor) -> float:
    """Returns the area under the curve of the error by the share of texts: the mean over all shares."""
    return errors_R.mean().item()
