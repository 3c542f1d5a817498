"""Dropout as a cell sees it: tensors that multiply what enters its matrix products.

T time  B batch  D input size  H hidden size  G gates
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Masks(NamedTuple):
    """Dropout masks of one layer; those of `x` and `h` are already divided by the keep probability. None
    stands for all ones.

    A first dimension of 1 is one mask for the whole sequence, a second of 1 (in `x` and `h`) one for all
    gates.
    """

    x: Tensor | None = None  # on the layer's input, broadcastable to [T, G, B, D]
    # on the previous hidden state where it enters the product, broadcastable to [T, G, B, H]
    h: Tensor | None = None
    # on the new cell state of an LSTM, broadcastable to [T, B, H]; not divided: `ModelMasks.cell_scales`
    c: Tensor | None = None


BATCH_DIMS = (2, 2, 1)  # the batch dimension of the masks x, h and c of a layer


def is_broadcastable(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a mask has the target's size, or 1, in every dimension."""
    # Not `have in (1, size)`, which torch.compile gets wrong where `size` is unknown to it.
    return len(shape) == len(target) and all(
        have == 1 or have == size for have, size in zip(shape, target, strict=True)
    )


def check_sizes(
    masks: Masks, time: int, gates: int, batch: int, inputs: int, state: int, hidden: int
) -> None:
    """Raises ValueError with the name of a mask that is not broadcastable to what it multiplies."""
    for name, mask, shape in (
        ("x", masks.x, (time, gates, batch, inputs)),
        ("h", masks.h, (time, gates, batch, state)),
        ("c", masks.c, (time, batch, hidden)),
    ):
        if mask is not None and not is_broadcastable(mask.shape, shape):
            raise ValueError(f"masks.{name} must be broadcastable to {list(shape)}, got {list(mask.shape)}")


def mask_strides(mask: Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides of a mask along its first dimensions, 0 where their size is 1."""
    if mask is None:
        return (0,) * dims
    return tuple(mask.stride(d) if mask.shape[d] > 1 else 0 for d in range(dims))


def mask_at(mask: Tensor | None, t: int) -> Tensor | None:
    """The mask of step `t`."""
    return None if mask is None else mask[t if mask.shape[0] > 1 else 0]
