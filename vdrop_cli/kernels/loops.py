"""The loops over time of `triton.py`: a product of matrices and a Triton program by turns, all in place, so
that graphs can hold them.

T time  B batch  H hidden size  G gates (LSTM i f g o; GRU r z n)  K groups of gates: 1, or each for itself
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdrop_cli.kernels import programs
from vdrop_cli.kernels.gates import Gates, some_gates

BLOCK = 128  # elements of H that a program works on
WARPS = 4
FOUR, THREE, R_AND_Z, ONLY_N = slice(0, 4), slice(0, 3), slice(0, 2), slice(2, 3)  # gates


def launch(
    program: Any, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...], gates: Gates, **constants: int
) -> None:
    block = min(BLOCK, triton.next_power_of_2(gates.hidden))
    acc = tl.float64 if gates.memory.dtype == torch.float64 else tl.float32
    grid = (gates.batch, triton.cdiv(gates.hidden, block))
    program[grid](*tensors, *numbers, **constants, ACC=acc, BLOCK=block, num_warps=WARPS)


def strides(gates: Gates) -> tuple[int, ...]:
    """Of the gates along G, T and B."""
    return gates.view_GTBH.stride()[:3]


def mask_strides(mask: Tensor | None, dims: int) -> tuple[int, ...]:
    """Along its first dimensions, 0 where it is the same for all."""
    return (
        (0,) * dims
        if mask is None
        else tuple(mask.stride(d) if mask.shape[d] > 1 else 0 for d in range(dims))
    )


class Recurrence:
    """`U (m_h ∘ h)` of some gates, step after step: `enter` is written by the program of the step before, `p`
    read by that of this one.
    """

    def __init__(self, gates: Gates, part: slice, w_hh: Tensor, mask_h: Tensor | None, h_BH: Tensor) -> None:
        w, mask_TKBH = w_hh[gates.rows(part)], some_gates(mask_h, part)
        self.groups = 1 if mask_TKBH is None else mask_TKBH.shape[1]
        self.enter_KBH = w.new_empty(self.groups, gates.batch, gates.hidden)
        self.enter_KBH.copy_(h_BH if mask_TKBH is None else h_BH * mask_TKBH[0])
        self.product, count = (torch.bmm if gates.by_gate else torch.mm), part.stop - part.start
        if gates.by_gate:
            self.x, self.w = (
                self.enter_KBH.expand(count, -1, -1),
                w.view(count, gates.hidden, gates.hidden).mT,
            )
            self.p = w.new_empty(count, gates.batch, gates.hidden)
            self.p_strides = self.p.stride()[:2]
        else:
            self.x, self.w = self.enter_KBH[0], w.T
            self.p = w.new_empty(gates.batch, count * gates.hidden)
            self.p_strides = (gates.hidden, count * gates.hidden)

    def multiply(self) -> None:
        self.product(self.x, self.w, out=self.p)


class RecurrenceGradient:
    """The backward pass of a recurrence: what the gates of one step add to the gradient of h_{t-1}, [K, B,
    H], before its masks.
    """

    def __init__(self, da: Gates, part: slice, w_hh: Tensor) -> None:
        self.product, count, w = (
            (torch.bmm if da.by_gate else torch.mm),
            part.stop - part.start,
            w_hh[da.rows(part)],
        )
        self.steps = da.steps(part)
        self.groups = count if da.by_gate else 1
        self.w = w.view(count, da.hidden, da.hidden) if da.by_gate else w
        self.through_KBH = w.new_zeros(self.groups, da.batch, da.hidden)
        self.out = self.through_KBH if da.by_gate else self.through_KBH[0]

    def multiply(self, t: int) -> None:
        self.product(self.steps[t], self.w, out=self.out)

    def add_to(self, dh_BH: Tensor, mask_h: Tensor | None, part: slice) -> None:
        """After the last step, which is the first of the sequence: what comes to the state that it began
        with.
        """
        mask_TKBH = some_gates(mask_h, part)
        through_KBH = self.through_KBH.to(dh_BH.dtype)
        dh_BH.add_((through_KBH if mask_TKBH is None else through_KBH * mask_TKBH[0]).sum(0))


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
    """From the projected inputs `a` and the first states to the gates, and the states of all steps."""
    gates = Gates(a, 4)
    h[0], c[0] = h_BH, c_BH
    recurrence = Recurrence(gates, FOUR, w_hh, mask_h, h[0])
    tensors = (a, recurrence.p, h, c, recurrence.enter_KBH, mask_h, mask_c, lengths)
    strided = (*strides(gates), *recurrence.p_strides, *mask_strides(mask_h, 2), *mask_strides(mask_c, 1))
    numbers = (gates.time, gates.batch, gates.hidden, *strided)
    for t in range(gates.time):
        recurrence.multiply()
        launch(programs.lstm_forward, tensors, (t, *numbers), gates, GROUPS=recurrence.groups)


def lstm_loop_back(
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
    """The gradients of the gates before their activation, and of the first states; `dcells` are those of the
    cell states of all steps.
    """
    gates = Gates(a, 4)
    back = RecurrenceGradient(Gates(da, 4), FOUR, w_hh)
    tensors = (a, c, dy, dcells, dh, dc, da, back.through_KBH, mask_h, mask_c, lengths)
    numbers = (
        gates.time,
        gates.batch,
        gates.hidden,
        *strides(gates),
        *mask_strides(mask_h, 2),
        *mask_strides(mask_c, 1),
    )
    for t in reversed(range(gates.time)):
        launch(programs.lstm_backward, tensors, (t, *numbers), gates, GROUPS=back.groups)
        back.multiply(t)
    back.add_to(dh, mask_h, FOUR)


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
    """From the projected inputs `a` and the first state to the gates, and the states of all steps.

    With `inner` and the bias `b_n` the reset gate comes after the candidate's product, and `inner` is filled
    with that, the bias added.
    """
    gates = Gates(a, 3)
    h[0] = h_BH
    sizes, a_strides, m_strides = (
        (gates.time, gates.batch, gates.hidden),
        strides(gates),
        mask_strides(mask_h, 2),
    )
    recurrence = Recurrence(gates, R_AND_Z if inner is None else THREE, w_hh, mask_h, h[0])
    p, enter, with_p = recurrence.p, recurrence.enter_KBH, (*a_strides, *recurrence.p_strides, *m_strides)
    w_n, (n_enter_BH, n_BH) = w_hh[gates.rows(ONLY_N)].T, w_hh.new_empty(2, gates.batch, gates.hidden)
    for t in range(gates.time):
        recurrence.multiply()
        if inner is None:
            launch(programs.gru_gates, (a, p, h, n_enter_BH, mask_h), (t, *sizes[1:], *with_p), gates)
            torch.mm(n_enter_BH, w_n, out=n_BH)
            numbers = (t, *sizes, *a_strides, *m_strides)
            launch(
                programs.gru_candidate,
                (a, n_BH, h, enter, mask_h, lengths),
                numbers,
                gates,
                GROUPS=recurrence.groups,
            )
        else:
            tensors = (a, p, b_n, h, inner, enter, mask_h, lengths)
            launch(programs.gru_reset_after, tensors, (t, *sizes, *with_p), gates, GROUPS=recurrence.groups)


def gru_loop_back(
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
    """The gradients of the gates before their activation, with `inner` those of the recurrent products `dp`,
    and of the first state.
    """
    gates, of_a = Gates(a, 3), Gates(da, 3)
    sizes, strided = (gates.time, gates.batch, gates.hidden), (*strides(gates), *mask_strides(mask_h, 2))
    part = R_AND_Z if dp is None else THREE
    back = RecurrenceGradient(of_a if dp is None else Gates(dp, 3), part, w_hh)
    w_n, n_through_BH, n_steps = (
        w_hh[gates.rows(ONLY_N)],
        w_hh.new_empty(gates.batch, gates.hidden),
        of_a.view_GTBH[2].unbind(0),
    )
    tensors = (a, h, inner, dy, dh, da, dp, back.through_KBH, mask_h, lengths)
    for t in reversed(range(gates.time)):
        launch(programs.gru_backward, tensors, (t, *sizes, *strided), gates, GROUPS=back.groups)
        if dp is None:
            torch.mm(n_steps[t], w_n, out=n_through_BH)
            launch(
                programs.gru_gates_backward,
                (a, h, dh, da, n_through_BH, mask_h),
                (t, *sizes[1:], *strided),
                gates,
            )
        back.multiply(t)
    back.add_to(dh, mask_h, part)
