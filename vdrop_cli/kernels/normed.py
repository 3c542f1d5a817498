"""The cells with layer norm (Ba et al. 2016), forward and backward written by hand, for any device.

The input products of all steps are normalised before the loop over time, the recurrent ones in it. Sequences
of different lengths are packed (`packing.py`): tensors named [T, B, …] then are [N, 1, …], and a step has the
sequences that are long enough.

T time  B batch  N rows of all steps  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)
K groups of gates: 1, or one for each gate  X any size
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vdrop_cli.kernels import reference
from vdrop_cli.kernels.autograd import (
    all_gradients,
    as_one_operation,
    sigmoid_gradient,
    tanh_gradient,
    without_autocast,
)
from vdrop_cli.kernels.derivatives import gradients_by_definition, needs_reference
from vdrop_cli.kernels.gates import ONLY_N, R_AND_Z, differs_by_gate, select_gates
from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.packing import Layout, layout_for
from vdrop_cli.kernels.products import operand
from vdrop_cli.kernels.weights import Weights

EPS = 1e-5  # added to the variance, as torch's layer norm


class Normalised:
    """Layer norm of rows over their last dimension, with the moments for its backward pass."""

    def __init__(self, rows_NX: Tensor, gain_X: Tensor, bias_X: Tensor | None = None) -> None:
        self.rows_NX = rows_NX
        self.y_NX, self.mean_N, self.rstd_N = torch.native_layer_norm(
            rows_NX, gain_X.shape, gain_X, bias_X, EPS
        )

    @property
    def saved(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows_NX, self.mean_N, self.rstd_N


def norm_gradients(
    dy_NX: Tensor, saved: tuple[Tensor, ...], gain_X: Tensor, is_needed: list[bool]
) -> tuple[Tensor, ...]:
    """The gradients of the rows, the gain and the bias, where `is_needed`."""
    rows_NX, mean_N, rstd_N = saved
    gradients: tuple[Tensor, ...] = torch.ops.aten.native_layer_norm_backward(
        dy_NX, rows_NX, gain_X.shape, mean_N, rstd_N, gain_X, None, is_needed
    )
    return gradients


def norm_gradient(dy_NX: Tensor, saved: tuple[Tensor, ...], gain_X: Tensor) -> Tensor:
    """The gradient of the rows."""
    return norm_gradients(dy_NX, saved, gain_X, [True, False, False])[0]


def gain_gradient(dy_NX: Tensor, saved: tuple[Tensor, ...], gain_X: Tensor) -> Tensor:
    """The gradient of the gain, summed over all rows."""
    return norm_gradients(dy_NX, saved, gain_X, [False, True, False])[1]


def masked_groups(x_BX: Tensor, mask_KBX: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The inputs of the products of each group of gates, [K, B, X]."""
    return (x_BX[None] if mask_KBX is None else x_BX * mask_KBX).to(dtype)


def gate_products(x_KBX: Tensor, w_GHX: Tensor, like: Tensor) -> Tensor:
    """`W_g x` of all gates, [B, G·H]."""
    if len(x_KBX) == 1:
        return (operand(x_KBX[0]) @ operand(w_GHX.flatten(0, 1)).T).to(like.dtype)
    return torch.bmm(operand(x_KBX), operand(w_GHX).mT).transpose(0, 1).flatten(1).to(like.dtype)


def product_input_gradients(d_BGH: Tensor, w_GHX: Tensor, groups: int, like: Tensor) -> Tensor:
    """The gradients of the inputs of the products of each group, [K, B, X]."""
    if groups == 1:
        return (operand(d_BGH) @ operand(w_GHX.flatten(0, 1)))[None].to(like.dtype)
    return torch.bmm(
        operand(d_BGH).reshape(len(d_BGH), groups, d_BGH.shape[1] // groups).transpose(0, 1), operand(w_GHX)
    ).to(like.dtype)


def sum_groups(d_KBX: Tensor, mask_KBX: Tensor | None) -> Tensor:
    """The gradient of x from those of `m ∘ x` of each group."""
    return d_KBX.sum(0) if mask_KBX is None else (d_KBX * mask_KBX).sum(0)


def weight_gradient(d_NGH: Tensor, x_KNX: Tensor, like: Tensor) -> Tensor:
    """The gradient of weights, [G·H, X], from those of the gates and the inputs at all steps."""
    if len(x_KNX) == 1:
        return (operand(d_NGH).T @ operand(x_KNX[0])).to(like.dtype)
    d_GNH = d_NGH.reshape(len(d_NGH), len(x_KNX), d_NGH.shape[1] // len(x_KNX)).transpose(0, 1)
    return torch.bmm(operand(d_GNH).mT, operand(x_KNX)).flatten(0, 1).to(like.dtype)


def group_count(mask: Tensor | None, gates: int) -> int:
    return gates if differs_by_gate(mask) else 1


def inputs_by_group(x_TBX: Tensor, mask_TKBX: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The inputs of the products of each group at all steps, [K, N, X]."""
    x_TKBX = x_TBX[:, None] if mask_TKBX is None else x_TBX[:, None] * mask_TKBX
    return x_TKBX.transpose(0, 1).flatten(1, 2).to(dtype)


def sum_groups_over_steps(d_KNX: Tensor, mask_TKBX: Tensor | None, x_TBX: Tensor) -> Tensor:
    """The gradient of x, [T, B, X], from those of `m ∘ x` of all groups and steps."""
    d_TKBX = d_KNX.view(len(d_KNX), *x_TBX.shape).transpose(0, 1)
    return (d_TKBX if mask_TKBX is None else d_TKBX * mask_TKBX).sum(1)


def unbind_rows(layout: Layout, rows_NX: Tensor) -> list[Tensor]:
    """The rows of each step."""
    shape = (len(rows_NX), 1) if layout.is_packed else (layout.time, layout.batch)
    return layout.unbind_steps(rows_NX.view(*shape, *rows_NX.shape[1:]))


# Mean and reciprocal standard deviation of each row, [B, 1] each, of one layer norm or two.
Moments = tuple[Tensor, ...]


def store_moments(moments: Moments, *norms: Normalised) -> None:
    """Copies the moments of these layer norms to where the backward pass reads them."""
    computed = [value for norm in norms for value in (norm.mean_N, norm.rstd_N)]
    for moment, value in zip(moments, computed, strict=True):
        moment.copy_(value)


class Steps:
    """A step without its products, in torch's operations, which writes its results into its arguments.

    a [B, G·H]: the normalised input products, which become the gates  u [B, G·H]: the recurrent products
    rz [B, 2H]: gates r and z together
    """

    @staticmethod
    def lstm(
        a: Tensor,
        u: Tensor,
        gain: Tensor,
        gain_c: Tensor,
        bias_c: Tensor,
        mask: Tensor | None,
        c_before: Tensor,
        c: Tensor,
        h: Tensor,
        tanh_c: Tensor,
        moments: Moments,
    ) -> None:
        norm_u = Normalised(u, gain)
        i, f, g, o = a.add_(norm_u.y_NX).chunk(4, 1)
        g.tanh_()
        for gate in (i, f, o):
            gate.sigmoid_()
        torch.mul(f, c_before, out=c).addcmul_(i, g)
        if mask is not None:
            c.mul_(mask)
        norm_c = Normalised(c, gain_c, bias_c)
        torch.mul(o, torch.tanh(norm_c.y_NX, out=tanh_c), out=h)
        store_moments(moments, norm_u, norm_c)

    @staticmethod
    def lstm_backward(
        gates: Tensor,
        u: Tensor,
        gain: Tensor,
        gain_c: Tensor,
        mask: Tensor | None,
        c_before: Tensor,
        c: Tensor,
        tanh_c: Tensor,
        moments: Moments,
        dh: Tensor,
        dc: Tensor,
        dcell: Tensor | None,
        da: Tensor,
        du: Tensor,
        dn: Tensor,
    ) -> None:
        """Writes `da`, `du` and `dn`. Changes `dc` to the gradient of `c_before`."""
        (i, f, g, o), (di, df, dg, do) = gates.chunk(4, 1), da.chunk(4, 1)
        tanh_gradient(dh * o, tanh_c, out=dn)
        dc.add_(norm_gradient(dn, (c, *moments[2:]), gain_c))
        if dcell is not None:
            dc.add_(dcell)
        if mask is not None:
            dc.mul_(mask)
        for out, d, y in ((di, dc * g, i), (df, dc * c_before, f), (do, dh * tanh_c, o)):
            out.copy_(sigmoid_gradient(d, y, torch.empty_like(d)))
        dg.copy_(tanh_gradient(dc * i, g, torch.empty_like(dc)))
        dc.mul_(f)
        du.copy_(norm_gradient(da, (u, *moments[:2]), gain))

    @staticmethod
    def gru_gates(rz: Tensor, u: Tensor, gain: Tensor, moments: Moments) -> None:
        norm_u = Normalised(u, gain)
        rz.add_(norm_u.y_NX).sigmoid_()
        store_moments(moments, norm_u)

    @staticmethod
    def gru_candidate(
        n: Tensor,
        u: Tensor,
        gain: Tensor,
        bias: Tensor,
        rz: Tensor,
        h_before: Tensor,
        v: Tensor,
        h: Tensor,
        moments: Moments,
        reset_after: bool,
    ) -> None:
        """`v` is the normalised recurrent product of the candidate."""
        norm_u, (r, z) = Normalised(u, gain, bias), rz.chunk(2, 1)
        v.copy_(norm_u.y_NX)
        n.add_(r * v if reset_after else v).tanh_()
        torch.lerp(n, h_before, z, out=h)
        store_moments(moments, norm_u)

    @staticmethod
    def gru_candidate_backward(
        rz: Tensor,
        n: Tensor,
        v: Tensor,
        u: Tensor,
        gain: Tensor,
        moments: Moments,
        h_before: Tensor,
        dh: Tensor,
        da_n: Tensor,
        dv: Tensor,
        da_rz: Tensor,
        du: Tensor,
        reset_after: bool,
    ) -> None:
        """Changes `dh` to the part of the gradient of `h_before` that comes through z. Writes the gradient of
        r only with `reset_after`; without it, `gru_gates_backward` does.
        """
        (r, z), (da_r, da_z) = rz.chunk(2, 1), da_rz.chunk(2, 1)
        tanh_gradient(dh * (1 - z), n, out=da_n)
        dv.copy_(da_n * r if reset_after else da_n)
        if reset_after:
            da_r.copy_(sigmoid_gradient(da_n * v, r, torch.empty_like(da_n)))
        da_z.copy_(sigmoid_gradient(dh * (h_before - n), z, torch.empty_like(dh)))
        dh.mul_(z)
        du.copy_(norm_gradient(dv, (u, *moments), gain))

    @staticmethod
    def gru_gates_backward(
        rz: Tensor,
        u: Tensor,
        gain: Tensor,
        moments: Moments,
        h_before: Tensor,
        d_input: Tensor,
        dh: Tensor,
        da_rz: Tensor,
        du: Tensor,
        reset_after: bool,
    ) -> None:
        """Adds the gradient of `h_before` through the candidate's product to `dh`. `d_input` is the gradient
        of the input of that product without its mask: of h with `reset_after`, otherwise of r ∘ h.
        """
        r, da_r = rz.chunk(2, 1)[0], da_rz.chunk(2, 1)[0]
        if reset_after:
            dh.add_(d_input)
        else:
            dh.addcmul_(d_input, r)
            da_r.copy_(sigmoid_gradient(d_input * h_before, r, torch.empty_like(dh)))
        du.copy_(norm_gradient(da_rz, (u, *moments), gain))


def steps_for(backend: str) -> type[Steps]:
    """The steps of the back end `native` or `fused`."""
    if backend == "fused":
        return Steps
    from vdrop_cli.kernels.normed_native import NativeSteps

    return NativeSteps


class SavedLSTM(NamedTuple):
    """What the backward pass of `NormedLSTM` reads."""

    x_TBD: Tensor
    h_BH: Tensor
    c_BH: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor
    b_hh: Tensor
    gain_ih: Tensor
    gain_hh: Tensor
    gain_c: Tensor
    bias_c: Tensor
    mask_x: Tensor | None
    mask_h: Tensor | None
    mask_c: Tensor | None
    lengths: Tensor | None
    products_NGH: Tensor  # those of the input, with the moments of their layer norm
    mean_x: Tensor
    rstd_x: Tensor
    u_NGH: Tensor  # the recurrent products
    mean_u: Tensor
    rstd_u: Tensor
    mean_c: Tensor
    rstd_c: Tensor
    gates_NGH: Tensor
    tanh_NH: Tensor  # of the normalised cell states
    hs: Tensor
    cs: Tensor
    x_KND: Tensor  # the masked inputs of each group of gates

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments that may need a gradient."""
        return self[:11]


class NormedLSTM(torch.autograd.Function):
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
        gain_ih: Tensor,
        gain_hh: Tensor,
        gain_c: Tensor,
        bias_c: Tensor,
        mask_x: Tensor | None,
        mask_h: Tensor | None,
        mask_c: Tensor | None,
        lengths: Tensor | None,
        compute_dtype: torch.dtype,
        cells: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        inputs = (x_TBD, h_BH, c_BH, w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh, gain_c, bias_c)
        arguments = (*inputs, mask_x, mask_h, mask_c, lengths)
        steps = steps_for(backend)
        layout, hidden = layout_for(x_TBD, lengths), len(gain_c)
        x_TBD = layout.pack(x_TBD)
        w_GHD, u_GHH = (w.to(compute_dtype).reshape(4, hidden, -1) for w in (w_ih, w_hh))
        u_GHH = operand(u_GHH)  # once for all steps
        x_KND = inputs_by_group(x_TBD, layout.pack_mask(mask_x), compute_dtype)
        norm_x = Normalised(gate_products(x_KND, w_GHD, h_BH), gain_ih, b_ih + b_hh)
        gates_NGH = norm_x.y_NX
        u_NGH, tanh_NH = torch.empty_like(gates_NGH), h_BH.new_empty(len(gates_NGH), hidden)
        mean_u, rstd_u, mean_c, rstd_c = (h_BH.new_empty(len(gates_NGH), 1) for _ in range(4))
        h, c = layout.sort(h_BH), layout.sort(c_BH)
        hs, cs = layout.allocate_states(h), layout.allocate_states(c)
        masks_h, masks_c = layout.masks_by_step(mask_h), layout.masks_by_step(mask_c)
        by_step = [
            unbind_rows(layout, rows) for rows in (gates_NGH, u_NGH, tanh_NH, mean_u, rstd_u, mean_c, rstd_c)
        ]
        after = (layout.unbind_steps(layout.states_after(states)) for states in (hs, cs))
        for t, (a, u, tanh_c, mu, ru, mc, rc, h_new, c_new) in enumerate(zip(*by_step, *after, strict=True)):
            h, c = layout.active_rows(t, h), layout.active_rows(t, c)
            h_KBH = masked_groups(h, None if masks_h is None else masks_h[t], compute_dtype)
            u.copy_(gate_products(h_KBH, u_GHH, h))
            mask = None if masks_c is None else masks_c[t]
            steps.lstm(a, u, gain_hh, gain_c, bias_c, mask, c, c_new, h_new, tanh_c, (mu, ru, mc, rc))
            h, c = h_new, c_new
        ctx.options = {"cells": cells, "compute_dtype": compute_dtype}
        ctx.layout, ctx.steps = layout, steps
        ctx.set_materialize_grads(False)
        moments = (mean_u, rstd_u, mean_c, rstd_c)
        ctx.save_for_backward(
            *SavedLSTM(*arguments, *norm_x.saved, u_NGH, *moments, gates_NGH, tanh_NH, hs, cs, x_KND)
        )
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
        saved = SavedLSTM(*ctx.saved_tensors)
        if needs_reference(upstream := (dy_TBH, dh_BH, dc_BH, dcells_TBH)):
            masks = Masks(saved.mask_x, saved.mask_h, saved.mask_c)
            return gradients_by_definition(
                ctx, reference.lstm, 2, saved, upstream, masks=masks, **ctx.options
            )
        w_ih, w_hh, mask_h, hs, cs = saved.w_ih, saved.w_hh, saved.mask_h, saved.hs, saved.cs
        gain_ih, gain_hh, gain_c = saved.gain_ih, saved.gain_hh, saved.gain_c
        gates_NGH, tanh_NH, u_NGH = saved.gates_NGH, saved.tanh_NH, saved.u_NGH
        moments_u, moments_c = (saved.mean_u, saved.rstd_u), (saved.mean_c, saved.rstd_c)
        norm_x = (saved.products_NGH, saved.mean_x, saved.rstd_x)
        layout, dtype, hidden = ctx.layout, ctx.options["compute_dtype"], len(gain_c)
        w_GHD, u_GHH = (w.to(dtype).reshape(4, hidden, -1) for w in (w_ih, w_hh))
        u_GHH = operand(u_GHH)  # once for all steps
        da_NGH, du_NGH = torch.empty_like(gates_NGH), torch.empty_like(gates_NGH)
        dn_NH = torch.empty_like(tanh_NH)
        dys, dcells = (d if d is None else layout.unbind_steps(layout.pack(d)) for d in (dy_TBH, dcells_TBH))
        masks_h = layout.masks_by_step(mask_h)
        masks_c = layout.masks_by_step(saved.mask_c)
        groups = group_count(mask_h, 4)
        all_rows = (gates_NGH, tanh_NH, u_NGH, *moments_u, *moments_c, da_NGH, du_NGH, dn_NH)
        by_step = list(zip(*(unbind_rows(layout, rows) for rows in all_rows), strict=True))
        before = layout.unbind_steps(layout.states_before(cs))
        after = layout.unbind_steps(layout.states_after(cs))
        dh_last, dc_last = (layout.last_gradient(d, cs) for d in (dh_BH, dc_BH))
        dh, dc = dh_last[:0], dc_last[:0]
        for t in reversed(range(layout.time)):
            gates, tanh_c, u, mu, ru, mc, rc, da, du, dn = by_step[t]
            dh, dc = layout.grow_gradient(t, dh, dh_last), layout.grow_gradient(t, dc, dc_last)
            if dys is not None:
                dh.add_(dys[t])
            mask, dcell = (None if steps is None else steps[t] for steps in (masks_c, dcells))
            saved_step = (gates, u, gain_hh, gain_c, mask, before[t], after[t], tanh_c, (mu, ru, mc, rc))
            ctx.steps.lstm_backward(*saved_step, dh, dc, dcell, da, du, dn)
            grad_h_KBH = product_input_gradients(du.to(dtype), u_GHH, groups, dh)
            dh = sum_groups(grad_h_KBH, None if masks_h is None else masks_h[t])
        dh, dc = layout.grow_gradient(-1, dh, dh_last), layout.grow_gradient(-1, dc, dc_last)
        dx_NGH, db = norm_gradient(da_NGH, norm_x, gain_ih), da_NGH.sum(0)
        h_KNH = inputs_by_group(layout.states_before(hs), layout.pack_mask(mask_h), dtype)
        dw_ih = weight_gradient(dx_NGH.to(dtype), saved.x_KND, w_ih)
        dw_hh = weight_gradient(du_NGH.to(dtype), h_KNH, w_hh)
        d_gains = [
            gain_gradient(da_NGH, norm_x, gain_ih),
            gain_gradient(da_NGH, (u_NGH, *moments_u), gain_hh),
            gain_gradient(dn_NH, (layout.states_after(cs).flatten(0, 1), *moments_c), gain_c),
            dn_NH.sum(0),
        ]
        dx_TBD = layer_input_gradient(ctx, dx_NGH, w_GHD, saved.mask_x, saved.x_TBD)
        states = (layout.unsort(dh), layout.unsort(dc))
        return all_gradients(ctx, dx_TBD, *states, dw_ih, dw_hh, db, db.clone(), *d_gains)


def layer_input_gradient(
    ctx: Any, d_NGH: Tensor, w_GHD: Tensor, mask_x: Tensor | None, x_TBD: Tensor
) -> Tensor | None:
    """The gradient of the layer's input, where it is needed."""
    if not ctx.needs_input_grad[0]:
        return None
    layout = ctx.layout
    mask = layout.pack_mask(mask_x)
    d_KND = product_input_gradients(d_NGH.to(w_GHD.dtype), w_GHD, group_count(mask_x, len(w_GHD)), x_TBD)
    gradient: Tensor = layout.unpack(sum_groups_over_steps(d_KND, mask, layout.pack(x_TBD)))
    return gradient


class SavedGRU(NamedTuple):
    """What the backward pass of `NormedGRU` reads."""

    x_TBD: Tensor
    h_BH: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor
    b_hh: Tensor
    gain_ih: Tensor
    gain_hh: Tensor
    mask_x: Tensor | None
    mask_h: Tensor | None
    lengths: Tensor | None
    products_rz: Tensor  # those of the input, with the moments of their layer norms
    mean_x_rz: Tensor
    rstd_x_rz: Tensor
    products_n: Tensor
    mean_x_n: Tensor
    rstd_x_n: Tensor
    rz_N: Tensor  # the gates
    n_N: Tensor
    u_rz_N: Tensor  # the recurrent products
    u_n_N: Tensor
    v_N: Tensor  # the candidate's, normalised
    inputs_n: Tensor  # of the candidate's recurrent product
    mean_rz: Tensor
    rstd_rz: Tensor
    mean_n: Tensor
    rstd_n: Tensor
    hs: Tensor
    x_KND: Tensor  # the masked inputs of each group of gates

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments that may need a gradient."""
        return self[:8]


class NormedGRU(torch.autograd.Function):
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
        gain_ih: Tensor,
        gain_hh: Tensor,
        mask_x: Tensor | None,
        mask_h: Tensor | None,
        lengths: Tensor | None,
        reset_after: bool,
        compute_dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        inputs = (x_TBD, h_BH, w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh)
        arguments = (*inputs, mask_x, mask_h, lengths)
        steps = steps_for(backend)
        layout, hidden = layout_for(x_TBD, lengths), h_BH.shape[1]
        two = 2 * hidden  # r and z
        x_TBD = layout.pack(x_TBD)
        w_GHD, u_GHH = (w.to(compute_dtype).reshape(3, hidden, -1) for w in (w_ih, w_hh))
        u_GHH = operand(u_GHH)  # once for all steps
        x_KND = inputs_by_group(x_TBD, layout.pack_mask(mask_x), compute_dtype)
        products_NGH = gate_products(x_KND, w_GHD, h_BH)
        norm_rz = Normalised(products_NGH[:, :two].contiguous(), gain_ih[:two], b_ih[:two] + b_hh[:two])
        norm_n = Normalised(products_NGH[:, two:].contiguous(), gain_ih[two:], b_ih[two:])
        rz_N, n_N = norm_rz.y_NX, norm_n.y_NX
        u_rz_N = torch.empty_like(rz_N)
        u_n_N = torch.empty_like(n_N)
        v_N = torch.empty_like(n_N)
        inputs_n = h_BH.new_empty(len(n_N), hidden, dtype=compute_dtype)
        mean_rz, rstd_rz, mean_n, rstd_n = (h_BH.new_empty(len(n_N), 1) for _ in range(4))
        h = layout.sort(h_BH)
        hs = layout.allocate_states(h)
        masks_rz, masks_n = (layout.masks_by_step(select_gates(mask_h, part)) for part in (R_AND_Z, ONLY_N))
        all_rows = (rz_N, n_N, u_rz_N, u_n_N, v_N, inputs_n, mean_rz, rstd_rz, mean_n, rstd_n)
        by_step = [unbind_rows(layout, rows) for rows in all_rows]
        for t, (rz, n, u_rz, u_n, v, n_input, m_rz, r_rz, m_n, r_n, h_new) in enumerate(
            zip(*by_step, layout.unbind_steps(layout.states_after(hs)), strict=True)
        ):
            h = layout.active_rows(t, h)
            h_KBH = masked_groups(h, None if masks_rz is None else masks_rz[t], compute_dtype)
            u_rz.copy_(gate_products(h_KBH, u_GHH[R_AND_Z], h))
            steps.gru_gates(rz, u_rz, gain_hh[:two], (m_rz, r_rz))
            masked_h = h if masks_n is None else h * masks_n[t][0]
            n_input.copy_(masked_h if reset_after else rz[:, :hidden] * masked_h)
            u_n.copy_(gate_products(n_input[None], u_GHH[ONLY_N], h))
            steps.gru_candidate(n, u_n, gain_hh[two:], b_hh[two:], rz, h, v, h_new, (m_n, r_n), reset_after)
            h = h_new
        ctx.options = {"reset_after": reset_after, "compute_dtype": compute_dtype}
        ctx.layout, ctx.steps = layout, steps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*SavedGRU(*arguments, *norm_rz.saved, *norm_n.saved, *all_rows, hs, x_KND))
        return layout.outputs(hs), layout.last_state(hs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy_TBH: Tensor | None, dh_BH: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = SavedGRU(*ctx.saved_tensors)
        if needs_reference(upstream := (dy_TBH, dh_BH)):
            return gradients_by_definition(
                ctx, reference.gru, 1, saved, upstream, masks=Masks(saved.mask_x, saved.mask_h), **ctx.options
            )
        w_ih, w_hh, mask_h, hs = saved.w_ih, saved.w_hh, saved.mask_h, saved.hs
        gain_ih, gain_hh = saved.gain_ih, saved.gain_hh
        norm_rz = (saved.products_rz, saved.mean_x_rz, saved.rstd_x_rz)
        norm_n = (saved.products_n, saved.mean_x_n, saved.rstd_x_n)
        rz_N, n_N, u_rz_N, u_n_N, v_N = saved.rz_N, saved.n_N, saved.u_rz_N, saved.u_n_N, saved.v_N
        moments_rz, moments_n = (saved.mean_rz, saved.rstd_rz), (saved.mean_n, saved.rstd_n)
        reset_after, dtype = ctx.options["reset_after"], ctx.options["compute_dtype"]
        layout, hidden = ctx.layout, n_N.shape[1]
        two = 2 * hidden
        w_GHD, u_GHH = (w.to(dtype).reshape(3, hidden, -1) for w in (w_ih, w_hh))
        u_GHH = operand(u_GHH)  # once for all steps
        da_rz_N = torch.empty_like(rz_N)
        da_n_N = torch.empty_like(n_N)
        dv_N = torch.empty_like(n_N)
        du_rz_N, du_n_N = torch.empty_like(rz_N), torch.empty_like(n_N)
        dys = None if dy_TBH is None else layout.unbind_steps(layout.pack(dy_TBH))
        masks_rz, masks_n = (layout.masks_by_step(select_gates(mask_h, part)) for part in (R_AND_Z, ONLY_N))
        groups = group_count(mask_h, 2)
        forward_rows = (rz_N, n_N, u_rz_N, u_n_N, v_N, *moments_rz, *moments_n)
        all_rows = (*forward_rows, da_rz_N, da_n_N, dv_N, du_rz_N, du_n_N)
        by_step = list(zip(*(unbind_rows(layout, tensor) for tensor in all_rows), strict=True))
        before, dh_last = layout.unbind_steps(layout.states_before(hs)), layout.last_gradient(dh_BH, hs)
        dh = dh_last[:0]
        for t in reversed(range(layout.time)):
            rz, n, u_rz, u_n, v, m_rz, r_rz, m_n, r_n, da_rz, da_n, dv, du_rz, du_n = by_step[t]
            dh, h = layout.grow_gradient(t, dh, dh_last), before[t]
            if dys is not None:
                dh.add_(dys[t])
            candidate = (rz, n, v, u_n, gain_hh[two:], (m_n, r_n), h)
            ctx.steps.gru_candidate_backward(*candidate, dh, da_n, dv, da_rz, du_n, reset_after)
            d_input = product_input_gradients(du_n.to(dtype), u_GHH[ONLY_N], 1, dh)[0]
            if masks_n is not None:
                d_input = d_input * masks_n[t][0]
            ctx.steps.gru_gates_backward(
                rz, u_rz, gain_hh[:two], (m_rz, r_rz), h, d_input, dh, da_rz, du_rz, reset_after
            )
            grad_h_KBH = product_input_gradients(du_rz.to(dtype), u_GHH[R_AND_Z], groups, dh)
            dh = dh + sum_groups(grad_h_KBH, None if masks_rz is None else masks_rz[t])
        dh = layout.grow_gradient(-1, dh, dh_last)
        dx_NGH = torch.cat(
            [norm_gradient(da_rz_N, norm_rz, gain_ih[:two]), norm_gradient(da_n_N, norm_n, gain_ih[two:])], 1
        )
        h_KNH = inputs_by_group(
            layout.states_before(hs), layout.pack_mask(select_gates(mask_h, R_AND_Z)), dtype
        )
        dw_ih = weight_gradient(dx_NGH.to(dtype), saved.x_KND, w_ih)
        dw_hh = torch.cat(
            [
                weight_gradient(du_rz_N.to(dtype), h_KNH, w_hh),
                weight_gradient(du_n_N.to(dtype), saved.inputs_n[None], w_hh),
            ]
        )
        d_gain_ih = torch.cat(
            [gain_gradient(da_rz_N, norm_rz, gain_ih[:two]), gain_gradient(da_n_N, norm_n, gain_ih[two:])]
        )
        d_gain_hh = torch.cat(
            [
                gain_gradient(da_rz_N, (u_rz_N, *moments_rz), gain_hh[:two]),
                gain_gradient(dv_N, (u_n_N, *moments_n), gain_hh[two:]),
            ]
        )
        db_rz = da_rz_N.sum(0)
        db_ih, db_hh = torch.cat([db_rz, da_n_N.sum(0)]), torch.cat([db_rz, dv_N.sum(0)])
        dx_TBD = layer_input_gradient(ctx, dx_NGH, w_GHD, saved.mask_x, saved.x_TBD)
        return all_gradients(ctx, dx_TBD, layout.unsort(dh), dw_ih, dw_hh, db_ih, db_hh, d_gain_ih, d_gain_hh)


apply_lstm, apply_gru = as_one_operation(NormedLSTM), as_one_operation(NormedGRU)


def contiguous_vectors(weights: Weights) -> list[Tensor]:
    """The weights, then biases, gains and biases of layer norm in contiguous memory, which compiled steps
    read.
    """
    assert weights.norms is not None
    vectors = (weights.b_ih, weights.b_hh, *weights.norms)
    return [weights.w_ih, weights.w_hh, *(vector.contiguous() for vector in vectors if vector is not None)]


def lstm(
    x_TBD: Tensor,
    h_BH: Tensor,
    c_BH: Tensor,
    weights: Weights,
    masks: Masks,
    lengths: Tensor | None,
    compute_dtype: torch.dtype,
    cells: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """As `Backend.lstm`, with the steps of the back end `fused` or `native`."""
    w_ih, w_hh, *vectors = contiguous_vectors(weights)
    states = (h_BH.contiguous(), c_BH.contiguous())
    outputs: tuple[Tensor, ...] = apply_lstm(
        x_TBD, *states, w_ih, w_hh, *vectors, *masks, lengths, compute_dtype, cells, backend
    )
    return outputs


def gru(
    x_TBD: Tensor,
    h_BH: Tensor,
    weights: Weights,
    masks: Masks,
    lengths: Tensor | None,
    reset_after: bool,
    compute_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `Backend.gru`, with the steps of the back end `fused` or `native`."""
    w_ih, w_hh, *vectors = contiguous_vectors(weights)
    arguments = (masks.x, masks.h, lengths, reset_after, compute_dtype, backend)
    outputs: tuple[Tensor, Tensor] = apply_gru(x_TBD, h_BH.contiguous(), w_ih, w_hh, *vectors, *arguments)
    return outputs
