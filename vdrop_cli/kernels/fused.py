"""The same functions as `reference`, with forward and backward written by hand; any device, plain torch
operations.

All input projections of a layer are one product before the loop over time, all weight gradients one product
after it. What entered the recurrent products is kept for that. Masks that differ from gate to gate make of
each product a batch of four (GRU: three) of a quarter the size, so they cost little more. Sequences of
different lengths are packed (`layout.py`): what is written [T, B, …] here then is [N, 1, …], and a step is of
those sequences that have it.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)  K groups of gates: 1, or each
for itself N tokens  V vocabulary
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from vdrop_cli.kernels import reference
from vdrop_cli.kernels.derivatives import cell_gradients, needs_reference, reference_gradients
from vdrop_cli.kernels.gates import (
    Gates,
    input_gradient,
    project_inputs,
    some_gates,
    sum_over_steps,
    weight_gradient,
)
from vdrop_cli.kernels.layout import Layout
from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.products import Weights, exact_sums, mm_into

SLOPES_AT_ONCE = (
    2**18
)  # of a gate, worked out just before the steps that they are of, so that they are still in the cache
LOGITS_AT_ONCE = 4_000_000  # elements of the chunk of logits that is held in fp32: 16 MB
LOGITS_AT_ONCE_ON_GPU = 2**25  # 128 MB: all of a training step of the published sizes
SMALLEST = 1e-30  # probability whose logarithm is still exact in fp32
# whose gradient is held in bf16, so that its products are few and large; on a GPU a chunk is large by itself
ROUNDED_CHUNKS = 4


class Recurrence:
    """`U (m_h ∘ h)` of some gates, step after step; what entered the products is kept for the gradient of U,
    if it is not h itself.
    """

    def __init__(
        self, gates: Gates, part: slice, layout: Layout, w_hh: Tensor, mask_h: Tensor | None, like: Tensor
    ) -> None:
        self.by_gate, self.steps = gates.by_gate, gates.steps(part, layout)
        w_hh = w_hh[gates.rows(part)]
        self.w, self.groups = gates.weights(w_hh, layout.most), len(gates.groups(part))
        mask_TKBH = some_gates(mask_h, part)
        self.masks_KBH = layout.masks(
            mask_TKBH if mask_TKBH is None else mask_TKBH.expand(-1, self.groups, -1, -1)
        )
        plain = self.masks_KBH is None and w_hh.dtype == like.dtype
        self.kept_KTBH = (
            None
            if plain
            else like.new_empty((self.groups, gates.time, gates.batch, gates.hidden), dtype=w_hh.dtype)
        )
        self.inputs = None if self.kept_KTBH is None else layout.each(self.kept_KTBH, 1)

    def add(self, t: int, h_BH: Tensor) -> None:
        """Adds the products of step `t` to its gates."""
        if self.inputs is None:
            x_KBH = h_BH.expand(self.groups, *h_BH.shape)
        elif self.masks_KBH is None:
            x_KBH = self.inputs[t].copy_(h_BH)
        else:
            x_KBH = torch.mul(h_BH, self.masks_KBH[t], out=self.inputs[t])
        self.w.add_product(self.steps[t], x_KBH if self.by_gate else x_KBH[0])


class RecurrenceGradient:
    """The backward pass of a recurrence: the gradients `da` of its gates, complete at one step, give that of
    h_{t-1}.
    """

    def __init__(
        self, da: Gates, low: Gates, part: slice, layout: Layout, w_hh: Tensor, mask_h: Tensor | None
    ) -> None:
        self.by_gate, self.full, self.low = da.by_gate, da.steps(part, layout), low.steps(part, layout)
        self.dtype, self.same = da.memory.dtype, da.memory.dtype == low.memory.dtype
        self.w = da.weights(w_hh[da.rows(part)], layout.most, transposed=True)
        self.masks_KBH = layout.masks(some_gates(mask_h, part))

    def step(self, t: int) -> Tensor:
        """What comes to the gradient of h_{t-1} through the products of step `t`."""
        step = self.full[t] if self.same else self.low[t].copy_(self.full[t])
        mask_KBH = None if self.masks_KBH is None else self.masks_KBH[t]
        through = self.w.product(step)
        if self.by_gate:
            return (through if mask_KBH is None else through * mask_KBH).sum(0, dtype=self.dtype)
        return through.to(self.dtype) if mask_KBH is None else through * mask_KBH[0]


def entered(kept_KTBH: Tensor | None, before_TBH: Tensor | None, groups: int) -> list[Tensor]:
    """What entered the products of each group of gates at all steps, [T·B, H]: what was kept, or else the
    states before each step.
    """
    if kept_KTBH is not None:
        return list(kept_KTBH.flatten(1, 2))
    assert before_TBH is not None
    return [before_TBH.flatten(0, 1)] * groups


def through_sigmoid(d: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """d · y · (1 - y)"""
    result: Tensor = torch.ops.aten.sigmoid_backward.grad_input(d, y, grad_input=out)
    return result


def through_tanh(d: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """d · (1 - y²)"""
    result: Tensor = torch.ops.aten.tanh_backward.grad_input(d, y, grad_input=out)
    return result


Way = TypeVar("Way", bound=Callable[..., Any])  # of a function, forward or back


def without_autocast(way: Way) -> Way:
    """The forward or backward of a function, unchanged by a user's autocast, which would round some products
    and not others.
    """

    @wraps(way)
    def on_its_own(ctx: Any, *tensors: Any) -> Any:
        if way.__name__ == "forward":
            ctx.device_type = tensors[0].device.type
        with torch.autocast(ctx.device_type, enabled=False), exact_sums(ctx.device_type):
            return way(ctx, *tensors)

    return cast(Way, on_its_own)


class LSTM(torch.autograd.Function):
    @staticmethod
    @without_autocast
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
        cells: bool,
    ) -> tuple[Tensor, ...]:
        every, hidden, layout = slice(0, 4), w_hh.shape[1], Layout.of(x_TBD, lengths)
        inputs = (x_TBD, h_BH, c_BH, w_ih, w_hh, b_ih, b_hh)
        w_ih, w_hh = w_ih.to(compute_dtype), w_hh.to(compute_dtype)
        x_TBD = layout.pack(x_TBD)
        gates = Gates.of(x_TBD, hidden, 4, Masks(mask_x, mask_h))
        inputs_ND = project_inputs(gates, x_TBD, w_ih, b_ih + b_hh, layout.mask_of_all(mask_x))
        h, c = layout.sort(h_BH), layout.sort(c_BH)
        hs, cs = layout.states(h), layout.states(c)
        recurrence = Recurrence(gates, every, layout, w_hh, mask_h, hs)
        g_TBH, tanh_c_TBH = torch.empty_like(layout.after(hs)), torch.empty_like(layout.after(cs))
        masks_c = layout.masks(mask_c)
        by_step = (
            layout.each(v) for v in (*gates.view_GTBH, g_TBH, tanh_c_TBH, layout.after(hs), layout.after(cs))
        )
        for t, (every_gate, i, f, a_g, o, g, tanh_c, h_new, c_new) in enumerate(
            zip(layout.each(gates.view_GTBH, 1), *by_step, strict=True)
        ):
            h, c = layout.go_on(t, h), layout.go_on(t, c)
            recurrence.add(t, h)
            torch.tanh(a_g, out=g)
            every_gate.sigmoid_()  # g is there already; one call for all is quicker than one for each
            torch.mul(f, c, out=c_new).addcmul_(i, g)
            if masks_c is not None:
                c_new.mul_(masks_c[t])
            torch.mul(o, torch.tanh(c_new, out=tanh_c), out=h_new)
            h, c = h_new, c_new
        ctx.layout, ctx.compute_dtype, ctx.cells = layout, compute_dtype, cells
        ctx.set_materialize_grads(False)
        kept = (hs, None) if recurrence.kept_KTBH is None else (None, recurrence.kept_KTBH)
        saved = (mask_x, mask_h, mask_c, lengths, w_ih, w_hh, *kept, cs, g_TBH, tanh_c_TBH, gates.memory)
        ctx.save_for_backward(*inputs, *saved, *inputs_ND)
        outputs = (layout.outputs(hs), layout.last(hs), layout.last(cs))
        return (*outputs, layout.outputs(cs)) if cells else outputs

    @staticmethod
    @without_autocast
    def backward(
        ctx: Any,
        dy_TBH: Tensor | None,
        dh_BH: Tensor | None,
        dc_BH: Tensor | None,
        dcells_TBH: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        (
            mask_x,
            mask_h,
            mask_c,
            lengths,
            w_ih,
            w_hh,
            hs,
            kept_KTBH,
            cs,
            g_TBH,
            tanh_c_TBH,
            memory,
            *inputs_ND,
        ) = saved[7:]
        if needs_reference(grad_outputs := (dy_TBH, dh_BH, dc_BH, dcells_TBH)):
            options = {
                "masks": Masks(mask_x, mask_h, mask_c),
                "compute_dtype": ctx.compute_dtype,
                "cells": ctx.cells,
            }
            gradients = cell_gradients(
                reference.lstm, saved[:7], ctx.needs_input_grad[:7], grad_outputs, lengths, **options
            )
            return *gradients, *[None] * 6
        gates, every, layout = Gates(memory, 4), slice(0, 4), ctx.layout
        da = gates.another()
        low = da if w_hh.dtype == memory.dtype else gates.another(w_hh.dtype)
        c_before_TBH, c_slope_TBH = layout.before(cs), torch.empty_like(tanh_c_TBH)
        way_back = RecurrenceGradient(da, low, every, layout, w_hh, mask_h)
        masks_c = layout.masks(mask_c)
        dys, dcells = (d if d is None else layout.each(layout.pack(d)) for d in (dy_TBH, dcells_TBH))
        i_f_g, o, c_slope, f = (
            layout.each(da.view_GTBH[:3], 1),
            *(layout.each(v) for v in (da.view_GTBH[3], c_slope_TBH, gates.view_GTBH[1])),
        )
        dh_end, dc_end = (layout.end_gradient(d, cs) for d in (dh_BH, dc_BH))
        dh, dc = dh_end[:0], dc_end[:0]
        for steps in reversed(layout.blocks(SLOPES_AT_ONCE // gates.hidden)):
            # What does not depend on the gradient is worked out for many steps at once: d a_gate = slope ∘
            # (dc or dh).
            part = layout.part(steps)
            g, tanh_c = g_TBH[part], tanh_c_TBH[part]
            (y_i, y_f, _, y_o), (slope_i, slope_f, slope_g, slope_o) = (
                gates.view_GTBH[:, part],
                da.view_GTBH[:, part],
            )
            through_sigmoid(g, y_i, out=slope_i)
            through_sigmoid(c_before_TBH[part], y_f, out=slope_f)
            through_tanh(y_i, g, out=slope_g)
            through_sigmoid(tanh_c, y_o, out=slope_o)
            through_tanh(y_o, tanh_c, out=c_slope_TBH[part])
            for t in reversed(steps):
                dh, dc = layout.go_back(t, dh, dh_end), layout.go_back(t, dc, dc_end)
                if dys is not None:
                    dh.add_(dys[t])
                o[t].mul_(dh)
                dc.addcmul_(dh, c_slope[t])
                if dcells is not None:
                    dc.add_(dcells[t])
                if masks_c is not None:
                    dc.mul_(masks_c[t])
                i_f_g[t].mul_(dc)
                dc.mul_(f[t])
                dh = way_back.step(t)
        dh, dc = layout.go_back(-1, dh, dh_end), layout.go_back(-1, dc, dc_end)
        db = sum_over_steps(da)
        dw_ih, dw_hh = (torch.empty_like(w, dtype=memory.dtype) for w in (w_ih, w_hh))
        weight_gradient(low, every, inputs_ND, dw_ih)
        hs_before = hs if hs is None else layout.before(hs)
        weight_gradient(low, every, entered(kept_KTBH, hs_before, len(gates.groups(every))), dw_hh)
        dx_TBD = None
        if ctx.needs_input_grad[0]:
            dx_TBD = layout.unpack(input_gradient(low, w_ih, layout.mask_of_all(mask_x), memory.dtype))
        return dx_TBD, layout.unsort(dh), layout.unsort(dc), dw_ih, dw_hh, db, db.clone(), *[None] * 6


class GRU(torch.autograd.Function):
    @staticmethod
    @without_autocast
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
        hidden, layout = w_hh.shape[1], Layout.of(x_TBD, lengths)
        inputs = (x_TBD, h_BH, w_ih, w_hh, b_ih, b_hh)
        r_and_z, only_n = slice(0, 2), slice(2, 3)
        w_ih, w_hh = w_ih.to(compute_dtype), w_hh.to(compute_dtype)
        x_TBD = layout.pack(x_TBD)
        gates = Gates.of(x_TBD, hidden, 3, Masks(mask_x, mask_h))
        inputs_ND = project_inputs(
            gates, x_TBD, w_ih, b_ih if reset_after else b_ih + b_hh, layout.mask_of_all(mask_x)
        )
        if reset_after:
            gates.view_GTBH[r_and_z].add_(b_hh.view(3, 1, 1, -1)[r_and_z])
        h = layout.sort(h_BH)
        hs = layout.states(h)
        recurrence = Recurrence(gates, r_and_z, layout, w_hh, mask_h, hs)
        # The candidate's own recurrent product: of m ∘ h, or where the reset gate comes first, of r ∘ m ∘ h.
        masks_n = layout.masks(some_gates(mask_h, only_n))
        w_n = Weights(w_hh[2 * hidden :], layout.most)
        n_inputs_TBH = torch.empty_like(layout.after(hs), dtype=compute_dtype)
        inner_TBH = torch.empty_like(layout.after(hs)) if reset_after else None  # U_n (m ∘ h) + b
        inners = inner_TBH if inner_TBH is None else layout.each(inner_TBH)
        by_step = (layout.each(v) for v in (*gates.view_GTBH, n_inputs_TBH, layout.after(hs)))
        for t, (r_z, r, z, n, n_input, h_new) in enumerate(
            zip(layout.each(gates.view_GTBH[r_and_z], 1), *by_step, strict=True)
        ):
            h = layout.go_on(t, h)
            recurrence.add(t, h)
            r_z.sigmoid_()
            masked_h = h if masks_n is None else h * masks_n[t][0]
            if inners is not None:
                n_input.copy_(masked_h)
                inner = torch.add(w_n.product(n_input), b_hh[2 * hidden :], out=inners[t])
                n.addcmul_(r, inner)
            else:
                torch.mul(r, masked_h, out=n_input)
                w_n.add_product(n, n_input)
            n.tanh_()
            h = torch.lerp(n, h, z, out=h_new)
        ctx.layout, ctx.options = layout, {"reset_after": reset_after, "compute_dtype": compute_dtype}
        ctx.set_materialize_grads(False)
        saved = (
            mask_x,
            mask_h,
            lengths,
            w_ih,
            w_hh,
            hs,
            recurrence.kept_KTBH,
            n_inputs_TBH,
            inner_TBH,
            gates.memory,
        )
        ctx.save_for_backward(*inputs, *saved, *inputs_ND)
        return layout.outputs(hs), layout.last(hs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy_TBH: Tensor | None, dh_BH: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        mask_x, mask_h, lengths, w_ih, w_hh, hs, kept_KTBH, n_inputs_TBH, inner_TBH, memory, *inputs_ND = (
            saved[6:]
        )
        if needs_reference(grad_outputs := (dy_TBH, dh_BH)):
            options = {"masks": Masks(mask_x, mask_h), **ctx.options}
            gradients = cell_gradients(
                reference.gru, saved[:6], ctx.needs_input_grad[:6], grad_outputs, lengths, **options
            )
            return *gradients, None, None, None, None, None
        gates, layout = Gates(memory, 3), ctx.layout
        r_and_z, only_n, every = slice(0, 2), slice(2, 3), slice(0, 3)
        da = gates.another()
        low = da if w_hh.dtype == memory.dtype else gates.another(w_hh.dtype)
        before_TBH = layout.before(hs)
        way_back = RecurrenceGradient(da, low, r_and_z, layout, w_hh, mask_h)
        masks_n, dys = (
            layout.masks(some_gates(mask_h, only_n)),
            dy_TBH if dy_TBH is None else layout.each(layout.pack(dy_TBH)),
        )
        w_n = Weights(w_hh[2 * gates.hidden :].T, layout.most)
        d_inner_TBH = torch.empty_like(inner_TBH) if inner_TBH is not None else None
        inners, d_inners = (v if v is None else layout.each(v) for v in (inner_TBH, d_inner_TBH))
        # What the candidate's recurrent product gives back to its inputs; its gates' gradients, in the type
        # multiplied in.
        d_product_TBH = torch.empty_like(n_inputs_TBH)
        by_step = (layout.each(v) for v in (*gates.view_GTBH[:2], *da.view_GTBH, d_product_TBH, before_TBH))
        step_views = list(zip(*by_step, strict=True))
        dh_end = layout.end_gradient(dh_BH, hs)
        dh = dh_end[:0]
        for steps in reversed(layout.blocks(SLOPES_AT_ONCE // gates.hidden)):
            part = layout.part(steps)
            (y_r, y_z, y_n), (of_r, of_z, of_n) = gates.view_GTBH[:, part], da.view_GTBH[:, part]
            torch.mul(y_r, 1 - y_r, out=of_r)
            through_sigmoid(before_TBH[part] - y_n, y_z, out=of_z)
            through_tanh(1 - y_z, y_n, out=of_n)
            for t in reversed(steps):
                r, z, slope_r, slope_z, slope_n, d_product, h_before = step_views[t]
                dh = layout.go_back(t, dh, dh_end)
                if dys is not None:
                    dh.add_(dys[t])
                slope_z.mul_(dh)
                slope_n.mul_(dh)
                dh.mul_(z)
                if inners is not None and d_inners is not None:
                    slope_r.mul_(slope_n * inners[t])
                    d_product.copy_(torch.mul(slope_n, r, out=d_inners[t]))
                else:
                    d_product.copy_(slope_n)
                through = w_n.product(d_product).to(dh.dtype)
                if masks_n is not None:
                    through = through * masks_n[t][0]
                if d_inners is None:
                    slope_r.mul_(through * h_before)
                    through = through * r
                dh.add_(through).add_(way_back.step(t))
        dh = layout.go_back(-1, dh, dh_end)
        db_ih = sum_over_steps(da)
        db_hh = (
            db_ih.clone()
            if d_inner_TBH is None
            else torch.cat([db_ih[: 2 * gates.hidden], d_inner_TBH.sum((0, 1))])
        )
        if low is not da:
            low.view_GTBH[2].copy_(da.view_GTBH[2])
        dw_ih, dw_hh = (torch.empty_like(w, dtype=memory.dtype) for w in (w_ih, w_hh))
        weight_gradient(low, every, inputs_ND, dw_ih)
        weight_gradient(low, r_and_z, entered(kept_KTBH, before_TBH, len(gates.groups(r_and_z))), dw_hh)
        mm_into(dw_hh[2 * gates.hidden :], d_product_TBH.flatten(0, 1).T, n_inputs_TBH.flatten(0, 1))
        dx_TBD = None
        if ctx.needs_input_grad[0]:
            dx_TBD = layout.unpack(input_gradient(low, w_ih, layout.mask_of_all(mask_x), memory.dtype))
        return dx_TBD, layout.unsort(dh), dw_ih, dw_hh, db_ih, db_hh, None, None, None, None, None


HeadGradients = Callable[..., tuple[Tensor, list[Tensor]]]  # `loss_and_gradients`, or another back end's


def head_forward(ctx: Any, compute: HeadGradients, *inputs: Tensor, compute_dtype: torch.dtype) -> Tensor:
    nll_N, ctx.gradients = compute(*inputs, None, compute_dtype)
    ctx.save_for_backward(*inputs)
    ctx.compute_dtype = compute_dtype
    return nll_N


def head_backward(ctx: Any, compute: HeadGradients, dnll_N: Tensor) -> tuple[Tensor | None, ...]:
    x_ND, w_VD, b_V, targets_N = ctx.saved_tensors
    if needs_reference((dnll_N,)):

        def definition(x_ND: Tensor, w_VD: Tensor, b_V: Tensor) -> tuple[Tensor]:
            return (reference.linear_cross_entropy(x_ND, w_VD, b_V, targets_N),)

        return (
            *reference_gradients(definition, (x_ND, w_VD, b_V), ctx.needs_input_grad[:3], (dnll_N,)),
            None,
            None,
        )
    if ctx.gradients is not None and is_even(dnll_N):
        dx_ND, dw_VD, db_V = (gradient.mul_(dnll_N[0]) for gradient in ctx.gradients)
        ctx.gradients = None
    else:
        _, (dx_ND, dw_VD, db_V) = compute(x_ND, w_VD, b_V, targets_N, dnll_N, ctx.compute_dtype)
    return dx_ND, dw_VD, db_V, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """Works through the logits chunk by chunk, and makes the gradients of a chunk while its logits are there.

    They are made for an upstream gradient of one a token. Any other that is the same for all tokens, as that
    of a sum or a mean, scales them in place; one that differs from token to token, or a second backward pass,
    has the chunks worked through once more.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor, compute_dtype: torch.dtype
    ) -> Tensor:
        return head_forward(ctx, loss_and_gradients, x_ND, w_VD, b_V, targets_N, compute_dtype=compute_dtype)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dnll_N: Tensor) -> tuple[Tensor | None, ...]:
        return head_backward(ctx, loss_and_gradients, dnll_N)


def is_even(dnll_N: Tensor) -> bool:
    """Whether the gradient is the same for all tokens; that of a sum tells so itself, without a wait for a
    GPU.
    """
    return dnll_N.stride(0) == 0 or bool((dnll_N == dnll_N[0]).all())


def chunks(rows: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]


def rows_at_once(logits_of: torch.device, vocabulary: int) -> tuple[int, int]:
    """Rows of a chunk of logits, and rows whose gradient is held in bf16. On a GPU no more than 1/64 of its
    memory is used.
    """
    if logits_of.type != "cuda":
        rows = max(1, LOGITS_AT_ONCE // vocabulary)
        return rows, ROUNDED_CHUNKS * rows
    memory = torch.cuda.get_device_properties(logits_of).total_memory
    rows = max(1, min(LOGITS_AT_ONCE_ON_GPU, memory // 64 // 4) // vocabulary)
    return rows, rows


def loss_and_probabilities(
    x_MD: Tensor, w_VD: Tensor, b_V: Tensor, targets_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each token, and the probabilities of all words, [M, V]."""
    logits_MV = (x_MD @ w_VD.T).add_(b_V)  # always fp32: rounding them to bf16 unsettles training
    return (
        by_logarithms(logits_MV, targets_M) if logits_MV.is_cuda else by_probabilities(logits_MV, targets_M)
    )


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
    parts = chunks(len(x_ND), rows_at_once(x_ND.device, len(b_V))[0])
    return torch.cat([loss_and_probabilities(x_ND[part], w_VD, b_V, targets_N[part])[0] for part in parts])


def loss_and_gradients(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    targets_N: Tensor,
    dnll_N: Tensor | None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """Negative log-likelihood of each token, and the gradients of x, w and b (`dnll_N` None: all ones)."""
    nll_N, dx_ND, dw_VD, db_V = (
        torch.empty_like(x_ND[:, 0]),
        torch.empty_like(x_ND),
        torch.empty_like(w_VD),
        torch.zeros_like(b_V),
    )
    w_low_VD, x_low_ND, rounds = w_VD.to(compute_dtype), x_ND.to(compute_dtype), compute_dtype != x_ND.dtype
    rows, rounded_rows = rows_at_once(x_ND.device, len(b_V))
    for block in chunks(len(x_ND), rounded_rows if rounds else rows):
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


# torch.compile takes each of these as one operation: tracing into it would lose what `create_graph=True` asks
# of the backward pass.
apply_lstm, apply_gru, apply_head = (
    torch.compiler.allow_in_graph(lambda *args, function=function: function.apply(*args))  # type: ignore[no-untyped-call]
    for function in (LSTM, GRU, LinearCrossEntropy)
)


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
    cells: bool = False,
) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = apply_lstm(
        x_TBD, h_BH, c_BH, w_ih, w_hh, b_ih, b_hh, *masks, lengths, compute_dtype or x_TBD.dtype, cells
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
    outputs: tuple[Tensor, Tensor] = apply_gru(
        x_TBD,
        h_BH,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        masks.x,
        masks.h,
        lengths,
        reset_after,
        compute_dtype or x_TBD.dtype,
    )
    return outputs


def linear_cross_entropy(
    x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor, compute_dtype: torch.dtype | None = None
) -> Tensor:
    with torch.autocast(x_ND.device.type, enabled=False):  # it would round the logits
        x_ND = x_ND.to(w_VD.dtype)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, w_VD, b_V))):
            return loss(x_ND, w_VD, b_V, targets_N)
        nll_N: Tensor = apply_head(x_ND, w_VD, b_V, targets_N, compute_dtype or x_ND.dtype)
        return nll_N
