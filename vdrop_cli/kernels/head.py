"""The head of a language model in plain torch operations, for any device: losses, and gradients written by
hand, from chunks of the logits.

M rows of a chunk  N tokens  D size of the head's input  V vocabulary
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vdrop_cli.kernels import halves, reference
from vdrop_cli.kernels.alignment import pad_columns
from vdrop_cli.kernels.autograd import all_gradients, as_one_operation, without_autocast
from vdrop_cli.kernels.contexts import no_autocast
from vdrop_cli.kernels.derivatives import needs_reference, reference_gradients
from vdrop_cli.kernels.products import mm_into, operand

LOGITS_AT_ONCE = 4_000_000  # elements of a chunk of logits in fp32: 16 MB
LOGITS_AT_ONCE_ON_GPU = 2**25  # 128 MB: all of a training step of the published sizes
MIN_ROWS_BY_HALVES = 128  # with fewer, most of the work would be to halve the weights
SMALLEST = 1e-30  # probability whose logarithm is still exact in fp32
# Chunks whose gradient is stored in bf16 together, so that its products are few and large; on a GPU one chunk
# is large enough.
ROUNDED_CHUNKS = 4

HeadGradients = Callable[..., tuple[Tensor, list[Tensor]]]  # `loss_and_gradients` of a back end


class LinearCrossEntropy(torch.autograd.Function):
    """Computes the losses in chunks, and with each chunk its gradients, by `compute`.

    The gradients of a chunk are computed while its logits are in memory. They are for an upstream gradient of
    1. If the upstream gradient is the same for all tokens, as after a sum or a mean, it scales them in place.
    If it differs between tokens, or in a second backward pass, the chunks are computed again.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x_ND: Tensor,
        w_VD: Tensor,
        b_V: Tensor,
        targets_N: Tensor,
        compute_dtype: torch.dtype,
        compute: HeadGradients,
    ) -> Tensor:
        inputs = (x_ND, w_VD, b_V, targets_N)
        nll_N, ctx.gradients = compute(*inputs, None, compute_dtype)
        ctx.save_for_backward(*inputs)
        ctx.compute_dtype, ctx.compute = compute_dtype, compute
        return nll_N

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dnll_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, w_VD, b_V, targets_N = ctx.saved_tensors
        if needs_reference((dnll_N,)):

            def definition(x_ND: Tensor, w_VD: Tensor, b_V: Tensor) -> tuple[Tensor]:
                return (reference.linear_cross_entropy(x_ND, w_VD, b_V, targets_N),)

            inputs, is_needed = (x_ND, w_VD, b_V), ctx.needs_input_grad[:3]
            return all_gradients(ctx, *reference_gradients(definition, inputs, is_needed, (dnll_N,)))
        if ctx.gradients is not None and is_uniform(dnll_N):
            gradients = [gradient.mul_(dnll_N[0]) for gradient in ctx.gradients]
            ctx.gradients = None
        else:
            _, gradients = ctx.compute(x_ND, w_VD, b_V, targets_N, dnll_N, ctx.compute_dtype)
        return all_gradients(ctx, *gradients)


def is_uniform(dnll_N: Tensor) -> bool:
    """Whether the gradient is the same for all tokens. That of a sum has stride 0, so it needs no wait for a
    GPU.
    """
    return dnll_N.stride(0) == 0 or bool((dnll_N == dnll_N[0]).all())


def chunks(rows: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]


def rows_at_once(device: torch.device, vocabulary: int) -> tuple[int, int]:
    """The rows of a chunk of logits, and the rows whose gradient is stored in bf16 together.

    On a GPU the logits use at most 1/64 of its memory.
    """
    if device.type != "cuda":
        rows = max(1, LOGITS_AT_ONCE // vocabulary)
        return rows, ROUNDED_CHUNKS * rows
    memory = torch.cuda.get_device_properties(device).total_memory
    rows = max(1, min(LOGITS_AT_ONCE_ON_GPU, memory // 64 // 4) // vocabulary)
    return rows, rows


def logits_by(w_VD: Tensor, b_V: Tensor, rows: int, compute_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Returns a function that computes the logits of a chunk. `rows` is the number of rows of all chunks.

    Logits are in fp32. On a GPU with products in bf16 and enough rows, each product is three bf16 products of
    halves instead, which are almost as exact (`halves.py`).
    """
    if not (compute_dtype == torch.bfloat16 and rows >= MIN_ROWS_BY_HALVES and has_halves(w_VD)):
        return lambda x_MD: (x_MD @ w_VD.T).add_(b_V)  # rounding them to bf16 unsettles training
    w_VX = halves.side_by_side(w_VD, halves.RIGHT)
    return lambda x_MD: halves.product(halves.side_by_side(x_MD, halves.LEFT), w_VX).add_(b_V)


def has_halves(w_VD: Tensor) -> bool:
    """Whether products by halves are possible, and faster: on a GPU, except where torch.compile traces."""
    is_possible = w_VD.is_cuda and w_VD.dtype == torch.float32 and not torch.compiler.is_compiling()
    return is_possible and halves.is_exact_on(w_VD.device)


def losses_and_probabilities(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each token, and the probabilities of all words, [M, V]."""
    softmax = softmax_by_logarithms if logits_MV.is_cuda else softmax_by_probabilities
    return softmax(logits_MV, targets_M)


def softmax_by_logarithms(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and probabilities by `log_softmax`, without a wait for a GPU."""
    log_p_MV = logits_MV.log_softmax(1)
    return -log_p_MV.gather(1, targets_M[:, None]).squeeze(1), log_p_MV.exp_()


def softmax_by_probabilities(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and probabilities with one pass less over the logits, which is faster on a CPU."""
    p_MV = logits_MV.softmax(1)
    p_M = p_MV.gather(1, targets_M[:, None]).squeeze(1)
    nll_M = -p_M.log()
    if p_M.min() < SMALLEST:  # these probabilities underflow, their logits do not
        tiny = p_M < SMALLEST
        nll_M[tiny] = logits_MV[tiny].logsumexp(1) - logits_MV[tiny, targets_M[tiny]]
    return nll_M, p_MV


def losses(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Negative log-likelihood of each token, [M], without the probabilities of other words."""
    if logits_MV.is_cuda:
        return torch.nn.functional.cross_entropy(
            logits_MV, targets_M, reduction="none", ignore_index=reference.NO_TARGET
        )
    return softmax_by_probabilities(logits_MV, targets_M)[0]


def loss(x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor, compute_dtype: torch.dtype) -> Tensor:
    parts = chunks(len(x_ND), rows_at_once(x_ND.device, len(b_V))[0])
    logits = logits_by(w_VD, b_V, len(x_ND), compute_dtype)
    return torch.cat([losses(logits(x_ND[part]), targets_N[part]) for part in parts])


def pads_columns(side: Tensor) -> bool:
    """Whether products are faster with aligned rows, which cost a copy: on a GPU."""
    return side.is_cuda


def head_operand(side: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """One side of the products of the head's gradients: in bf16 on a GPU, in aligned rows."""
    if compute_dtype != side.dtype and pads_columns(side):
        return pad_columns(side, compute_dtype)
    return operand(side.to(compute_dtype))


def loss_and_gradients(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    targets_N: Tensor,
    dnll_N: Tensor | None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """Negative log-likelihood of each token, and the gradients of x, w and b (`dnll_N` None: all ones)."""
    nll_N, dx_ND = torch.empty_like(x_ND[:, 0]), torch.empty_like(x_ND)
    dw_VD, db_V = torch.empty_like(w_VD), torch.zeros_like(b_V)
    is_rounded = compute_dtype != x_ND.dtype
    w_lowp_VD, x_lowp_ND = (head_operand(side, compute_dtype) for side in (w_VD, x_ND))
    rows, rounded_rows = rows_at_once(x_ND.device, len(b_V))
    logits = logits_by(w_VD, b_V, len(x_ND), compute_dtype)
    for block in chunks(len(x_ND), rounded_rows if is_rounded else rows):
        block_ND, targets_M = x_ND[block], targets_N[block]
        d_lowp_MV = w_VD
        if is_rounded:
            d_lowp_MV = w_VD.new_empty(len(block_ND), len(b_V), dtype=compute_dtype)
        for part in chunks(len(block_ND), rows):
            nll_N[block][part], d_MV = losses_and_probabilities(logits(block_ND[part]), targets_M[part])
            d_MV.scatter_add_(1, targets_M[part, None], d_MV.new_full((len(d_MV), 1), -1.0))
            if dnll_N is not None:
                d_MV.mul_(dnll_N[block][part, None])
            db_V += d_MV.sum(0)
            if is_rounded:
                d_lowp_MV[part] = d_MV
            else:
                d_lowp_MV = d_MV
        d_lowp_MV = operand(d_lowp_MV)
        mm_into(dx_ND[block], d_lowp_MV, w_lowp_VD)
        mm_into(dw_VD, d_lowp_MV.T, x_lowp_ND[block], add=block.start > 0)
    return nll_N, [dx_ND, dw_VD, db_V]


apply_head = as_one_operation(LinearCrossEntropy, loss_and_gradients)


def linear_cross_entropy(
    x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor, compute_dtype: torch.dtype | None = None
) -> Tensor:
    with no_autocast(x_ND.device.type):  # it would round the logits
        x_ND = x_ND.to(w_VD.dtype)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, w_VD, b_V))):
            return loss(x_ND, w_VD, b_V, targets_N, compute_dtype or x_ND.dtype)
        nll_N: Tensor = apply_head(x_ND, w_VD, b_V, targets_N, compute_dtype or x_ND.dtype)
        return nll_N
