"""The definition of the cells: plain loops, one line an equation. Every other back end is tested against this
file.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)  N tokens  V vocabulary
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vdrop_cli.kernels.masks import Masks, mask_at
from vdrop_cli.kernels.products import operand
from vdrop_cli.kernels.weights import Weights

NO_TARGET = torch.iinfo(torch.int64).min  # as torch's `ignore_index` (by default -100): ignores no target


def product(a: Tensor, b: Tensor, compute_dtype: torch.dtype | None) -> Tensor:
    """`a @ b`, multiplied in `compute_dtype`, returned in the type of `a`."""
    if compute_dtype is None:
        return a @ b
    return (operand(a.to(compute_dtype)) @ operand(b.to(compute_dtype))).to(a.dtype)


def masked(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else value * mask


def normalize(a_GBH: Tensor, gain_GH: Tensor | None) -> Tensor:
    """Layer norm of each sequence over some gates together."""
    if gain_GH is None:
        return a_GBH
    a_BGH = a_GBH.transpose(0, 1)
    return F.layer_norm(a_BGH, a_BGH.shape[1:], gain_GH).transpose(0, 1)


def keep_finished(alive_B1: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """The new state, but the old one for sequences that have ended."""
    return new if alive_B1 is None else torch.where(alive_B1, new, old)


def lstm(
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
    w_ih, w_hh, b_ih, b_hh, w_hr, norms = weights
    w_GHD, u_GHH = w_ih.view(4, -1, w_ih.shape[1]), w_hh.view(4, -1, w_hh.shape[1])
    bias_G1H = (b_ih + b_hh).view(4, 1, -1)
    gain_ih_GH, gain_hh_GH = (
        (None, None) if norms is None else (norms.ih.reshape(4, -1), norms.hh.reshape(4, -1))
    )
    y_TBH, c_TBH = [], []
    for t, x_BD in enumerate(x_TBD):
        x_GBD, h_GBH = masked(x_BD[None], mask_at(masks.x, t)), masked(h_BH[None], mask_at(masks.h, t))
        w_x_GBH, u_h_GBH = product(x_GBD, w_GHD.mT, compute_dtype), product(h_GBH, u_GHH.mT, compute_dtype)
        i, f, g, o = normalize(w_x_GBH, gain_ih_GH) + normalize(u_h_GBH, gain_hh_GH) + bias_G1H
        c_new_BH = masked(f.sigmoid() * c_BH + i.sigmoid() * g.tanh(), mask_at(masks.c, t))
        c_out_BH = c_new_BH
        if norms is not None:
            c_out_BH = F.layer_norm(c_new_BH, c_new_BH.shape[1:], norms.c, norms.c_bias)
        h_new_BH = o.sigmoid() * c_out_BH.tanh()
        if w_hr is not None:
            h_new_BH = product(h_new_BH, w_hr.T, compute_dtype)
        alive_B1 = None if lengths is None else (t < lengths)[:, None]
        c_BH, h_BH = keep_finished(alive_B1, c_new_BH, c_BH), keep_finished(alive_B1, h_new_BH, h_BH)
        y_TBH.append(keep_finished(alive_B1, h_BH, torch.zeros_like(h_BH)))
        c_TBH.append(keep_finished(alive_B1, c_BH, torch.zeros_like(c_BH)))
    outputs = (torch.stack(y_TBH), h_BH, c_BH)
    return (*outputs, torch.stack(c_TBH)) if cells else outputs


def gru(
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
    w_ih, w_hh, b_ih, b_hh, _, norms = weights
    w_GHD, u_GHH = w_ih.view(3, -1, w_ih.shape[1]), w_hh.view(3, -1, w_hh.shape[1])
    b_GH, bu_GH = b_ih.view(3, -1), b_hh.view(3, -1)
    gain_GH, gain_u_GH = (None, None) if norms is None else (norms.ih.reshape(3, -1), norms.hh.reshape(3, -1))

    def normalize_gates(a_GBH: Tensor, gain_GH: Tensor | None) -> Tensor:
        """Layer norm over r and z together, and over n."""
        if gain_GH is None:
            return a_GBH
        return torch.cat([normalize(a_GBH[:2], gain_GH[:2]), normalize(a_GBH[2:], gain_GH[2:])])

    y_TBH = []
    for t, x_BD in enumerate(x_TBD):
        x_GBD = masked(x_BD[None], mask_at(masks.x, t))
        h_GBH = masked(h_BH[None], mask_at(masks.h, t)).expand(3, -1, -1)
        a_r, a_z, a_n = normalize_gates(product(x_GBD, w_GHD.mT, compute_dtype), gain_GH) + b_GH[:, None]
        u_rz_GBH = normalize(
            product(h_GBH[:2], u_GHH[:2].mT, compute_dtype), None if gain_u_GH is None else gain_u_GH[:2]
        )
        r, z = (a_r + u_rz_GBH[0] + bu_GH[0]).sigmoid(), (a_z + u_rz_GBH[1] + bu_GH[1]).sigmoid()
        n_input_GBH = h_GBH[2:] if reset_after else r * h_GBH[2:]
        u_n_GBH = normalize(
            product(n_input_GBH, u_GHH[2:].mT, compute_dtype), None if gain_u_GH is None else gain_u_GH[2:]
        )
        u_n = u_n_GBH[0] + bu_GH[2]
        n = (a_n + (r * u_n if reset_after else u_n)).tanh()
        h_new_BH = (1 - z) * n + z * h_BH
        alive_B1 = None if lengths is None else (t < lengths)[:, None]
        h_BH = keep_finished(alive_B1, h_new_BH, h_BH)
        y_TBH.append(keep_finished(alive_B1, h_BH, torch.zeros_like(h_BH)))
    return torch.stack(y_TBH), h_BH


def linear_cross_entropy(
    x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """Cross-entropy, logits in the type of the weights: `compute_dtype` has no effect, an autocast has."""
    logits_NV = x_ND.to(w_VD.dtype) @ w_VD.T + b_V
    return F.cross_entropy(logits_NV, targets_N, reduction="none", ignore_index=NO_TARGET)
