"""The back end in plain torch operations, forward and backward written by hand, for any device.

All input projections of a layer are one product before the loop over time. Each weight gradient is one
product after the loop; the inputs of the recurrent products are saved for it. If masks differ by gate, each
product becomes a batch of four products of a quarter of the size (GRU: three of a third), which costs little
more. Sequences of different lengths are packed (`packing.py`): tensors named [T, B, …] then have the shape
[N, 1, …], and a step has only the sequences that are long enough.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)  N rows of all steps
K groups of gates: 1, or one for each gate
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vdrop_cli.kernels import normed, reference
from vdrop_cli.kernels.autograd import (
    all_gradients,
    as_one_operation,
    sigmoid_gradient,
    tanh_gradient,
    without_autocast,
)
from vdrop_cli.kernels.derivatives import gradients_by_definition, needs_reference
from vdrop_cli.kernels.gates import (
    ALL_GRU,
    ALL_LSTM,
    ONLY_N,
    R_AND_Z,
    Gates,
    input_gradient,
    project_inputs,
    select_gates,
    sum_over_steps,
    weight_gradient,
)
from vdrop_cli.kernels.head import linear_cross_entropy
from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.packing import Layout, layout_for
from vdrop_cli.kernels.products import WeightMatrix, mm_into
from vdrop_cli.kernels.weights import Weights

__all__ = ["gru", "linear_cross_entropy", "lstm"]

# Elements of a gate whose derivatives are computed together, just before their steps: they fit the cache.
DERIVATIVE_BLOCK = 2**18


class Recurrence:
    """Computes `U (m_h ∘ h)` of some gates, step after step, and saves the inputs of the products for the
    gradient of U, unless they are h itself.
    """

    def __init__(
        self, gates: Gates, part: slice, layout: Layout, w_hh: Tensor, mask_h: Tensor | None, like: Tensor
    ) -> None:
        self.by_gate, self.steps = gates.by_gate, gates.unbind_steps(part, layout)
        w_hh = w_hh[gates.rows(part)]
        self.w, self.groups = gates.weight_matrix(w_hh, layout.max_rows), len(gates.groups(part))
        mask_TKBH = select_gates(mask_h, part)
        if mask_TKBH is not None:
            mask_TKBH = mask_TKBH.expand(-1, self.groups, -1, -1)
        self.masks_KBH = layout.masks_by_step(mask_TKBH)
        self.saved_inputs_KTBH: Tensor | None = None
        if self.masks_KBH is not None or w_hh.dtype != like.dtype:
            shape = (self.groups, gates.time, gates.batch, gates.row_size)
            self.saved_inputs_KTBH = like.new_empty(shape, dtype=w_hh.dtype)
        saved = self.saved_inputs_KTBH
        self.inputs = None if saved is None else layout.unbind_steps(saved, 1)

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
    """The backward pass of `Recurrence`: computes the gradient of the state before a step from the gradients
    `da` of the gates at that step. `da_lowp` is `da` in the type of the products.
    """

    def __init__(
        self, da: Gates, da_lowp: Gates, part: slice, layout: Layout, w_hh: Tensor, mask_h: Tensor | None
    ) -> None:
        self.by_gate, self.dtype = da.by_gate, da.memory.dtype
        self.steps, self.lowp_steps = da.unbind_steps(part, layout), da_lowp.unbind_steps(part, layout)
        self.is_rounded = da.memory.dtype != da_lowp.memory.dtype
        self.w = da.weight_matrix(w_hh[da.rows(part)], layout.max_rows, transposed=True)
        self.masks_KBH = layout.masks_by_step(select_gates(mask_h, part))

    def step(self, t: int) -> Tensor:
        """The gradient of h_{t-1} through the products of step `t`."""
        step = self.lowp_steps[t].copy_(self.steps[t]) if self.is_rounded else self.steps[t]
        mask_KBH = None if self.masks_KBH is None else self.masks_KBH[t]
        grad_h = self.w.product(step)
        if self.by_gate:
            return (grad_h if mask_KBH is None else grad_h * mask_KBH).sum(0, dtype=self.dtype)
        return (grad_h if mask_KBH is None else grad_h * mask_KBH[0]).to(self.dtype)


def recurrent_inputs(
    saved_KTBH: Tensor | None, states_before_TBH: Tensor | None, groups: int
) -> list[Tensor]:
    """The inputs of the recurrent products of each group of gates at all steps, [T·B, H]: the saved ones, or
    the states before each step.
    """
    if saved_KTBH is not None:
        return list(saved_KTBH.flatten(1, 2))
    assert states_before_TBH is not None
    return [states_before_TBH.flatten(0, 1)] * groups


class SavedLSTM(NamedTuple):
    """What the backward pass of `LSTM` reads, besides the masked inputs of each group of gates."""

    x_TBD: Tensor
    h_BH: Tensor
    c_BH: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor
    b_hh: Tensor
    mask_x: Tensor | None
    mask_h: Tensor | None
    mask_c: Tensor | None
    lengths: Tensor | None
    w_ih_lowp: Tensor  # in the type of the products
    w_hh_lowp: Tensor
    hs: Tensor | None  # all hidden states; None if `recurrent_inputs_KTBH` has the inputs
    recurrent_inputs_KTBH: Tensor | None
    cs: Tensor
    g_TBH: Tensor  # tanh(a_g)
    tanh_c_TBH: Tensor
    gates: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments that may need a gradient."""
        return self[:7]


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
        hidden, layout = w_hh.shape[1], layout_for(x_TBD, lengths)
        arguments = (x_TBD, h_BH, c_BH, w_ih, w_hh, b_ih, b_hh, mask_x, mask_h, mask_c, lengths)
        w_ih, w_hh = w_ih.to(compute_dtype), w_hh.to(compute_dtype)
        x_TBD = layout.pack(x_TBD)
        gates = Gates.allocate(x_TBD, hidden, 4, Masks(mask_x, mask_h))
        inputs_ND = project_inputs(gates, x_TBD, w_ih, b_ih + b_hh, layout.pack_mask(mask_x))
        h, c = layout.sort(h_BH), layout.sort(c_BH)
        hs, cs = layout.allocate_states(h), layout.allocate_states(c)
        recurrence = Recurrence(gates, ALL_LSTM, layout, w_hh, mask_h, hs)
        h_after, c_after = layout.states_after(hs), layout.states_after(cs)
        g_TBH, tanh_c_TBH = torch.empty_like(h_after), torch.empty_like(c_after)
        masks_c = layout.masks_by_step(mask_c)
        tensors = (*gates.view_GTBR, g_TBH, tanh_c_TBH, h_after, c_after)
        by_step = (layout.unbind_steps(tensor) for tensor in tensors)
        for t, (all_gates, i, f, a_g, o, g, tanh_c, h_new, c_new) in enumerate(
            zip(layout.unbind_steps(gates.view_GTBR, 1), *by_step, strict=True)
        ):
            h, c = layout.active_rows(t, h), layout.active_rows(t, c)
            recurrence.add(t, h)
            torch.tanh(a_g, out=g)
            all_gates.sigmoid_()  # g is already computed; one call for all is faster than three
            torch.mul(f, c, out=c_new).addcmul_(i, g)
            if masks_c is not None:
                c_new.mul_(masks_c[t])
            torch.mul(o, torch.tanh(c_new, out=tanh_c), out=h_new)
            h, c = h_new, c_new
        ctx.layout, ctx.options = layout, {"cells": cells, "compute_dtype": compute_dtype}
        ctx.set_materialize_grads(False)
        recurrent_inputs_KTBH = recurrence.saved_inputs_KTBH
        saved = SavedLSTM(
            *arguments,
            w_ih_lowp=w_ih,
            w_hh_lowp=w_hh,
            hs=hs if recurrent_inputs_KTBH is None else None,
            recurrent_inputs_KTBH=recurrent_inputs_KTBH,
            cs=cs,
            g_TBH=g_TBH,
            tanh_c_TBH=tanh_c_TBH,
            gates=gates.memory,
        )
        ctx.save_for_backward(*saved, *inputs_ND)
        outputs = (layout.outputs(hs), layout.last_state(hs), layout.last_state(cs))
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
        tensors, count = ctx.saved_tensors, len(SavedLSTM._fields)  # read once: hooks may count
        saved, inputs_ND = SavedLSTM(*tensors[:count]), list(tensors[count:])
        if needs_reference(upstream := (dy_TBH, dh_BH, dc_BH, dcells_TBH)):
            masks = Masks(saved.mask_x, saved.mask_h, saved.mask_c)
            return gradients_by_definition(
                ctx, reference.lstm, 2, saved, upstream, masks=masks, **ctx.options
            )
        gates, layout = Gates(saved.gates, 4), ctx.layout
        w_ih, w_hh, cs = saved.w_ih_lowp, saved.w_hh_lowp, saved.cs
        dtype = saved.gates.dtype
        da = gates.empty_like()
        da_lowp = da if w_hh.dtype == dtype else gates.empty_like(w_hh.dtype)
        c_before_TBH, dc_dh_TBH = layout.states_before(cs), torch.empty_like(saved.tanh_c_TBH)
        recurrence_grad = RecurrenceGradient(da, da_lowp, ALL_LSTM, layout, w_hh, saved.mask_h)
        masks_c = layout.masks_by_step(saved.mask_c)
        dys, dcells = (d if d is None else layout.unbind_steps(layout.pack(d)) for d in (dy_TBH, dcells_TBH))
        da_i_f_g, da_o = layout.unbind_steps(da.view_GTBR[:3], 1), layout.unbind_steps(da.view_GTBR[3])
        dc_dh, f = layout.unbind_steps(dc_dh_TBH), layout.unbind_steps(gates.view_GTBR[1])
        dh_last, dc_last = (layout.last_gradient(d, cs) for d in (dh_BH, dc_BH))
        dh, dc = dh_last[:0], dc_last[:0]
        for steps in reversed(layout.blocks(DERIVATIVE_BLOCK // gates.row_size)):
            # The factors of dc and dh in the gradients of the gates, for many steps at once.
            part = layout.block_slice(steps)
            g, tanh_c = saved.g_TBH[part], saved.tanh_c_TBH[part]
            y_i, y_f, _, y_o = gates.view_GTBR[:, part]
            factor_i, factor_f, factor_g, factor_o = da.view_GTBR[:, part]
            sigmoid_gradient(g, y_i, out=factor_i)
            sigmoid_gradient(c_before_TBH[part], y_f, out=factor_f)
            tanh_gradient(y_i, g, out=factor_g)
            sigmoid_gradient(tanh_c, y_o, out=factor_o)
            tanh_gradient(y_o, tanh_c, out=dc_dh_TBH[part])
            for t in reversed(steps):
                dh, dc = layout.grow_gradient(t, dh, dh_last), layout.grow_gradient(t, dc, dc_last)
                if dys is not None:
                    dh.add_(dys[t])
                da_o[t].mul_(dh)
                dc.addcmul_(dh, dc_dh[t])
                if dcells is not None:
                    dc.add_(dcells[t])
                if masks_c is not None:
                    dc.mul_(masks_c[t])
                da_i_f_g[t].mul_(dc)
                dc.mul_(f[t])
                dh = recurrence_grad.step(t)
        dh, dc = layout.grow_gradient(-1, dh, dh_last), layout.grow_gradient(-1, dc, dc_last)
        db = sum_over_steps(da)
        dw_ih, dw_hh = (torch.empty_like(w, dtype=dtype) for w in (w_ih, w_hh))
        weight_gradient(da_lowp, ALL_LSTM, inputs_ND, dw_ih)
        hs_before = None if saved.hs is None else layout.states_before(saved.hs)
        groups = len(gates.groups(ALL_LSTM))
        recurrent_ND = recurrent_inputs(saved.recurrent_inputs_KTBH, hs_before, groups)
        weight_gradient(da_lowp, ALL_LSTM, recurrent_ND, dw_hh)
        dx_TBD = None
        if ctx.needs_input_grad[0]:
            dx_TBD = layout.unpack(input_gradient(da_lowp, w_ih, layout.pack_mask(saved.mask_x), dtype))
        states = (layout.unsort(dh), layout.unsort(dc))
        return all_gradients(ctx, dx_TBD, *states, dw_ih, dw_hh, db, db.clone())


class SavedGRU(NamedTuple):
    """What the backward pass of `GRU` reads, besides the masked inputs of each group of gates."""

    x_TBD: Tensor
    h_BH: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor
    b_hh: Tensor
    mask_x: Tensor | None
    mask_h: Tensor | None
    lengths: Tensor | None
    w_ih_lowp: Tensor  # in the type of the products
    w_hh_lowp: Tensor
    hs: Tensor
    recurrent_inputs_KTBH: Tensor | None  # of r and z
    n_inputs_TBH: Tensor  # of the candidate's recurrent product
    inner_TBH: Tensor | None  # with reset_after: that product plus bias
    gates: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments that may need a gradient."""
        return self[:6]


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
        hidden, layout = w_hh.shape[1], layout_for(x_TBD, lengths)
        arguments = (x_TBD, h_BH, w_ih, w_hh, b_ih, b_hh, mask_x, mask_h, lengths)
        w_ih, w_hh = w_ih.to(compute_dtype), w_hh.to(compute_dtype)
        x_TBD = layout.pack(x_TBD)
        gates = Gates.allocate(x_TBD, hidden, 3, Masks(mask_x, mask_h))
        bias = b_ih if reset_after else b_ih + b_hh
        inputs_ND = project_inputs(gates, x_TBD, w_ih, bias, layout.pack_mask(mask_x))
        if reset_after:
            gates.view_GTBR[R_AND_Z].add_(b_hh.view(3, 1, 1, -1)[R_AND_Z])
        h = layout.sort(h_BH)
        hs = layout.allocate_states(h)
        h_after = layout.states_after(hs)
        recurrence = Recurrence(gates, R_AND_Z, layout, w_hh, mask_h, hs)
        # The candidate has a recurrent product of its own: of m ∘ h with reset_after, otherwise of r ∘ m ∘ h.
        masks_n = layout.masks_by_step(select_gates(mask_h, ONLY_N))
        w_n = WeightMatrix(w_hh[2 * hidden :], layout.max_rows)
        n_inputs_TBH = torch.empty_like(h_after, dtype=compute_dtype)
        inner_TBH = torch.empty_like(h_after) if reset_after else None  # U_n (m ∘ h) + b
        inners = None if inner_TBH is None else layout.unbind_steps(inner_TBH)
        by_step = (layout.unbind_steps(v) for v in (*gates.view_GTBR, n_inputs_TBH, h_after))
        for t, (r_z, r, z, n, n_input, h_new) in enumerate(
            zip(layout.unbind_steps(gates.view_GTBR[R_AND_Z], 1), *by_step, strict=True)
        ):
            h = layout.active_rows(t, h)
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
        saved = SavedGRU(
            *arguments,
            w_ih_lowp=w_ih,
            w_hh_lowp=w_hh,
            hs=hs,
            recurrent_inputs_KTBH=recurrence.saved_inputs_KTBH,
            n_inputs_TBH=n_inputs_TBH,
            inner_TBH=inner_TBH,
            gates=gates.memory,
        )
        ctx.save_for_backward(*saved, *inputs_ND)
        return layout.outputs(hs), layout.last_state(hs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy_TBH: Tensor | None, dh_BH: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, count = ctx.saved_tensors, len(SavedGRU._fields)  # read once: hooks may count
        saved, inputs_ND = SavedGRU(*tensors[:count]), list(tensors[count:])
        if needs_reference(upstream := (dy_TBH, dh_BH)):
            return gradients_by_definition(
                ctx, reference.gru, 1, saved, upstream, masks=Masks(saved.mask_x, saved.mask_h), **ctx.options
            )
        gates, layout = Gates(saved.gates, 3), ctx.layout
        w_ih, w_hh, hs, mask_h = saved.w_ih_lowp, saved.w_hh_lowp, saved.hs, saved.mask_h
        n_inputs_TBH, inner_TBH, dtype = saved.n_inputs_TBH, saved.inner_TBH, saved.gates.dtype
        da = gates.empty_like()
        da_lowp = da if w_hh.dtype == dtype else gates.empty_like(w_hh.dtype)
        before_TBH = layout.states_before(hs)
        recurrence_grad = RecurrenceGradient(da, da_lowp, R_AND_Z, layout, w_hh, mask_h)
        masks_n = layout.masks_by_step(select_gates(mask_h, ONLY_N))
        dys = None if dy_TBH is None else layout.unbind_steps(layout.pack(dy_TBH))
        w_n = WeightMatrix(w_hh[gates.rows(ONLY_N)].T, layout.max_rows)
        d_inner_TBH = torch.empty_like(inner_TBH) if inner_TBH is not None else None
        inners, d_inners = (v if v is None else layout.unbind_steps(v) for v in (inner_TBH, d_inner_TBH))
        # The gradient of the candidate's recurrent product, in the type of the products.
        d_product_TBH = torch.empty_like(n_inputs_TBH)
        tensors = (*gates.view_GTBR[:2], *da.view_GTBR, d_product_TBH, before_TBH)
        by_step = list(zip(*(layout.unbind_steps(tensor) for tensor in tensors), strict=True))
        dh_last = layout.last_gradient(dh_BH, hs)
        dh = dh_last[:0]
        for steps in reversed(layout.blocks(DERIVATIVE_BLOCK // gates.row_size)):
            part = layout.block_slice(steps)
            y_r, y_z, y_n = gates.view_GTBR[:, part]
            factor_r, factor_z, factor_n = da.view_GTBR[:, part]
            torch.mul(y_r, 1 - y_r, out=factor_r)
            sigmoid_gradient(before_TBH[part] - y_n, y_z, out=factor_z)
            tanh_gradient(1 - y_z, y_n, out=factor_n)
            for t in reversed(steps):
                r, z, da_r, da_z, da_n, d_product, h_before = by_step[t]
                dh = layout.grow_gradient(t, dh, dh_last)
                if dys is not None:
                    dh.add_(dys[t])
                da_z.mul_(dh)
                da_n.mul_(dh)
                dh.mul_(z)
                if inners is not None and d_inners is not None:
                    da_r.mul_(da_n * inners[t])
                    d_product.copy_(torch.mul(da_n, r, out=d_inners[t]))
                else:
                    d_product.copy_(da_n)
                grad_h = w_n.product(d_product).to(dh.dtype)
                if masks_n is not None:
                    grad_h = grad_h * masks_n[t][0]
                if d_inners is None:
                    da_r.mul_(grad_h * h_before)
                    grad_h = grad_h * r
                dh.add_(grad_h).add_(recurrence_grad.step(t))
        dh = layout.grow_gradient(-1, dh, dh_last)
        db_ih = sum_over_steps(da)
        db_hh = db_ih.clone()
        if d_inner_TBH is not None:
            db_hh[gates.rows(ONLY_N)] = d_inner_TBH.sum((0, 1))
        if da_lowp is not da:
            da_lowp.view_GTBR[2].copy_(da.view_GTBR[2])
        dw_ih, dw_hh = (torch.empty_like(w, dtype=dtype) for w in (w_ih, w_hh))
        weight_gradient(da_lowp, ALL_GRU, inputs_ND, dw_ih)
        groups = len(gates.groups(R_AND_Z))
        recurrent_ND = recurrent_inputs(saved.recurrent_inputs_KTBH, before_TBH, groups)
        weight_gradient(da_lowp, R_AND_Z, recurrent_ND, dw_hh)
        mm_into(dw_hh[gates.rows(ONLY_N)], d_product_TBH.flatten(0, 1).T, n_inputs_TBH.flatten(0, 1))
        dx_TBD = None
        if ctx.needs_input_grad[0]:
            dx_TBD = layout.unpack(input_gradient(da_lowp, w_ih, layout.pack_mask(saved.mask_x), dtype))
        return all_gradients(ctx, dx_TBD, layout.unsort(dh), dw_ih, dw_hh, db_ih, db_hh)


apply_lstm, apply_gru = as_one_operation(LSTM), as_one_operation(GRU)


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
    dtype = compute_dtype or x_TBD.dtype
    if weights.norms is not None:
        return normed.lstm(x_TBD, h_BH, c_BH, weights, masks, lengths, dtype, cells, "fused")
    flat = (weights.w_ih, weights.w_hh, weights.b_ih, weights.b_hh, *masks)
    outputs: tuple[Tensor, ...] = apply_lstm(x_TBD, h_BH, c_BH, *flat, lengths, dtype, cells)
    return outputs


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
    dtype = compute_dtype or x_TBD.dtype
    if weights.norms is not None:
        return normed.gru(x_TBD, h_BH, weights, masks, lengths, reset_after, dtype, "fused")
    flat = (weights.w_ih, weights.w_hh, weights.b_ih, weights.b_hh, masks.x, masks.h)
    outputs: tuple[Tensor, Tensor] = apply_gru(x_TBD, h_BH, *flat, lengths, reset_after, dtype)
    return outputs
