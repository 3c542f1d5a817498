"""The same functions as `reference`, with forward and backward written by hand; any device, plain torch operations.

All input projections of a layer are one product before the loop over time, all weight gradients one product after it. What
entered the recurrent products is kept for that. Masks that differ from gate to gate make of each product a batch of four
(GRU: three) of a quarter the size, so they cost little more.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)  K groups of gates: 1, or each for itself
N tokens  V vocabulary
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vdrop_cli.kernels.gates import (
    Gates,
    alive_steps,
    each_step,
    input_gradient,
    project_inputs,
    some_gates,
    sum_over_steps,
    weight_gradient,
    with_start,
)
from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.products import Weights, mm_into

LOGITS_AT_ONCE = 4_000_000  # elements of the chunk of logits that is held in fp32: 16 MB
SMALLEST = 1e-30  # probability whose logarithm is still exact in fp32
ROUNDED_CHUNKS = 4  # whose gradient is held in bf16, so that its products are few and large


class Recurrence:
    """`U (m_h ∘ h)` of some gates, step after step; what entered the products is kept for the gradient of U."""

    def __init__(self, gates: Gates, part: slice, w_hh: Tensor, mask_h: Tensor | None, h_before_TBH: Tensor) -> None:
        self.by_gate, self.steps = gates.by_gate, gates.steps(part)
        w_hh = w_hh[gates.rows(part)]
        self.w = gates.weights(w_hh)
        groups = len(gates.groups(part))
        mask_TKBH = some_gates(mask_h, part)
        self.masks_KBH = each_step(mask_TKBH if mask_TKBH is None else mask_TKBH.expand(-1, groups, -1, -1), gates.time)
        plain = self.masks_KBH is None and w_hh.dtype == h_before_TBH.dtype
        self.inputs_KTBH = (
            h_before_TBH.expand(groups, *h_before_TBH.shape)
            if plain
            else h_before_TBH.new_empty((groups, *h_before_TBH.shape), dtype=w_hh.dtype)
        )
        self.inputs = None if plain else list(self.inputs_KTBH.unbind(1))

    def add(self, t: int, h_BH: Tensor) -> None:
        """Adds the products of step `t` to its gates."""
        if self.inputs is None:
            x_KBH = h_BH.expand(len(self.inputs_KTBH), *h_BH.shape)
        elif self.masks_KBH is None:
            x_KBH = self.inputs[t].copy_(h_BH)
        else:
            x_KBH = torch.mul(h_BH, self.masks_KBH[t], out=self.inputs[t])
        self.w.add_product(self.steps[t], x_KBH if self.by_gate else x_KBH[0])


class RecurrenceGradient:
    """The way back through a recurrence: the gradients `da` of its gates, complete at one step, give that of h_{t-1}."""

    def __init__(self, da: Gates, low: Gates, part: slice, w_hh: Tensor, mask_h: Tensor | None) -> None:
        self.by_gate, self.full, self.low = da.by_gate, da.steps(part), low.steps(part)
        self.dtype, self.same = da.memory.dtype, da.memory.dtype == low.memory.dtype
        self.w = da.weights(w_hh[da.rows(part)], transposed=True)
        self.masks_KBH = each_step(some_gates(mask_h, part), da.time)

    def step(self, t: int) -> Tensor:
        """What comes to the gradient of h_{t-1} through the products of step `t`."""
        step = self.full[t] if self.same else self.low[t].copy_(self.full[t])
        mask_KBH = None if self.masks_KBH is None else self.masks_KBH[t]
        through = self.w.product(step)
        if self.by_gate:
            return (through if mask_KBH is None else through * mask_KBH).sum(0, dtype=self.dtype)
        return through.to(self.dtype) if mask_KBH is None else through * mask_KBH[0]


def through_sigmoid(d: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """d · y · (1 - y)"""
    result: Tensor = torch.ops.aten.sigmoid_backward.grad_input(d, y, grad_input=out)
    return result


def through_tanh(d: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """d · (1 - y²)"""
    result: Tensor = torch.ops.aten.tanh_backward.grad_input(d, y, grad_input=out)
    return result


class LSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TBD: Tensor,
        h_BH: Tensor,
        c_BH: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
        mask_x: Tensor | None,
        mask_h: Tensor | None,
        mask_c: Tensor | None,
        lengths: Tensor | None,
        compute_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        time, every, hidden = len(x_TBD), slice(0, 4), w_hh.shape[1]
        w_ih, w_hh = w_ih.to(compute_dtype), w_hh.to(compute_dtype)
        gates = Gates.of(x_TBD, hidden, 4, Masks(mask_x, mask_h))
        inputs_ND = project_inputs(gates, x_TBD, w_ih, b_ih + b_hh, mask_x)
        hs, cs = with_start(h_BH, time), with_start(c_BH, time)
        recurrence = Recurrence(gates, every, w_hh, mask_h, hs[:-1])
        g_TBH, tanh_c_TBH = torch.empty_like(hs[1:]), torch.empty_like(cs[1:])
        alive_TB1, masks_c = alive_steps(lengths, time), each_step(mask_c, time)
        step_views = zip(
            *(v.unbind(0) for v in (gates.view_GTBH.transpose(0, 1), *gates.view_GTBH, g_TBH, tanh_c_TBH, hs[1:], cs[1:])), strict=True
        )
        h, c = h_BH, c_BH
        for t, (every_gate, i, f, a_g, o, g, tanh_c, h_new, c_new) in enumerate(step_views):
            recurrence.add(t, h)
            torch.tanh(a_g, out=g)
            every_gate.sigmoid_()  # g is there already; one call for all is quicker than one for each
            torch.mul(f, c, out=c_new).addcmul_(i, g)
            if masks_c is not None:
                c_new.mul_(masks_c[t])
            torch.mul(o, torch.tanh(c_new, out=tanh_c), out=h_new)
            if alive_TB1 is not None:
                c_new.copy_(torch.where(alive_TB1[t], c_new, c))
                h_new.copy_(torch.where(alive_TB1[t], h_new, h))
            h, c = h_new, c_new
        ctx.save_for_backward(
            x_TBD, w_ih, w_hh, mask_x, mask_h, mask_c, alive_TB1, cs, g_TBH, tanh_c_TBH, gates.memory, recurrence.inputs_KTBH, *inputs_ND
        )
        y_TBH = hs[1:].clone() if alive_TB1 is None else hs[1:] * alive_TB1
        return y_TBH, h.clone(), c.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TBH: Tensor, dh_BH: Tensor, dc_BH: Tensor) -> tuple[Tensor | None, ...]:
        x_TBD, w_ih, w_hh, mask_x, mask_h, mask_c, alive_TB1, cs, g_TBH, tanh_c_TBH, memory, inputs_KTBH, *inputs_ND = ctx.saved_tensors
        gates = Gates(memory, 4)
        every = slice(0, 4)
        i_TBH, f_TBH, _, o_TBH = gates.view_GTBH
        # What does not depend on the gradient is worked out for all steps at once: d a_gate = slope ∘ (dc or dh).
        da = gates.another()
        low = da if w_hh.dtype == x_TBD.dtype else gates.another(w_hh.dtype)
        slope_i, slope_f, slope_g, slope_o = da.view_GTBH
        through_sigmoid(g_TBH, i_TBH, out=slope_i)
        through_sigmoid(cs[:-1], f_TBH, out=slope_f)
        through_tanh(i_TBH, g_TBH, out=slope_g)
        through_sigmoid(tanh_c_TBH, o_TBH, out=slope_o)
        c_slope_TBH = through_tanh(o_TBH, tanh_c_TBH, out=torch.empty_like(tanh_c_TBH))
        if alive_TB1 is not None:
            da.view_GTBH.mul_(alive_TB1)
            c_slope_TBH.mul_(alive_TB1)
            dy_TBH = dy_TBH * alive_TB1
        way_back = RecurrenceGradient(da, low, every, w_hh, mask_h)
        masks_c = each_step(mask_c, gates.time)
        step_views = list(zip(*(v.unbind(0) for v in (da.view_GTBH[:3].transpose(0, 1), slope_o, c_slope_TBH, f_TBH, dy_TBH)), strict=True))
        dh, dc = dh_BH.clone(), dc_BH.clone()
        for t in reversed(range(gates.time)):
            i_f_g, o, c_slope, f, dy = step_views[t]
            dh.add_(dy)
            o.mul_(dh)
            dc.addcmul_(dh, c_slope)
            dc_new = dc if masks_c is None else dc * masks_c[t]
            i_f_g.mul_(dc_new)
            carried, dh_before = dc_new * f, way_back.step(t)
            if alive_TB1 is not None:
                carried = torch.where(alive_TB1[t], carried, dc)
                dh_before = torch.where(alive_TB1[t], dh_before, dh)
            dh, dc = dh_before, carried
        db = sum_over_steps(da)
        dw_ih, dw_hh = torch.empty_like(w_ih, dtype=x_TBD.dtype), torch.empty_like(w_hh, dtype=x_TBD.dtype)
        weight_gradient(low, every, inputs_ND, dw_ih)
        weight_gradient(low, every, list(inputs_KTBH.flatten(1, 2)), dw_hh)
        dx_TBD = input_gradient(low, x_TBD, w_ih, mask_x) if ctx.needs_input_grad[0] else None
        return dx_TBD, dh, dc, dw_ih, dw_hh, db, db.clone(), None, None, None, None, None


class GRU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TBD: Tensor,
        h_BH: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
        mask_x: Tensor | None,
        mask_h: Tensor | None,
        lengths: Tensor | None,
        reset_after: bool,
        compute_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        time, hidden = len(x_TBD), w_hh.shape[1]
        r_and_z, only_n = slice(0, 2), slice(2, 3)
        w_ih, w_hh = w_ih.to(compute_dtype), w_hh.to(compute_dtype)
        gates = Gates.of(x_TBD, hidden, 3, Masks(mask_x, mask_h))
        inputs_ND = project_inputs(gates, x_TBD, w_ih, b_ih if reset_after else b_ih + b_hh, mask_x)
        if reset_after:
            gates.view_GTBH[r_and_z].add_(b_hh.view(3, 1, 1, -1)[r_and_z])
        hs = with_start(h_BH, time)
        recurrence = Recurrence(gates, r_and_z, w_hh, mask_h, hs[:-1])
        # The candidate's own recurrent product: of m ∘ h, or where the reset gate comes first, of r ∘ m ∘ h.
        masks_n = each_step(some_gates(mask_h, only_n), time)
        w_n = Weights(w_hh[2 * hidden :], gates.batch)
        n_inputs_TBH = torch.empty_like(hs[1:], dtype=compute_dtype)
        inner_TBH = torch.empty_like(hs[1:]) if reset_after else None  # U_n (m ∘ h) + b
        alive_TB1 = alive_steps(lengths, time)
        step_views = zip(
            *(v.unbind(0) for v in (gates.view_GTBH[r_and_z].transpose(0, 1), *gates.view_GTBH, n_inputs_TBH, hs[1:])), strict=True
        )
        h = h_BH
        for t, (r_z, r, z, n, n_input, h_new) in enumerate(step_views):
            recurrence.add(t, h)
            r_z.sigmoid_()
            masked_h = h if masks_n is None else h * masks_n[t][0]
            if inner_TBH is not None:
                n_input.copy_(masked_h)
                inner = torch.add(w_n.product(n_input), b_hh[2 * hidden :], out=inner_TBH[t])
                n.addcmul_(r, inner)
            else:
                torch.mul(r, masked_h, out=n_input)
                w_n.add_product(n, n_input)
            n.tanh_()
            torch.lerp(n, h, z, out=h_new)
            if alive_TB1 is not None:
                h_new.copy_(torch.where(alive_TB1[t], h_new, h))
            h = h_new
        ctx.save_for_backward(
            x_TBD, w_ih, w_hh, mask_x, mask_h, alive_TB1, hs, n_inputs_TBH, inner_TBH, gates.memory, recurrence.inputs_KTBH, *inputs_ND
        )
        y_TBH = hs[1:].clone() if alive_TB1 is None else hs[1:] * alive_TB1
        return y_TBH, h.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TBH: Tensor, dh_BH: Tensor) -> tuple[Tensor | None, ...]:
        x_TBD, w_ih, w_hh, mask_x, mask_h, alive_TB1, hs, n_inputs_TBH, inner_TBH, memory, inputs_KTBH, *inputs_ND = ctx.saved_tensors
        gates = Gates(memory, 3)
        r_and_z, only_n, every = slice(0, 2), slice(2, 3), slice(0, 3)
        r_TBH, z_TBH, n_TBH = gates.view_GTBH
        da = gates.another()
        low = da if w_hh.dtype == x_TBD.dtype else gates.another(w_hh.dtype)
        da_r, da_z, da_n = da.view_GTBH
        torch.mul(r_TBH, 1 - r_TBH, out=da_r)
        through_sigmoid(hs[:-1] - n_TBH, z_TBH, out=da_z)
        through_tanh(1 - z_TBH, n_TBH, out=da_n)
        carry_TBH = z_TBH
        if alive_TB1 is not None:
            da.view_GTBH.mul_(alive_TB1)
            dy_TBH = dy_TBH * alive_TB1
            carry_TBH = torch.where(alive_TB1, z_TBH, 1.0)
        way_back = RecurrenceGradient(da, low, r_and_z, w_hh, mask_h)
        masks_n = each_step(some_gates(mask_h, only_n), gates.time)
        w_n = Weights(w_hh[2 * gates.hidden :].T, gates.batch)
        d_inner_TBH = torch.empty_like(inner_TBH) if inner_TBH is not None else None
        # What the candidate's recurrent product gives back to its inputs; its gates' gradients, in the type multiplied in.
        d_product_TBH = torch.empty_like(n_inputs_TBH)
        step_views = list(zip(*(v.unbind(0) for v in (r_TBH, carry_TBH, da_r, da_z, da_n, d_product_TBH, hs[:-1], dy_TBH)), strict=True))
        dh = dh_BH.clone()
        for t in reversed(range(gates.time)):
            r, carry, slope_r, slope_z, slope_n, d_product, h_before, dy = step_views[t]
            dh.add_(dy)
            slope_z.mul_(dh)
            slope_n.mul_(dh)
            dh = dh * carry
            if d_inner_TBH is not None:
                slope_r.mul_(slope_n * inner_TBH[t])
                d_product.copy_(torch.mul(slope_n, r, out=d_inner_TBH[t]))
            else:
                d_product.copy_(slope_n)
            through = w_n.product(d_product).to(dh.dtype)
            if masks_n is not None:
                through = through * masks_n[t][0]
            if d_inner_TBH is None:
                slope_r.mul_(through * h_before)
                through = through * r
            dh.add_(through).add_(way_back.step(t))
        db_ih = sum_over_steps(da)
        db_hh = db_ih.clone() if d_inner_TBH is None else torch.cat([db_ih[: 2 * gates.hidden], d_inner_TBH.sum((0, 1))])
        if low is not da:
            low.view_GTBH[2].copy_(da_n)
        dw_ih, dw_hh = torch.empty_like(w_ih, dtype=x_TBD.dtype), torch.empty_like(w_hh, dtype=x_TBD.dtype)
        weight_gradient(low, every, inputs_ND, dw_ih)
        weight_gradient(low, r_and_z, list(inputs_KTBH.flatten(1, 2)), dw_hh)
        mm_into(dw_hh[2 * gates.hidden :], d_product_TBH.flatten(0, 1).T, n_inputs_TBH.flatten(0, 1))
        dx_TBD = input_gradient(low, x_TBD, w_ih, mask_x) if ctx.needs_input_grad[0] else None
        return dx_TBD, dh, dw_ih, dw_hh, db_ih, db_hh, None, None, None, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """Works through the logits chunk by chunk, and makes the gradients of a chunk while its logits are there.

    They are made for an upstream gradient of one a token. Any other that is the same for all tokens, as that of a sum or
    a mean, scales them in place; one that differs from token to token, or a second backward pass, has the chunks worked
    through once more.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor, compute_dtype: torch.dtype) -> Tensor:
        nll_N, ctx.gradients = loss_and_gradients(x_ND, w_VD, b_V, targets_N, None, compute_dtype)
        ctx.save_for_backward(x_ND, w_VD, b_V, targets_N)
        ctx.compute_dtype = compute_dtype
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, w_VD, b_V, targets_N = ctx.saved_tensors
        if ctx.gradients is not None and is_even(dnll_N):
            dx_ND, dw_VD, db_V = (gradient.mul_(dnll_N[0]) for gradient in ctx.gradients)
            ctx.gradients = None
        else:
            _, (dx_ND, dw_VD, db_V) = loss_and_gradients(x_ND, w_VD, b_V, targets_N, dnll_N, ctx.compute_dtype)
        return dx_ND, dw_VD, db_V, None, None


def is_even(dnll_N: Tensor) -> bool:
    """Whether the gradient is the same for all tokens; that of a sum tells so itself, without a wait for a GPU."""
    return dnll_N.stride(0) == 0 or bool((dnll_N == dnll_N[0]).all())


def chunks(rows: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]


def loss_and_probabilities(x_MD: Tensor, w_VD: Tensor, b_V: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each token, and the probabilities of all words, [M, V]."""
    logits_MV = (x_MD @ w_VD.T).add_(b_V)  # always fp32: rounding them to bf16 unsettles training
    return by_logarithms(logits_MV, targets_M) if logits_MV.is_cuda else by_probabilities(logits_MV, targets_M)


def by_logarithms(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """The plain way, in which nothing depends on a number that a GPU would have to be waited for."""
    log_p_MV = logits_MV.log_softmax(1)
    return -log_p_MV.gather(1, targets_M[:, None]).squeeze(1), log_p_MV.exp_()


def by_probabilities(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """With a pass less over the logits, which counts on a CPU."""
    p_MV = logits_MV.softmax(1)
    p_M = p_MV.gather(1, targets_M[:, None]).squeeze(1)
    nll_M = -p_M.log()
    if p_M.min() < SMALLEST:  # where probabilities underflow, logits do not
        few = p_M < SMALLEST
        nll_M[few] = logits_MV[few].logsumexp(1) - logits_MV[few, targets_M[few]]
    return nll_M, p_MV


def loss(x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor) -> Tensor:
    parts = chunks(len(x_ND), max(1, LOGITS_AT_ONCE // len(b_V)))
    return torch.cat([loss_and_probabilities(x_ND[part], w_VD, b_V, targets_N[part])[0] for part in parts])


def loss_and_gradients(
    x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor, dnll_N: Tensor | None, compute_dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Negative log-likelihood of each token, and the gradients of x, w and b (`dnll_N` None: all ones)."""
    nll_N, dx_ND, dw_VD, db_V = torch.empty_like(x_ND[:, 0]), torch.empty_like(x_ND), torch.empty_like(w_VD), torch.zeros_like(b_V)
    w_low_VD, x_low_ND, rounds = w_VD.to(compute_dtype), x_ND.to(compute_dtype), compute_dtype != x_ND.dtype
    rows = max(1, LOGITS_AT_ONCE // len(b_V))
    for block in chunks(len(x_ND), rows * ROUNDED_CHUNKS if rounds else rows):
        block_ND, targets_M = x_ND[block], targets_N[block]
        d_low_MV = w_low_VD.new_empty(len(block_ND), len(b_V)) if rounds else w_low_VD
        for part in chunks(len(block_ND), rows):
            nll_N[block][part], d_MV = loss_and_probabilities(block_ND[part], w_VD, b_V, targets_M[part])
            d_MV.scatter_add_(1, targets_M[part, None], d_MV.new_full((len(d_MV), 1), -1.0))
            if dnll_N is not None:
                d_MV.mul_(dnll_N[block][part, None])
            db_V += d_MV.sum(0)
            if rounds:
                d_low_MV[part] = d_MV
            else:
                d_low_MV = d_MV
        mm_into(dx_ND[block], d_low_MV, w_low_VD)
        mm_into(dw_VD, d_low_MV.T, x_low_ND[block], add=block.start > 0)
    return nll_N, [dx_ND, dw_VD, db_V]


def lstm(
    x_TBD: Tensor,
    h_BH: Tensor,
    c_BH: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    masks: Masks,
    lengths: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor] = LSTM.apply(  # type: ignore[no-untyped-call]
        x_TBD, h_BH, c_BH, w_ih, w_hh, b_ih, b_hh, *masks, lengths, compute_dtype or x_TBD.dtype
    )
    return outputs


def gru(
    x_TBD: Tensor,
    h_BH: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    masks: Masks,
    lengths: Tensor | None = None,
    reset_after: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor] = GRU.apply(  # type: ignore[no-untyped-call]
        x_TBD, h_BH, w_ih, w_hh, b_ih, b_hh, masks.x, masks.h, lengths, reset_after, compute_dtype or x_TBD.dtype
    )
    return outputs


def linear_cross_entropy(x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
    with torch.autocast(x_ND.device.type, enabled=False):  # it would round the logits
        x_ND = x_ND.to(w_VD.dtype)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, w_VD, b_V))):
            return loss(x_ND, w_VD, b_V, targets_N)
        nll_N: Tensor = LinearCrossEntropy.apply(x_ND, w_VD, b_V, targets_N, compute_dtype or x_ND.dtype)  # type: ignore[no-untyped-call]
        return nll_N
