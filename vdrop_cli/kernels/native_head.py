"""The head of a language model on the CPU, through the library of `native.c`: losses, and gradients written
by hand, from chunks of the logits. The products are torch's, or on processors with AMX those of the library.

M rows of a chunk  N tokens  D size of the head's input  V vocabulary
"""

import ctypes
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vdrop_cli.kernels import head
from vdrop_cli.kernels.head import chunks
from vdrop_cli.kernels.native_library import (
    SUFFIXES,
    call,
    gemm,
    has_amx,
    pack,
    pack_bf16,
    packed_rows,
    padded,
    split_bf16,
    threads,
    transposed_rows,
)
from vdrop_cli.kernels.products import mm_into, operand

LOGITS_AT_ONCE = 8_000_000  # elements of a chunk of logits in fp32: 32 MB


def logits_by_halves(out_MV: Tensor, x_high: Tensor, x_low: Tensor, w_high: Tensor, w_low: Tensor) -> None:
    """`x Wᵀ` by AMX: three products of bf16, whose sum is as exact as one of numbers with 16 bits."""
    gemm(out_MV, [(x_high, w_high), (x_low, w_high), (x_high, w_low)])


def softmax(
    logits_MV: Tensor,
    b_V: Tensor,
    targets_M: Tensor,
    dnll_M: Tensor | None,
    nll_M: Tensor,
    d_MV: Tensor | None,
    sums: Tensor,
) -> None:
    """Writes the losses. If `d_MV` is given, also writes the gradients of the logits into it, and adds the
    sums of these gradients over the rows to `sums`.
    """
    dtype = logits_MV.dtype if d_MV is None else d_MV.dtype
    rows, words = logits_MV.shape
    inputs = (logits_MV, rows, words, b_V, targets_M, dnll_M)
    outputs = (nll_M, d_MV, 0 if d_MV is None else d_MV.stride(0), sums, ctypes.c_int(len(sums)))
    call(f"vdrop_softmax_{SUFFIXES[logits_MV.dtype, dtype]}", *inputs, *outputs)


class Operands(NamedTuple):
    """The weights of the head as its products read them."""

    w_VD: Tensor
    packed: tuple[Tensor, ...]  # with AMX: rounded to bf16, and the rounding errors, for the logits
    back: Tensor  # for the gradient of x, in the type of the products; with AMX packed

    @property
    def amx(self) -> bool:
        return len(self.packed) > 0


def prepare_operands(w_VD: Tensor, compute_dtype: torch.dtype, needs_gradients: bool) -> Operands:
    if not (compute_dtype == torch.bfloat16 and has_amx()):
        return Operands(w_VD, (), operand(w_VD.to(compute_dtype)))
    packed = tuple(weights.flatten(1, 2) for weights in pack_bf16(w_VD, 1, rest=True))
    back = w_VD
    if needs_gradients:
        back = pack(w_VD, torch.bfloat16, 1, transposed=True).flatten(1, 2)
    return Operands(w_VD, packed, back)


def write_logits(out_MV: Tensor, x_MD: Tensor, operands: Operands) -> Tensor:
    """Writes the logits without biases; returns `x` as the gradient of the weights reads it."""
    if not operands.amx:
        torch.mm(x_MD, operands.w_VD.T, out=out_MV)
        return x_MD
    x_high, x_low = split_bf16(x_MD)
    logits_by_halves(out_MV, x_high, x_low, *operands.packed)
    return x_high


def add_gradients(
    dx_MD: Tensor, dw_VD: Tensor, d_MV: Tensor, x_MD: Tensor, operands: Operands, *, add: bool
) -> None:
    """Computes the gradients of a chunk from those of its logits, `d_MV`.

    The gradient of the chunk's rows is written into `dx_MD`. The gradient of the weights is written into
    `dw_VD`, or added to it with `add`. `x_MD` is the result of `write_logits`.
    """
    if operands.amx:
        gemm(dx_MD, [(d_MV, operands.back)])
        pair = (transposed_rows(d_MV), packed_rows(x_MD, dw_VD.shape[1]))
        gemm(dw_VD, [pair], add=add, transposed=True)
    else:
        x_MD, d_MV = x_MD.to(d_MV.dtype), operand(d_MV)
        mm_into(dx_MD, d_MV, operands.back)
        mm_into(dw_VD, d_MV.T, x_MD, add=add)


def compute_losses(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    targets_N: Tensor,
    dnll_N: Tensor | None,
    compute_dtype: torch.dtype,
    needs_gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The losses of all tokens, and with `needs_gradients` the gradients of x, w and b.

    `dnll_N` is the upstream gradient; None: all ones. Softmax, gradient, rounding and the sums for the bias
    take one pass over the logits. Raises IndexError for a target outside the vocabulary.
    """
    x_ND, w_VD, b_V, targets_N = (tensor.contiguous() for tensor in (x_ND, w_VD, b_V, targets_N))
    (tokens, _), words = x_ND.shape, len(b_V)
    outside = (targets_N < 0) | (targets_N >= words)
    if bool(outside.any()):
        raise IndexError(
            f"target {int(targets_N[outside][0])} is out of bounds: the vocabulary has {words} words"
        )
    operands = prepare_operands(w_VD, compute_dtype, needs_gradients)
    nll_N, sums = x_ND.new_empty(tokens), x_ND.new_zeros(threads(), words)
    dx_ND, dw_VD = (torch.empty_like(side) if needs_gradients else side[:0] for side in (x_ND, w_VD))
    rows_at_once = max(1, LOGITS_AT_ONCE // words)
    logits_MV = x_ND.new_empty(min(rows_at_once, tokens), words)
    d_lowp_MV = logits_MV
    if compute_dtype == torch.bfloat16:
        columns = padded(words, compute_dtype) if operands.amx else words
        d_lowp_MV = x_ND.new_empty(len(logits_MV), columns, dtype=torch.bfloat16)
    for part in chunks(tokens, rows_at_once):
        x_MD = x_ND[part]
        logits, d_MV = logits_MV[: len(x_MD)], d_lowp_MV[: len(x_MD)]
        x_MD = write_logits(logits, x_MD, operands)
        dnll_M = None if dnll_N is None else dnll_N[part].contiguous()
        softmax(logits, b_V, targets_N[part], dnll_M, nll_N[part], d_MV if needs_gradients else None, sums)
        if needs_gradients:
            add_gradients(dx_ND[part], dw_VD, d_MV, x_MD, operands, add=part.start > 0)
    return nll_N, [dx_ND, dw_VD, sums.sum(0)] if needs_gradients else []


loss_and_gradients = partial(compute_losses, needs_gradients=True)


def linear_cross_entropy(
    x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor, compute_dtype: torch.dtype | None = None
) -> Tensor:
    if torch.compiler.is_compiling():
        return head.linear_cross_entropy(x_ND, w_VD, b_V, targets_N, compute_dtype)
    with torch.autocast(x_ND.device.type, enabled=False):  # it would round the logits
        x_ND = x_ND.to(w_VD.dtype)
        dtype = compute_dtype or x_ND.dtype
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, w_VD, b_V)):
            arguments = (x_ND, w_VD, b_V, targets_N, dtype, loss_and_gradients)
            nll_N: Tensor = head.LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
            return nll_N
        return compute_losses(x_ND, w_VD, b_V, targets_N, None, dtype, needs_gradients=False)[0]
