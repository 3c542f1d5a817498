"""The back end in plain torch operations, forward and backward written by hand, for any device.

All input projections of a layer are one product before the loop over time, all weight gradients one product
after it; the inputs of the recurrent products are saved for it. Masks that differ from gate to gate make of
each product a batch of four (GRU: three) of a quarter the size, so they cost little more. Sequences of
different lengths are packed (`packing.py`): tensors named [T, B, …] then are [N, 1, …], and a step has the
sequences that are long enough.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)  N tokens  V vocabulary
K groups of gates: 1, or one for each gate
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vdrop_cli.kernels import halves, normed, reference
from vdrop_cli.kernels.alignment import pad_columns
from vdrop_cli.kernels.autograd import all_gradients, sigmoid_gradient, tanh_gradient, without_autocast
from vdrop_cli.kernels.derivatives import cell_gradients, needs_reference, reference_gradients
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
from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.packing import Layout, layout_for
from vdrop_cli.kernels.products import WeightMatrix, mm_into, operand
from vdrop_cli.kernels.weights import Weights

# Elements of a gate whose derivatives are computed together, just before their steps: they fit the cache.
DERIVATIVE_BLOCK = 2**18
LOGITS_AT_ONCE = 4_000_000  # elements of a chunk of logits in fp32: 16 MB
LOGITS_AT_ONCE_ON_GPU = 2**25  # 128 MB: all of a training step of the published sizes
MIN_ROWS_BY_HALVES = 128  # with fewer, most of the work would be to halve the weights
SMALLEST = 1e-30  # probability whose logarithm is still exact in fp32
# Chunks whose gradient is stored in bf16 together, so that its products are few and large; on a GPU one chunk
# is large enough.
ROUNDED_CHUNKS = 4


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
    """The backward pass of a recurrence: from the gradients `da` of the gates at a step to that of the state
    before it. `da_lowp` is `da` in the type of the products.
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
    hs: Tensor | None  # where the recurrent products have no other inputs
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
        ctx.layout = layout
        ctx.compute_dtype = compute_dtype
        ctx.cells = cells
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
        count = len(SavedLSTM._fields)
        saved, inputs_ND = SavedLSTM(*ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:])
        if needs_reference(grad_outputs := (dy_TBH, dh_BH, dc_BH, dcells_TBH)):
            gradients = cell_gradients(
                reference.lstm,
                2,
                saved.inputs,
                ctx.needs_input_grad[: len(saved.inputs)],
                grad_outputs,
                saved.lengths,
                masks=Masks(saved.mask_x, saved.mask_h, saved.mask_c),
                compute_dtype=ctx.compute_dtype,
                cells=ctx.cells,
            )
            return all_gradients(ctx, *gradients)
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
        count = len(SavedGRU._fields)
        saved, inputs_ND = SavedGRU(*ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:])
        if needs_reference(grad_outputs := (dy_TBH, dh_BH)):
            gradients = cell_gradients(
                reference.gru,
                1,
                saved.inputs,
                ctx.needs_input_grad[: len(saved.inputs)],
                grad_outputs,
                saved.lengths,
                masks=Masks(saved.mask_x, saved.mask_h),
                **ctx.options,
            )
            return all_gradients(ctx, *gradients)
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


HeadGradients = Callable[..., tuple[Tensor, list[Tensor]]]  # `loss_and_gradients` of a back end


def head_forward(ctx: Any, compute: HeadGradients, *inputs: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """The losses; their gradients are computed with them and saved."""
    nll_N, ctx.gradients = compute(*inputs, None, compute_dtype)
    ctx.save_for_backward(*inputs)
    ctx.compute_dtype = compute_dtype
    return nll_N


def head_backward(ctx: Any, compute: HeadGradients, dnll_N: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, w and b: the saved ones, scaled, or new ones."""
    x_ND, w_VD, b_V, targets_N = ctx.saved_tensors
    if needs_reference((dnll_N,)):

        def definition(x_ND: Tensor, w_VD: Tensor, b_V: Tensor) -> tuple[Tensor]:
            return (reference.linear_cross_entropy(x_ND, w_VD, b_V, targets_N),)

        inputs, is_needed = (x_ND, w_VD, b_V), ctx.needs_input_grad[:3]
        return *reference_gradients(definition, inputs, is_needed, (dnll_N,)), None, None
    if ctx.gradients is not None and is_uniform(dnll_N):
        dx_ND, dw_VD, db_V = (gradient.mul_(dnll_N[0]) for gradient in ctx.gradients)
        ctx.gradients = None
    else:
        _, (dx_ND, dw_VD, db_V) = compute(x_ND, w_VD, b_V, targets_N, dnll_N, ctx.compute_dtype)
    return dx_ND, dw_VD, db_V, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """Computes the logits in chunks, and the gradients of a chunk while its logits are in memory.

    The gradients are those for an upstream gradient of 1. One that is the same for all tokens, as that of a
    sum or a mean, scales them in place. One that differs between tokens, or a second backward pass, computes
    the chunks again.
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


def head_logits(x_MD: Tensor, w_VD: Tensor, b_V: Tensor) -> Tensor:
    return (x_MD @ w_VD.T).add_(b_V)  # always fp32: rounding them to bf16 unsettles training


def logits_by(w_VD: Tensor, b_V: Tensor, rows: int, compute_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Computes logits as exactly as in fp32 from chunks of so many rows in all: where products are in bf16,
    on a GPU by three of them.
    """
    if not (compute_dtype == torch.bfloat16 and rows >= MIN_ROWS_BY_HALVES and has_halves(w_VD)):
        return lambda x_MD: head_logits(x_MD, w_VD, b_V)
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
        return torch.nn.functional.cross_entropy(logits_MV, targets_M, reduction="none")
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


# torch.compile takes each of these as one operation: a trace of the backward pass would lose the second
# derivatives of `create_graph=True`.
apply_lstm, apply_gru, apply_head = (
    torch.compiler.allow_in_graph(lambda *args, function=function: function.apply(*args))  # type: ignore[no-untyped-call]
    for function in (LSTM, GRU, LinearCrossEntropy)
)


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


def linear_cross_entropy(
    x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor, compute_dtype: torch.dtype | None = None
) -> Tensor:
    with torch.autocast(x_ND.device.type, enabled=False):  # it would round the logits
        x_ND = x_ND.to(w_VD.dtype)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, w_VD, b_V))):
            return loss(x_ND, w_VD, b_V, targets_N, compute_dtype or x_ND.dtype)
        nll_N: Tensor = apply_head(x_ND, w_VD, b_V, targets_N, compute_dtype or x_ND.dtype)
        return nll_N
