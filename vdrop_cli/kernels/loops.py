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
from vdrop_cli.kernels.gates import ALL_GRU, ALL_LSTM, ONLY_N, R_AND_Z, Gates, select_gates
from vdrop_cli.kernels.masks import mask_strides

BLOCK = 128  # elements of H per program
WARPS = 4


def launch(
    program: Any, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...], gates: Gates, **constants: int
) -> None:
    block = min(BLOCK, triton.next_power_of_2(gates.row_size))
    acc = tl.float64 if gates.memory.dtype == torch.float64 else tl.float32
    grid = (gates.batch, triton.cdiv(gates.row_size, block))
    program[grid](*tensors, *numbers, **constants, ACC=acc, BLOCK=block, num_warps=WARPS)


def strides(gates: Gates) -> tuple[int, ...]:
    """The strides of the gates along G, T and B."""
    return gates.view_GTBR.stride()[:3]


class Recurrence:
    """Computes `U (m_h ∘ h)` of some gates, step after step: the program of a step reads the products `p` and
    writes the inputs of the next products.
    """

    def __init__(self, gates: Gates, part: slice, w_hh: Tensor, mask_h: Tensor | None, h_BH: Tensor) -> None:
        w, mask_TKBH = w_hh[gates.rows(part)], select_gates(mask_h, part)
        row = gates.row_size
        self.groups = 1 if mask_TKBH is None else mask_TKBH.shape[1]
        self.inputs_KBR = w.new_zeros(self.groups, gates.batch, row)
        self.inputs_KBR[..., : h_BH.shape[1]] = h_BH if mask_TKBH is None else h_BH * mask_TKBH[0]
        self.product, count = (torch.bmm if gates.by_gate else torch.mm), part.stop - part.start
        if gates.by_gate:
            self.x = self.inputs_KBR.expand(count, -1, -1)
            self.w = w.view(count, row, row).mT
            self.p = w.new_empty(count, gates.batch, row)
            self.p_strides = self.p.stride()[:2]
        else:
            self.x, self.w = self.inputs_KBR[0], w.T
            self.p = w.new_empty(gates.batch, count * row)
            self.p_strides = (row, count * row)

    def multiply(self) -> None:
        self.product(self.x, self.w, out=self.p)


class RecurrenceGradient:
    """The backward pass of `Recurrence`: computes the gradient of h_{t-1}, [K, B, R], from the gradients of
    the gates at step t. The gradient is not yet multiplied by the masks of h.
    """

    def __init__(self, da: Gates, part: slice, w_hh: Tensor) -> None:
        count, w = part.stop - part.start, w_hh[da.rows(part)]
        self.product = torch.bmm if da.by_gate else torch.mm
        self.steps = da.unbind_steps(part)
        self.groups = count if da.by_gate else 1
        self.w = w.view(count, da.row_size, da.row_size) if da.by_gate else w
        self.grad_h_KBR = w.new_zeros(self.groups, da.batch, da.row_size)
        self.out = self.grad_h_KBR if da.by_gate else self.grad_h_KBR[0]

    def multiply(self, t: int) -> None:
        self.product(self.steps[t], self.w, out=self.out)

    def add_to(self, dh_BH: Tensor, mask_h: Tensor | None, part: slice) -> None:
        """Adds the gradient of the state before the first step."""
        mask_TKBH = select_gates(mask_h, part)
        grad_h_KBH = self.grad_h_KBR[..., : dh_BH.shape[1]].to(dh_BH.dtype)
        dh_BH.add_((grad_h_KBH if mask_TKBH is None else grad_h_KBH * mask_TKBH[0]).sum(0))


def zero_row_ends(gates: Gates, hidden: int) -> None:
    """Sets what lies beyond H in each row to zero, where the programs do not write."""
    if gates.row_size > hidden:
        gates.view_GTBR[..., hidden:] = 0


def lstm_loop(
    a: Tensor,
    h: Tensor,
    c: Tensor,
    h_BH: Tensor,
    c_BH: Tensor,
    w_hh: Tensor,
    mask_h: Tensor | None,
    mask_c: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Computes the gates and the states of all steps from the projected inputs and the first states. `a`
    holds the projected inputs first and the gates afterwards; the states are written into `h` and `c`.
    """
    gates = Gates(a, 4)
    h[0], c[0] = h_BH, c_BH
    recurrence = Recurrence(gates, ALL_LSTM, w_hh, mask_h, h[0])
    tensors = (a, recurrence.p, h, c, recurrence.inputs_KBR, mask_h, mask_c, lengths)
    strided = (*strides(gates), *recurrence.p_strides, *mask_strides(mask_h, 2), *mask_strides(mask_c, 1))
    numbers = (gates.time, gates.batch, h.shape[2], gates.row_size, *strided)
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
    w_hh: Tensor,
    mask_h: Tensor | None,
    mask_c: Tensor | None,
    lengths: Tensor | None,
    dcells: Tensor | None = None,
) -> None:
    """Computes the gradients of the gates before their activation and of the first states.

    The gradients of the gates are written into `da`, those of the first states into `dh` and `dc`. At first
    `dh` and `dc` hold the upstream gradients of the last states. `dy` and `dcells` are the upstream gradients
    of the hidden states and the cell states of all steps.
    """
    gates, gate_gradients = Gates(a, 4), Gates(da, 4)
    zero_row_ends(gate_gradients, c.shape[2])
    recurrence_grad = RecurrenceGradient(gate_gradients, ALL_LSTM, w_hh)
    tensors = (a, c, dy, dcells, dh, dc, da, recurrence_grad.grad_h_KBR, mask_h, mask_c, lengths)
    strided = (*strides(gates), *mask_strides(mask_h, 2), *mask_strides(mask_c, 1))
    numbers = (gates.time, gates.batch, c.shape[2], gates.row_size, *strided)
    for t in reversed(range(gates.time)):
        launch(programs.lstm_backward, tensors, (t, *numbers), gates, GROUPS=recurrence_grad.groups)
        recurrence_grad.multiply(t)
    recurrence_grad.add_to(dh, mask_h, ALL_LSTM)


def gru_loop(
    a: Tensor,
    h: Tensor,
    h_BH: Tensor,
    w_hh: Tensor,
    mask_h: Tensor | None,
    mask_c: None,
    lengths: Tensor | None,
    inner: Tensor | None = None,
    b_n: Tensor | None = None,
) -> None:
    """Computes the gates and the states of all steps from the projected inputs and the first state.

    `a` holds the projected inputs first and the gates afterwards; the states are written into `h`. If `inner`
    and the bias `b_n` are given, the reset gate comes after the candidate's recurrent product. Then `inner`
    is filled with that product plus bias.
    """
    gates = Gates(a, 3)
    h[0] = h_BH
    a_strides, m_strides = strides(gates), mask_strides(mask_h, 2)
    recurrence = Recurrence(gates, R_AND_Z if inner is None else ALL_GRU, w_hh, mask_h, h[0])
    sizes = (gates.time, gates.batch, h.shape[2], gates.row_size)
    p, inputs = recurrence.p, recurrence.inputs_KBR
    with_p = (*a_strides, *recurrence.p_strides, *m_strides)
    w_n, (n_inputs_BR, n_BR) = w_hh[gates.rows(ONLY_N)].T, w_hh.new_zeros(2, gates.batch, gates.row_size)
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
    w_hh: Tensor,
    mask_h: Tensor | None,
    mask_c: None,
    lengths: Tensor | None,
    inner: Tensor | None = None,
    dp: Tensor | None = None,
) -> None:
    """Computes the gradients of the gates before their activation, `da`, and of the first state, `dh`.

    With `inner` it also computes the gradients of the recurrent products, `dp`. At first `dh` holds the
    upstream gradient of the last state.
    """
    gates, gate_gradients = Gates(a, 3), Gates(da, 3)
    zero_row_ends(gate_gradients, h.shape[2])
    part, product_gradients = R_AND_Z, gate_gradients
    if dp is not None:
        part, product_gradients = ALL_GRU, Gates(dp, 3)
        zero_row_ends(product_gradients, h.shape[2])
    sizes = (gates.time, gates.batch, h.shape[2], gates.row_size)
    strided = (*strides(gates), *mask_strides(mask_h, 2))
    recurrence_grad = RecurrenceGradient(product_gradients, part, w_hh)
    w_n, n_steps = w_hh[gates.rows(ONLY_N)], gate_gradients.view_GTBR[2].unbind(0)
    n_grad_BR = w_hh.new_empty(gates.batch, gates.row_size)
    tensors = (a, h, inner, dy, dh, da, dp, recurrence_grad.grad_h_KBR, mask_h, lengths)
    for t in reversed(range(gates.time)):
        launch(programs.gru_backward, tensors, (t, *sizes, *strided), gates, GROUPS=recurrence_grad.groups)
        if dp is None:
            torch.mm(n_steps[t], w_n, out=n_grad_BR)
            numbers = (t, *sizes[1:], *strided)
            launch(programs.gru_gates_backward, (a, h, dh, da, n_grad_BR, mask_h), numbers, gates)
        recurrence_grad.multiply(t)
    recurrence_grad.add_to(dh, mask_h, part)
