"""The parameters of one layer as the back ends take them."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Norms(NamedTuple):
    """Layer norm inside a cell (Ba et al. 2016): gains for the normalised products and the cell state.

    Normalised products have no biases of their own: the biases of the cell are added to them. An LSTM's
    products are normalised over all gates together, a GRU's over r and z together and over n.
    """

    ih: Tensor  # [G·H] on the input products
    hh: Tensor  # [G·H] on the recurrent products
    c: Tensor | None = None  # LSTM: [H] on the cell state where it enters the output
    c_bias: Tensor | None = None  # LSTM: [H] added there


class Weights(NamedTuple):
    """Weights in the layout of `torch.nn.LSTM` and `torch.nn.GRU`."""

    w_ih: Tensor  # [G·H, D]
    w_hh: Tensor  # [G·H, H], or [G·H, P] with a projection
    b_ih: Tensor  # [G·H]
    b_hh: Tensor  # [G·H]
    w_hr: Tensor | None = None  # LSTM: [P, H], the projection of the output (Sak et al. 2014)
    norms: Norms | None = None


def unflatten(tensors: Sequence[Tensor]) -> Weights:
    """Weights from w_ih, w_hh, b_ih, b_hh and, if there are more, the tensors of layer norm.

    Autograd functions and operators of torch take tensors one by one.
    """
    w_ih, w_hh, b_ih, b_hh, *norms = tensors
    return Weights(w_ih, w_hh, b_ih, b_hh, norms=Norms(*norms) if norms else None)
