"""The loops over time of `triton.py`: matrix products and Triton programs alternate, all in place, so that
CUDA graphs can contain them.

T time  B batch  H hidden size  R size of an aligned row, at least H
G gates (LSTM i f g o; GRU r z n)  K groups of gates: 1, or one for each gate
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdrop_cli.kernels import programs
from vdrop_cli.kernels.gates import Gates, select_gates

BLOCK = 128  # elements of H per program
WARPS = 4
ALIGNMENT = 16  # bytes that the rows of small products are whole numbers of
ALL_LSTM = slice(0, 4)
ALL_GRU = slice(0, 3)
R_AND_Z = slice(0, 2)
ONLY_N = slice(2, 3)


def launch(
    program: Any, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...], gates: Gates, **constants: int
) -> None:
    block = min(BLOCK, triton.next_power_of_2(gates.hidden))
    acc = tl.float64 if gates.memory.dtype == torch.float64 else tl.float32
    grid = (gates.batch, triton.cdiv(gates.hidden, block))
    program[grid](*tensors, *numbers, **constants, ACC=acc, BLOCK=block, num_warps=WARPS)


def strides(gates: Gates) -> tuple[int, ...]:
    """The strides of the gates along G, T and B."""
    return gates.view_GTBH.stride()[:3]


def mask_strides(mask: Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides of a mask along its first dimensions, 0 where their size is 1."""
    if mask is None:
        return (0,) * dims
    return tuple(mask.stride(d) if mask.shape[d] > 1 else 0 for d in range(dims))


def aligned_size(size: int, dtype: torch.dtype) -> int:
    """The least number of elements of whole `ALIGNMENT` bytes that is at least `size`."""
    multiple = max(1, ALIGNMENT // dtype.itemsize)
    return -(-size // multiple) * multiple


def aligned_weights(w_hh: Tensor, dtype: torch.dtype) -> Tensor:
    """The recurrent weights [G·H, H] in the type of the products, as [G, R, R] with zeros beyond H.

    cuBLAS needs rows of whole 16 bytes for its fast programs; those of 650 or 1,500 numbers of bf16 are not.
    """
    hidden = w_hh.shape[1]
    size = aligned_size(hidden, dtype)
    w_GHH = w_hh.view(-1, hidden, hidden)
    if size == hidden:
        return w_GHH.to(dtype)
    w_GRR = w_hh.new_zeros(len(w_GHH), size, size, dtype=dtype)
    w_GRR[:, :hidden, :hidden] = w_GHH
    return w_GRR


def by_gate_or_row(gates: Gates, count: int, size: int, like: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Zeros for the products of `count` gates at a step, and their strides along G and B: [count, B, R] where
    each gate has its own product, else [B, count·R].
    """
    if gates.by_gate:
        return like.new_zeros(count, gates.batch, size), (gates.batch * size, size)
    return like.new_zeros(gates.batch, count * size), (size, count * size)


class Recurrence:
    """Computes `U (m_h ∘ h)` of some gates, step after step: the program of a step reads the products `p` and
    writes the inputs of the next products.
    """

    def __init__(self, gates: Gates, part: slice, w_GRR: Tensor, mask_h: Tensor | None, h_BH: Tensor) -> None:
        w, mask_TKBH = w_GRR[part], select_gates(mask_h, part)
        count, self.row, _ = w.shape
        self.groups = 1 if mask_TKBH is None else mask_TKBH.shape[1]
        self.inputs_KBR = w.new_zeros(self.groups, gates.batch, self.row)
        self.inputs_KBR[..., : gates.hidden] = h_BH if mask_TKBH is None else h_BH * mask_TKBH[0]
        self.product = torch.bmm if gates.by_gate else torch.mm
        self.p, self.p_strides = by_gate_or_row(gates, count, self.row, w)
        if gates.by_gate:
            self.x, self.w = self.inputs_KBR.expand(count, -1, -1), w.mT
        else:
            self.x, self.w = self.inputs_KBR[0], w.flatten(0, 1).T

    def multiply(self) -> None:
        self.product(self.x, self.w, out=self.p)


class RecurrenceGradient:
    """The backward pass of a recurrence: from the gradients of the products of step t, `step`, to that of
    h_{t-1} before its masks, [K, B, R].
    """

    def __init__(self, da: Gates, part: slice, w_GRR: Tensor) -> None:
        w, self.hidden = w_GRR[part], da.hidden
        count, self.row, _ = w.shape
        self.product = torch.bmm if da.by_gate else torch.mm
        self.step, self.step_strides = by_gate_or_row(da, count, self.row, w)
        self.groups = count if da.by_gate else 1
        self.w = w if da.by_gate else w.flatten(0, 1)
        self.grad_h_KBR = w.new_zeros(self.groups, da.batch, self.row)
        self.out = self.grad_h_KBR if da.by_gate else self.grad_h_KBR[0]

    def multiply(self) -> None:
        self.product(self.step, self.w, out=self.out)

    def add_to(self, dh_BH: Tensor, mask_h: Tensor | None, part: slice) -> None:
        """Adds the gradient of the state before the first step."""
        mask_TKBH = select_gates(mask_h, part)
        grad_h_KBH = self.grad_h_KBR[..., : self.hidden].to(dh_BH.dtype)
        dh_BH.add_((grad_h_KBH if mask_TKBH is None else grad_h_KBH * mask_TKBH[0]).sum(0))


def lstm_loop(
    a: Tensor,
    h: Tensor,
    c: Tensor,
    h_BH: Tensor,
    c_BH: Tensor,
    w_GRR: Tensor,
    mask_h: Tensor | None,
    mask_c: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """From the projected inputs `a` and the first states to the gates, and the states of all steps."""
    gates = Gates(a, 4)
    h[0], c[0] = h_BH, c_BH
    recurrence = Recurrence(gates, ALL_LSTM, w_GRR, mask_h, h[0])
    tensors = (a, recurrence.p, h, c, recurrence.inputs_KBR, mask_h, mask_c, lengths)
    strided = (*strides(gates), *recurrence.p_strides, *mask_strides(mask_h, 2), *mask_strides(mask_c, 1))
    numbers = (gates.time, gates.batch, gates.hidden, recurrence.row, *strided)
    for t in range(gates.time):
        recurrence.multiply()
        launch(programs.lstm_forward, tensors, (t, *numbers), gates, GROUPS=recurrence.groups)


def lstm_backward_loop(
    da: Tensor,
    dh: Tensor,
    dc: Tensor,
    a: Tensor,
    c: Tensor,
    dy: Tensor,
    w_GRR: Tensor,
    mask_h: Tensor | None,
    mask_c: Tensor | None,
    lengths: Tensor | None,
    dcells: Tensor | None = None,
) -> None:
    """The gradients of the gates before their activation and of the first states; `dcells` are those of the
    cell states of all steps.
    """
    gates = Gates(a, 4)
    recurrence_grad = RecurrenceGradient(Gates(da, 4), ALL_LSTM, w_GRR)
    gradients = (dh, dc, da, recurrence_grad.step, recurrence_grad.grad_h_KBR)
    tensors = (a, c, dy, dcells, *gradients, mask_h, mask_c, lengths)
    m_strides = (*mask_strides(mask_h, 2), *mask_strides(mask_c, 1))
    strided = (*strides(gates), *recurrence_grad.step_strides, *m_strides)
    numbers = (gates.time, gates.batch, gates.hidden, recurrence_grad.row, *strided)
    for t in reversed(range(gates.time)):
        launch(programs.lstm_backward, tensors, (t, *numbers), gates, GROUPS=recurrence_grad.groups)
        recurrence_grad.multiply()
    recurrence_grad.add_to(dh, mask_h, ALL_LSTM)


def gru_loop(
    a: Tensor,
    h: Tensor,
    h_BH: Tensor,
    w_GRR: Tensor,
    mask_h: Tensor | None,
    mask_c: None,
    lengths: Tensor | None,
    inner: Tensor | None = None,
    b_n: Tensor | None = None,
) -> None:
    """From the projected inputs `a` and the first state to the gates, and the states of all steps.

    With `inner` and the bias `b_n` the reset gate comes after the candidate's product, and `inner` is filled
    with the product plus bias.
    """
    gates = Gates(a, 3)
    h[0] = h_BH
    a_strides, m_strides = strides(gates), mask_strides(mask_h, 2)
    recurrence = Recurrence(gates, R_AND_Z if inner is None else ALL_GRU, w_GRR, mask_h, h[0])
    sizes = (gates.time, gates.batch, gates.hidden, recurrence.row)
    p, inputs = recurrence.p, recurrence.inputs_KBR
    with_p = (*a_strides, *recurrence.p_strides, *m_strides)
    w_n, (n_inputs_BR, n_BR) = w_GRR[2].T, w_GRR.new_zeros(2, gates.batch, recurrence.row)
    for t in range(gates.time):
        recurrence.multiply()
        if inner is None:
            launch(programs.gru_gates, (a, p, h, n_inputs_BR, mask_h), (t, *sizes[1:], *with_p), gates)
            torch.mm(n_inputs_BR, w_n, out=n_BR)
            numbers = (t, *sizes, *a_strides, *m_strides)
            candidate = (a, n_BR, h, inputs, mask_h, lengths)
            launch(programs.gru_candidate, candidate, numbers, gates, GROUPS=recurrence.groups)
        else:
            tensors = (a, p, b_n, h, inner, inputs, mask_h, lengths)
            launch(programs.gru_reset_after, tensors, (t, *sizes, *with_p), gates, GROUPS=recurrence.groups)


def gru_backward_loop(
    da: Tensor,
    dh: Tensor,
    a: Tensor,
    h: Tensor,
    dy: Tensor,
    w_GRR: Tensor,
    mask_h: Tensor | None,
    mask_c: None,
    lengths: Tensor | None,
    inner: Tensor | None = None,
    dp: Tensor | None = None,
) -> None:
    """The gradients of the gates before their activation and of the first state; with `inner` also those of
    the recurrent products, `dp`.
    """
    gates = Gates(a, 3)
    part = R_AND_Z if dp is None else ALL_GRU
    recurrence_grad = RecurrenceGradient(gates, part, w_GRR)
    step, (step_g, step_b) = recurrence_grad.step, recurrence_grad.step_strides
    sizes, m_strides = (gates.time, gates.batch, gates.hidden, recurrence_grad.row), mask_strides(mask_h, 2)
    w_n, (n_step_BR, n_grad_BR) = w_GRR[2], w_GRR.new_zeros(2, gates.batch, recurrence_grad.row)
    tensors = (a, h, inner, dy, dh, da, dp, step, n_step_BR, recurrence_grad.grad_h_KBR, mask_h, lengths)
    numbers = (*sizes, *strides(gates), step_g, step_b, *m_strides)
    for t in reversed(range(gates.time)):
        launch(programs.gru_backward, tensors, (t, *numbers), gates, GROUPS=recurrence_grad.groups)
        if dp is None:
            torch.mm(n_step_BR, w_n, out=n_grad_BR)
            reset = (a, h, dh, da, step, n_grad_BR, mask_h)
            reset_numbers = (t, *sizes[1:], *strides(gates), step_b, *m_strides)
            launch(programs.gru_gates_backward, reset, reset_numbers, gates)
        recurrence_grad.multiply()
    recurrence_grad.add_to(dh, mask_h, part)
