"""Dropout as a cell sees it: tensors that multiply what enters its matrix products.

T time  B batch  D input size  H hidden size  G gates
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Masks(NamedTuple):
    """Dropout masks of one layer, those on inputs of products already divided by the keep probability; None
    stands for all ones.

    A first dimension of 1 is one mask for the whole sequence, a second of 1 (in `x` and `h`) one for all
    gates.
    """

    x: Tensor | None = None  # on the layer's input, broadcastable to [T, G, B, D]
    h: Tensor | None = (
        None  # on the previous hidden state where it enters the product, broadcastable to [T, G, B, H]
    )
    c: Tensor | None = None  # on the new cell state of an LSTM, broadcastable to [T, B, H]


class Norms(NamedTuple):
    """Layer norm inside a cell (Ba et al. 2016): gains on the normalised products and on the cell state;
    biases are those of the cell.

    An LSTM's products are normalised over all gates together, a GRU's over r and z together and over n.
    """

    ih: Tensor  # [G·H] on the input products
    hh: Tensor  # [G·H] on the recurrent products
    c: Tensor | None = None  # LSTM: [H] on the cell state where it enters the output
    c_bias: Tensor | None = None  # LSTM: [H] added there


BATCH_DIMS = (2, 2, 1)  # that of the batch in each mask of a layer


def is_broadcastable(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a mask has the wanted size, or 1, in every dimension."""
    # Not `have in (1, want)`, which torch.compile gets wrong where `want` is a size that it does not know.
    return len(shape) == len(wanted) and all(
        have == 1 or have == want for have, want in zip(shape, wanted, strict=True)
    )


def check_sizes(
    masks: Masks, time: int, gates: int, batch: int, inputs: int, state: int, hidden: int
) -> None:
    """Refuses masks that are not broadcastable to what they multiply, by name."""
    for name, mask, shape in (
        ("x", masks.x, (time, gates, batch, inputs)),
        ("h", masks.h, (time, gates, batch, state)),
        ("c", masks.c, (time, batch, hidden)),
    ):
        if mask is not None and not is_broadcastable(mask.shape, shape):
            raise ValueError(f"masks.{name} must be broadcastable to {list(shape)}, got {list(mask.shape)}")


def at(mask: Tensor | None, t: int) -> Tensor | None:
    """The mask of step `t`."""
    return None if mask is None else mask[t if mask.shape[0] > 1 else 0]
