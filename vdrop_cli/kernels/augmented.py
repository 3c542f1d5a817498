"""The cross-entropy of language models with the augmented loss (Inan et al. 2017, section 3).

M rows of a chunk  N tokens  D size of the head's input  E size of a word's vector  V words
U distinct words among the targets of a chunk
"""

from typing import Any

import torch
from torch import Tensor

from vdrop_cli.kernels.autograd import without_autocast
from vdrop_cli.kernels.head import chunks, head_operand, logits_by, losses_and_probabilities, rows_at_once
from vdrop_cli.kernels.products import mm_into, operand


class AugmentedCrossEntropy(torch.autograd.Function):
    """Computes the logits in chunks, and the gradients of a chunk while its logits are in memory.

    The cross-entropy and the augmented loss have the same logits, so the gradients of the logits are added up
    before the products.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x_ND: Tensor,
        w_VD: Tensor,
        b_V: Tensor,
        words_VE: Tensor,
        targets_N: Tensor,
        factor: float,
        temperature: float,
        compute_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        nll, augmented = x_ND.new_zeros(()), x_ND.new_zeros(())
        dx_ND, dw_VD, db_V = torch.empty_like(x_ND), torch.zeros_like(w_VD), torch.zeros_like(b_V)
        w_lowp_VD, x_lowp_ND = (head_operand(side, compute_dtype) for side in (w_VD, x_ND))
        logits = logits_by(w_VD, b_V, len(x_ND), compute_dtype)
        for part in chunks(len(x_ND), rows_at_once(x_ND.device, len(b_V))[0]):
            targets_M = targets_N[part]
            logits_MV = logits(x_ND[part])
            nll_M, d_MV = losses_and_probabilities(logits_MV, targets_M)
            nll += nll_M.sum()
            d_MV.scatter_add_(1, targets_M[:, None], d_MV.new_full((len(d_MV), 1), -1.0))
            similarity_MV = similarity(words_VE, targets_M, temperature)
            log_p_MV = logits_MV.div_(temperature).log_softmax(1)
            augmented -= torch.dot(similarity_MV.flatten(), log_p_MV.flatten())
            d_MV.add_(log_p_MV.exp_().sub_(similarity_MV), alpha=factor / temperature)
            db_V += d_MV.sum(0)
            d_lowp_MV = operand(d_MV.to(compute_dtype))
            mm_into(dx_ND[part], d_lowp_MV, w_lowp_VD)
            mm_into(dw_VD, d_lowp_MV.T, x_lowp_ND[part], add=True)
        ctx.save_for_backward(dx_ND, dw_VD, db_V)
        ctx.mark_non_differentiable(nll)
        return nll + factor * augmented, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(d_loss * gradient for gradient in ctx.saved_tensors), None, None, None, None, None


def similarity(words_VE: Tensor, targets_M: Tensor, temperature: float) -> Tensor:
    """The softmax of the products of each target's vector with those of all words, [M, V].

    The CPU computes it once for each distinct word. A GPU computes it for each target, since counting the
    words would wait for the device.
    """
    if targets_M.is_cuda:
        return (words_VE[targets_M] @ words_VE.T).div_(temperature).softmax(1)
    words_U, rows_M = targets_M.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return (words_VE[words_U] @ words_VE.T).div_(temperature).softmax(1)[rows_M]


def augmented_cross_entropy(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    words_VE: Tensor,
    targets_N: Tensor,
    factor: float,
    temperature: float,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the cross-entropy plus `factor` times the augmented loss, and the cross-entropy alone, in nats.

    Both are summed over the tokens. Only the first has a gradient.

    The augmented loss of a token is the cross-entropy of the prediction softmax((x Wᵀ + b) / τ) relative to
    softmax(E e / τ), the similarity of all words to the target. Here E are the vectors of all words, e is the
    vector of the target, and τ is the temperature. The paper adds the divergence of the two distributions
    instead, which is smaller by the entropy of the similarity. No gradient flows through the similarity, so
    cross-entropy and divergence have the same gradients.

    Logits have the type of the weights; products of gradients are in `compute_dtype`. At most one chunk of
    the logits [N, V] is in memory at once.
    """
    inputs = (x_ND.to(w_VD.dtype), w_VD, b_V, words_VE.detach(), targets_N)
    losses: tuple[Tensor, Tensor] = AugmentedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        *inputs, factor, temperature, compute_dtype or w_VD.dtype
    )
    return losses
