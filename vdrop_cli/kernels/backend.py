"""The interface of the back ends `reference`, `fused`, `native` and `triton`, which are modules."""

from typing import Protocol

import torch
from torch import Tensor

from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.weights import Weights


class Backend(Protocol):
    """The functions of a back end. The API has already checked their arguments.

    `compute_dtype=None` is the type of the input. A back end ignores `recompute` unless that saves memory
    there. The API calls a back end with layer norm or a projection only if that back end supports it.
    """

    def lstm(
        self,
        x_TBD: Tensor,
        h_BH: Tensor,
        c_BH: Tensor,
        weights: Weights,
        masks: Masks,
        lengths: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        *,
        cells: bool = False,
        recompute: bool = False,
    ) -> tuple[Tensor, ...]:
        """All hidden states [T, B, H], last h and c [B, H], and with `cells` all cell states [T, B, H]."""

    def gru(
        self,
        x_TBD: Tensor,
        h_BH: Tensor,
        weights: Weights,
        masks: Masks,
        lengths: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        *,
        reset_after: bool = False,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """All hidden states [T, B, H] and the last one [B, H]."""

    def linear_cross_entropy(
        self,
        x_ND: Tensor,
        w_VD: Tensor,
        b_V: Tensor,
        targets_N: Tensor,
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Negative log-likelihood in nats of each target, [N]."""
