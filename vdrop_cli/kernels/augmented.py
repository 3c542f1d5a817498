"""The augmented loss of language models (Inan et al. 2017, section 3).

M rows of a chunk  N tokens  D size of the head's input  E size of a word's vector  V words
"""

from typing import Any

import torch
from torch import Tensor

from vdrop_cli.kernels.autograd import without_autocast
from vdrop_cli.kernels.fused import chunks, rows_at_once
from vdrop_cli.kernels.products import mm_into


class AugmentedLoss(torch.autograd.Function):
    """Computes the logits in chunks, and the gradients of a chunk while its logits are in memory."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x_ND: Tensor,
        w_VD: Tensor,
        b_V: Tensor,
        words_VE: Tensor,
        targets_N: Tensor,
        temperature: float,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        loss = x_ND.new_zeros(())
        dx_ND, dw_VD, db_V = torch.empty_like(x_ND), torch.zeros_like(w_VD), torch.zeros_like(b_V)
        w_lowp_VD, x_lowp_ND = w_VD.to(compute_dtype), x_ND.to(compute_dtype)
        for part in chunks(len(x_ND), rows_at_once(x_ND.device, len(b_V))[0]):
            similarity_MV = (words_VE[targets_N[part]] @ words_VE.T).div_(temperature).softmax(1)
            log_p_MV = (x_ND[part] @ w_VD.T).add_(b_V).div_(temperature).log_softmax(1)
            loss -= torch.dot(similarity_MV.flatten(), log_p_MV.flatten())
            d_MV = log_p_MV.exp_().sub_(similarity_MV).div_(temperature)
            db_V += d_MV.sum(0)
            d_lowp_MV = d_MV.to(compute_dtype)
            mm_into(dx_ND[part], d_lowp_MV, w_lowp_VD)
            mm_into(dw_VD, d_lowp_MV.T, x_lowp_ND[part], add=True)
        ctx.save_for_backward(dx_ND, dw_VD, db_V)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *(d_loss * gradient for gradient in ctx.saved_tensors), None, None, None, None


def augmented_loss(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    words_VE: Tensor,
    targets_N: Tensor,
    temperature: float,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the augmented loss in nats, summed over the tokens.

    For each token it is the cross-entropy from softmax(E e / τ), the similarity of the vectors E of all words
    to that of the target, e, to the prediction softmax((x Wᵀ + b) / τ). It exceeds their divergence, which
    the paper adds to the loss, by the entropy of the similarity. That similarity is a target, through which
    no gradient flows, so its entropy has none. Logits are in the type of the weights, products of gradients
    in `compute_dtype`. No more than a chunk of the logits [N, V] is in memory at once.
    """
    loss: Tensor = AugmentedLoss.apply(  # type: ignore[no-untyped-call]
        x_ND.to(w_VD.dtype), w_VD, b_V, words_VE.detach(), targets_N, temperature, compute_dtype or w_VD.dtype
    )
    return loss
