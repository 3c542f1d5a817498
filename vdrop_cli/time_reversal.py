"""Sequences backward in time: inputs, outputs and masks of a layer that reads from the end.

T time  B batch  X any size
"""

import torch
from torch import Tensor

from vdrop_cli.kernels import Masks


def reversed_order(time: int, lengths: Tensor | None) -> Tensor | None:
    """Returns for each step of a backward layer the step of the input [T, B] that it reads.

    Each sequence is reversed within its length; padding stays in place.
    """
    if lengths is None:
        return None
    step_T1 = torch.arange(time, device=lengths.device)[:, None]
    lengths = lengths.clamp(max=time)
    return torch.where(step_T1 < lengths, lengths - 1 - step_T1, step_T1)


def reverse_time(x_TBX: Tensor, order_TB: Tensor | None) -> Tensor:
    """Reorders the steps; without an order it reverses them."""
    if order_TB is None:
        return x_TBX.flip(0)
    return x_TBX.gather(0, order_TB[..., None].expand(-1, -1, x_TBX.shape[-1]))


def reverse_mask(mask: Tensor | None, order_TB: Tensor | None) -> Tensor | None:
    """Reorders a mask [T|1, …, B|1, X] as `reverse_time` reorders the input."""
    if mask is None or len(mask) == 1:
        return mask
    if order_TB is None:
        return mask.flip(0)
    time, batch = order_TB.shape
    mask = mask.expand(*mask.shape[:-2], batch, mask.shape[-1])
    index = order_TB.view(time, *[1] * (mask.dim() - 3), batch, 1)
    return mask.gather(0, index.expand(mask.shape))


def reverse_masks(masks: Masks, order_TB: Tensor | None) -> Masks:
    return Masks(*(reverse_mask(mask, order_TB) for mask in masks))
