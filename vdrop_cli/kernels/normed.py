"""The cells with layer norm (Ba et al. 2016), forward and backward written by hand, in torch's operations;
any device.

The input products of all steps are normalised before the loop over time, the recurrent ones in it. Sequences
of different lengths are packed (`layout.py`): [T, B, …] then is [N, 1, …], and a step is of those sequences
that have it.

T time  B batch  N rows: the steps of all sequences  D input size  H hidden size  G gates (LSTM i f g o; GRU r
z n) K groups of gates: 1, or each for itself  X any size
"""

from typing import Any

import torch
from torch import Tensor

from vdrop_cli.kernels import reference
from vdrop_cli.kernels.derivatives import cell_gradients, needs_reference
from vdrop_cli.kernels.fused import through_sigmoid, through_tanh, without_autocast
from vdrop_cli.kernels.gates import some_gates
from vdrop_cli.kernels.layout import Layout
from vdrop_cli.kernels.masks import Masks, Norms

EPS = 1e-5  # added to the variance, as torch's layer norm
R_AND_Z, ONLY_N = slice(0, 2), slice(2, 3)


class Normalised:
    """Layer norm of rows over their last dimension, with what its backward pass needs."""

    def __init__(self, rows_NX: Tensor, gain_X: Tensor, bias_X: Tensor | None = None) -> None:
        self.rows_NX = rows_NX
        self.y_NX, self.mean_N, self.rstd_N = torch.native_layer_norm(
            rows_NX, gain_X.shape, gain_X, bias_X, EPS
        )

    @property
    def saved(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows_NX, self.mean_N, self.rstd_N


def norm_gradients(
    dy_NX: Tensor, saved: tuple[Tensor, ...], gain_X: Tensor, needed: list[bool]
) -> tuple[Tensor, ...]:
    """Those of the rows, the gain and the bias, as far as they are needed."""
    rows_NX, mean_N, rstd_N = saved
    gradients: tuple[Tensor, ...] = torch.ops.aten.native_layer_norm_backward(
        dy_NX, rows_NX, gain_X.shape, mean_N, rstd_N, gain_X, None, needed
    )
    return gradients


def norm_gradient(dy_NX: Tensor, saved: tuple[Tensor, ...], gain_X: Tensor) -> Tensor:
    """That of the rows."""
    return norm_gradients(dy_NX, saved, gain_X, [True, False, False])[0]


def gain_gradient(dy_NX: Tensor, saved: tuple[Tensor, ...], gain_X: Tensor) -> Tensor:
    """That of the gain, summed over all rows."""
    return norm_gradients(dy_NX, saved, gain_X, [False, True, False])[1]


def masked_groups(x_BX: Tensor, mask_KBX: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What enters the products of each group of gates, [K, B, X]."""
    return (x_BX[None] if mask_KBX is None else x_BX * mask_KBX).to(dtype)


def gate_products(x_KBX: Tensor, w_GHX: Tensor, like: Tensor) -> Tensor:
    """`W_g x` of all gates, [B, G·H]."""
    if len(x_KBX) == 1:
        return (x_KBX[0] @ w_GHX.flatten(0, 1).T).to(like.dtype)
    return torch.bmm(x_KBX, w_GHX.mT).transpose(0, 1).flatten(1).to(like.dtype)


def input_gradients(d_BGH: Tensor, w_GHX: Tensor, groups: int, like: Tensor) -> Tensor:
    """Of what entered the products of each group, [K, B, X]."""
    if groups == 1:
        return (d_BGH @ w_GHX.flatten(0, 1))[None].to(like.dtype)
    return torch.bmm(d_BGH.view(len(d_BGH), groups, -1).transpose(0, 1), w_GHX).to(like.dtype)


def under_mask(d_KBX: Tensor, mask_KBX: Tensor | None) -> Tensor:
    return d_KBX.sum(0) if mask_KBX is None else (d_KBX * mask_KBX).sum(0)


def weight_gradient(d_NGH: Tensor, x_KNX: Tensor, like: Tensor) -> Tensor:
    """[G·H, X]"""
    if len(x_KNX) == 1:
        return (d_NGH.T @ x_KNX[0]).to(like.dtype)
    d_GNH = d_NGH.view(len(d_NGH), len(x_KNX), -1).transpose(0, 1)
    return torch.bmm(d_GNH.mT, x_KNX).flatten(0, 1).to(like.dtype)


def groups_of(mask: Tensor | None, gates: int) -> int:
    return gates if mask is not None and mask.shape[1] > 1 else 1


def entered_inputs(x_TBX: Tensor, mask_TKBX: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What enters the products of each group at all steps, [K, N, X]."""
    x_TKBX = x_TBX[:, None] if mask_TKBX is None else x_TBX[:, None] * mask_TKBX
    return x_TKBX.transpose(0, 1).flatten(1, 2).to(dtype)


def mask_gradient(d_KNX: Tensor, mask_TKBX: Tensor | None, x_TBX: Tensor) -> Tensor:
    """Of `x ∘ m` of all groups and steps to x, [T, B, X]."""
    d_TKBX = d_KNX.view(len(d_KNX), *x_TBX.shape).transpose(0, 1)
    return (d_TKBX if mask_TKBX is None else d_TKBX * mask_TKBX).sum(1)


def steps_of(layout: Layout, rows_NX: Tensor) -> list[Tensor]:
    """Rows of all steps, a step at a time."""
    shape = (len(rows_NX), 1) if layout.is_packed else (layout.time, layout.batch)
    return layout.each(rows_NX.view(*shape, *rows_NX.shape[1:]))


Moments = tuple[
    Tensor, ...
]  # mean and reciprocal standard deviation of each row, [B, 1] each, of one layer norm or two


class Steps:
    """A step without its products, in torch's operations; what is computed is written to the tensors that are
    given for it.

    a, u [B, G·H]: normalised input products, which become the gates, and recurrent products  z_…: gates r and
    z together, [B, 2H]
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
        for place, value in zip(
            moments, (norm_u.mean_N, norm_u.rstd_N, norm_c.mean_N, norm_c.rstd_N), strict=True
        ):
            place.copy_(value)

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
        """`dc` becomes the gradient of `c_before`."""
        (i, f, g, o), (di, df, dg, do) = gates.chunk(4, 1), da.chunk(4, 1)
        through_tanh(dh * o, tanh_c, out=dn)
        dc.add_(norm_gradient(dn, (c, *moments[2:]), gain_c))
        if dcell is not None:
            dc.add_(dcell)
        if mask is not None:
            dc.mul_(mask)
        for out, d, y in ((di, dc * g, i), (df, dc * c_before, f), (do, dh * tanh_c, o)):
            out.copy_(through_sigmoid(d, y, torch.empty_like(d)))
        dg.copy_(through_tanh(dc * i, g, torch.empty_like(dc)))
        dc.mul_(f)
        du.copy_(norm_gradient(da, (u, *moments[:2]), gain))

    @staticmethod
    def gru_gates(rz: Tensor, u: Tensor, gain: Tensor, moments: Moments) -> None:
        norm_u = Normalised(u, gain)
        rz.add_(norm_u.y_NX).sigmoid_()
        for place, value in zip(moments, (norm_u.mean_N, norm_u.rstd_N), strict=True):
            place.copy_(value)

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
        for place, value in zip(moments, (norm_u.mean_N, norm_u.rstd_N), strict=True):
            place.copy_(value)

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
        """`dh` becomes what z lets through to `h_before`; with `reset_after` the gradient of r is
        complete.
        """
        (r, z), (da_r, da_z) = rz.chunk(2, 1), da_rz.chunk(2, 1)
        through_tanh(dh * (1 - z), n, out=da_n)
        dv.copy_(da_n * r if reset_after else da_n)
        if reset_after:
            da_r.copy_(through_sigmoid(da_n * v, r, torch.empty_like(da_n)))
        da_z.copy_(through_sigmoid(dh * (h_before - n), z, torch.empty_like(dh)))
        dh.mul_(z)
        du.copy_(norm_gradient(dv, (u, *moments), gain))

    @staticmethod
    def gru_gates_backward(
        rz: Tensor,
        u: Tensor,
        gain: Tensor,
        moments: Moments,
        h_before: Tensor,
        d_entered: Tensor,
        dh: Tensor,
        da_rz: Tensor,
        du: Tensor,
        reset_after: bool,
    ) -> None:
        """`d_entered` is the gradient of what entered the candidate's product, under its mask: of h, or of r
        ∘ h.
        """
        r, da_r = rz.chunk(2, 1)[0], da_rz.chunk(2, 1)[0]
        if reset_after:
            dh.add_(d_entered)
        else:
            dh.addcmul_(d_entered, r)
            da_r.copy_(through_sigmoid(d_entered * h_before, r, torch.empty_like(dh)))
        du.copy_(norm_gradient(da_rz, (u, *moments), gain))


def compiled_or_not(backend: str) -> type[Steps]:
    """The steps of the back end `native` or `fused`."""
    if backend == "fused":
        return Steps
    from vdrop_cli.kernels.normed_native import NativeSteps

    return NativeSteps


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
        inputs, steps = (
            (x_TBD, h_BH, c_BH, w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh, gain_c, bias_c),
            compiled_or_not(backend),
        )
        layout, hidden = Layout.of(x_TBD, lengths), len(gain_c)
        x_TBD = layout.pack(x_TBD)
        w_GHD, u_GHH = (w.to(compute_dtype).view(4, hidden, -1) for w in (w_ih, w_hh))
        x_KND = entered_inputs(x_TBD, layout.mask_of_all(mask_x), compute_dtype)
        norm_x = Normalised(gate_products(x_KND, w_GHD, h_BH), gain_ih, b_ih + b_hh)
        gates_NGH = norm_x.y_NX
        u_NGH, tanh_NH = torch.empty_like(gates_NGH), h_BH.new_empty(len(gates_NGH), hidden)
        mean_u, rstd_u, mean_c, rstd_c = (h_BH.new_empty(len(gates_NGH), 1) for _ in range(4))
        h, c = layout.sort(h_BH), layout.sort(c_BH)
        hs, cs = layout.states(h), layout.states(c)
        masks_h, masks_c = layout.masks(mask_h), layout.masks(mask_c)
        by_step = [
            steps_of(layout, rows) for rows in (gates_NGH, u_NGH, tanh_NH, mean_u, rstd_u, mean_c, rstd_c)
        ]
        after = (layout.each(layout.after(states)) for states in (hs, cs))
        for t, (a, u, tanh_c, mu, ru, mc, rc, h_new, c_new) in enumerate(zip(*by_step, *after, strict=True)):
            h, c = layout.go_on(t, h), layout.go_on(t, c)
            h_KBH = masked_groups(h, None if masks_h is None else masks_h[t], compute_dtype)
            u.copy_(gate_products(h_KBH, u_GHH, h))
            mask = None if masks_c is None else masks_c[t]
            steps.lstm(a, u, gain_hh, gain_c, bias_c, mask, c, c_new, h_new, tanh_c, (mu, ru, mc, rc))
            h, c = h_new, c_new
        ctx.layout, ctx.compute_dtype, ctx.cells, ctx.steps = layout, compute_dtype, cells, steps
        ctx.set_materialize_grads(False)
        saved = (*norm_x.saved, u_NGH, mean_u, rstd_u, mean_c, rstd_c, gates_NGH, tanh_NH, hs, cs, x_KND)
        ctx.save_for_backward(*inputs, mask_x, mask_h, mask_c, lengths, *saved)
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
        tensors = ctx.saved_tensors
        inputs, (mask_x, mask_h, mask_c, lengths), saved = tensors[:11], tensors[11:15], tensors[15:]
        if needs_reference(upstream := (dy_TBH, dh_BH, dc_BH, dcells_TBH)):
            options = {
                "masks": Masks(mask_x, mask_h, mask_c),
                "compute_dtype": ctx.compute_dtype,
                "cells": ctx.cells,
            }
            gradients = cell_gradients(
                reference_lstm, inputs, ctx.needs_input_grad[:11], upstream, lengths, **options
            )
            return *gradients, *[None] * 7
        _, _, _, w_ih, w_hh, _, _, gain_ih, gain_hh, gain_c, _ = inputs
        *saved_x, u_NGH, mean_u, rstd_u, mean_c, rstd_c, gates_NGH, tanh_NH, hs, cs, x_KND = saved
        layout, dtype, hidden = ctx.layout, ctx.compute_dtype, len(gain_c)
        w_GHD, u_GHH = (w.to(dtype).view(4, hidden, -1) for w in (w_ih, w_hh))
        da_NGH, du_NGH, dn_NH = (
            torch.empty_like(gates_NGH),
            torch.empty_like(gates_NGH),
            torch.empty_like(tanh_NH),
        )
        dys, dcells = (d if d is None else layout.each(layout.pack(d)) for d in (dy_TBH, dcells_TBH))
        masks_h, masks_c, groups = layout.masks(mask_h), layout.masks(mask_c), groups_of(mask_h, 4)
        all_rows = (gates_NGH, tanh_NH, u_NGH, mean_u, rstd_u, mean_c, rstd_c, da_NGH, du_NGH, dn_NH)
        by_step = list(zip(*(steps_of(layout, rows) for rows in all_rows), strict=True))
        before, after = layout.each(layout.before(cs)), layout.each(layout.after(cs))
        dh_end, dc_end = (layout.end_gradient(d, cs) for d in (dh_BH, dc_BH))
        dh, dc = dh_end[:0], dc_end[:0]
        for t in reversed(range(layout.time)):
            gates, tanh_c, u, mu, ru, mc, rc, da, du, dn = by_step[t]
            dh, dc = layout.go_back(t, dh, dh_end), layout.go_back(t, dc, dc_end)
            if dys is not None:
                dh.add_(dys[t])
            mask, dcell = (None if one is None else one[t] for one in (masks_c, dcells))
            moments = (mu, ru, mc, rc)
            ctx.steps.lstm_backward(
                gates,
                u,
                gain_hh,
                gain_c,
                mask,
                before[t],
                after[t],
                tanh_c,
                moments,
                dh,
                dc,
                dcell,
                da,
                du,
                dn,
            )
            dh = under_mask(
                input_gradients(du.to(dtype), u_GHH, groups, dh), None if masks_h is None else masks_h[t]
            )
        dh, dc = layout.go_back(-1, dh, dh_end), layout.go_back(-1, dc, dc_end)
        dx_NGH, db = norm_gradient(da_NGH, tuple(saved_x), gain_ih), da_NGH.sum(0)
        h_KNH = entered_inputs(layout.before(hs), layout.mask_of_all(mask_h), dtype)
        dw_ih, dw_hh = (
            weight_gradient(dx_NGH.to(dtype), x_KND, w_ih),
            weight_gradient(du_NGH.to(dtype), h_KNH, w_hh),
        )
        d_gains = [
            gain_gradient(da_NGH, tuple(saved_x), gain_ih),
            gain_gradient(da_NGH, (u_NGH, mean_u, rstd_u), gain_hh),
            gain_gradient(dn_NH, (layout.after(cs).flatten(0, 1), mean_c, rstd_c), gain_c),
            dn_NH.sum(0),
        ]
        dx_TBD = inputs_gradient(ctx, dx_NGH, w_GHD, mask_x, inputs[0])
        return (
            dx_TBD,
            layout.unsort(dh),
            layout.unsort(dc),
            dw_ih,
            dw_hh,
            db,
            db.clone(),
            *d_gains,
            *[None] * 7,
        )


def inputs_gradient(
    ctx: Any, d_NGH: Tensor, w_GHD: Tensor, mask_x: Tensor | None, x_TBD: Tensor
) -> Tensor | None:
    """That of the layer's input, where it is needed."""
    if not ctx.needs_input_grad[0]:
        return None
    layout = ctx.layout
    mask = layout.mask_of_all(mask_x)
    d_KND = input_gradients(d_NGH.to(w_GHD.dtype), w_GHD, groups_of(mask_x, len(w_GHD)), x_TBD)
    gradient: Tensor = layout.unpack(mask_gradient(d_KND, mask, layout.pack(x_TBD)))
    return gradient


def reference_lstm(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    x_TBD, h_BH, c_BH, w_ih, w_hh, b_ih, b_hh, *norms = tensors
    return reference.lstm(x_TBD, h_BH, c_BH, w_ih, w_hh, b_ih, b_hh, norms=Norms(*norms), **options)


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
        inputs, steps = (x_TBD, h_BH, w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh), compiled_or_not(backend)
        layout, hidden = Layout.of(x_TBD, lengths), h_BH.shape[1]
        two = 2 * hidden  # r and z
        x_TBD = layout.pack(x_TBD)
        w_GHD, u_GHH = (w.to(compute_dtype).view(3, hidden, -1) for w in (w_ih, w_hh))
        x_KND = entered_inputs(x_TBD, layout.mask_of_all(mask_x), compute_dtype)
        products_NGH = gate_products(x_KND, w_GHD, h_BH)
        norm_rz = Normalised(products_NGH[:, :two].contiguous(), gain_ih[:two], b_ih[:two] + b_hh[:two])
        norm_n = Normalised(products_NGH[:, two:].contiguous(), gain_ih[two:], b_ih[two:])
        rz_N, n_N = norm_rz.y_NX, norm_n.y_NX
        u_rz_N, u_n_N, v_N = torch.empty_like(rz_N), torch.empty_like(n_N), torch.empty_like(n_N)
        entered_n = h_BH.new_empty(len(n_N), hidden, dtype=compute_dtype)
        mean_rz, rstd_rz, mean_n, rstd_n = (h_BH.new_empty(len(n_N), 1) for _ in range(4))
        h = layout.sort(h_BH)
        hs = layout.states(h)
        masks_rz, masks_n = (layout.masks(some_gates(mask_h, part)) for part in (R_AND_Z, ONLY_N))
        all_rows = (rz_N, n_N, u_rz_N, u_n_N, v_N, entered_n, mean_rz, rstd_rz, mean_n, rstd_n)
        by_step = [steps_of(layout, rows) for rows in all_rows]
        for t, (rz, n, u_rz, u_n, v, n_input, m_rz, r_rz, m_n, r_n, h_new) in enumerate(
            zip(*by_step, layout.each(layout.after(hs)), strict=True)
        ):
            h = layout.go_on(t, h)
            h_KBH = masked_groups(h, None if masks_rz is None else masks_rz[t], compute_dtype)
            u_rz.copy_(gate_products(h_KBH, u_GHH[R_AND_Z], h))
            steps.gru_gates(rz, u_rz, gain_hh[:two], (m_rz, r_rz))
            masked_h = h if masks_n is None else h * masks_n[t][0]
            n_input.copy_(masked_h if reset_after else rz[:, :hidden] * masked_h)
            u_n.copy_(gate_products(n_input[None], u_GHH[ONLY_N], h))
            steps.gru_candidate(n, u_n, gain_hh[two:], b_hh[two:], rz, h, v, h_new, (m_n, r_n), reset_after)
            h = h_new
        ctx.layout, ctx.options, ctx.steps = (
            layout,
            {"reset_after": reset_after, "compute_dtype": compute_dtype},
            steps,
        )
        ctx.set_materialize_grads(False)
        saved = (*norm_rz.saved, *norm_n.saved, *all_rows, hs, x_KND)
        ctx.save_for_backward(*inputs, mask_x, mask_h, lengths, *saved)
        return layout.outputs(hs), layout.last(hs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy_TBH: Tensor | None, dh_BH: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        inputs, (mask_x, mask_h, lengths), saved = tensors[:8], tensors[8:11], tensors[11:]
        if needs_reference(upstream := (dy_TBH, dh_BH)):
            options = {"masks": Masks(mask_x, mask_h), **ctx.options}
            gradients = cell_gradients(
                reference_gru, inputs, ctx.needs_input_grad[:8], upstream, lengths, **options
            )
            return *gradients, *[None] * 6
        _, _, w_ih, w_hh, _, _, gain_ih, gain_hh = inputs
        saved_rz, saved_n, rows, (hs, x_KND) = saved[:3], saved[3:6], saved[6:16], saved[16:]
        rz_N, n_N, u_rz_N, u_n_N, v_N, entered_n, mean_rz, rstd_rz, mean_n, rstd_n = rows
        reset_after, dtype, layout, hidden = (
            ctx.options["reset_after"],
            ctx.options["compute_dtype"],
            ctx.layout,
            n_N.shape[1],
        )
        two = 2 * hidden
        w_GHD, u_GHH = (w.to(dtype).view(3, hidden, -1) for w in (w_ih, w_hh))
        da_rz_N, da_n_N, dv_N = torch.empty_like(rz_N), torch.empty_like(n_N), torch.empty_like(n_N)
        du_rz_N, du_n_N = torch.empty_like(rz_N), torch.empty_like(n_N)
        dys = dy_TBH if dy_TBH is None else layout.each(layout.pack(dy_TBH))
        masks_rz, masks_n = (layout.masks(some_gates(mask_h, part)) for part in (R_AND_Z, ONLY_N))
        groups = groups_of(mask_h, 2)
        every = (
            rz_N,
            n_N,
            u_rz_N,
            u_n_N,
            v_N,
            mean_rz,
            rstd_rz,
            mean_n,
            rstd_n,
            da_rz_N,
            da_n_N,
            dv_N,
            du_rz_N,
            du_n_N,
        )
        by_step = list(zip(*(steps_of(layout, one) for one in every), strict=True))
        before, dh_end = layout.each(layout.before(hs)), layout.end_gradient(dh_BH, hs)
        dh = dh_end[:0]
        for t in reversed(range(layout.time)):
            rz, n, u_rz, u_n, v, m_rz, r_rz, m_n, r_n, da_rz, da_n, dv, du_rz, du_n = by_step[t]
            dh, h = layout.go_back(t, dh, dh_end), before[t]
            if dys is not None:
                dh.add_(dys[t])
            candidate = (rz, n, v, u_n, gain_hh[two:], (m_n, r_n), h)
            ctx.steps.gru_candidate_backward(*candidate, dh, da_n, dv, da_rz, du_n, reset_after)
            d_entered = input_gradients(du_n.to(dtype), u_GHH[ONLY_N], 1, dh)[0]
            if masks_n is not None:
                d_entered = d_entered * masks_n[t][0]
            ctx.steps.gru_gates_backward(
                rz, u_rz, gain_hh[:two], (m_rz, r_rz), h, d_entered, dh, da_rz, du_rz, reset_after
            )
            through_rz = input_gradients(du_rz.to(dtype), u_GHH[R_AND_Z], groups, dh)
            dh = dh + under_mask(through_rz, None if masks_rz is None else masks_rz[t])
        dh = layout.go_back(-1, dh, dh_end)
        dx_NGH = torch.cat(
            [norm_gradient(da_rz_N, saved_rz, gain_ih[:two]), norm_gradient(da_n_N, saved_n, gain_ih[two:])],
            1,
        )
        h_KNH = entered_inputs(layout.before(hs), layout.mask_of_all(some_gates(mask_h, R_AND_Z)), dtype)
        dw_ih = weight_gradient(dx_NGH.to(dtype), x_KND, w_ih)
        dw_hh = torch.cat(
            [
                weight_gradient(du_rz_N.to(dtype), h_KNH, w_hh),
                weight_gradient(du_n_N.to(dtype), entered_n[None], w_hh),
            ]
        )
        db_rz, d_gain_ih, d_gain_hh = (
            da_rz_N.sum(0),
            *(
                torch.cat([gain_gradient(da_rz_N, one, gain[:two]), gain_gradient(d_n, other, gain[two:])])
                for one, d_n, other, gain in (
                    (saved_rz, da_n_N, saved_n, gain_ih),
                    ((u_rz_N, mean_rz, rstd_rz), dv_N, (u_n_N, mean_n, rstd_n), gain_hh),
                )
            ),
        )
        db_ih, db_hh = torch.cat([db_rz, da_n_N.sum(0)]), torch.cat([db_rz, dv_N.sum(0)])
        dx_TBD = inputs_gradient(ctx, dx_NGH, w_GHD, mask_x, inputs[0])
        return dx_TBD, layout.unsort(dh), dw_ih, dw_hh, db_ih, db_hh, d_gain_ih, d_gain_hh, *[None] * 6


def reference_gru(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    x_TBD, h_BH, w_ih, w_hh, b_ih, b_hh, *norms = tensors
    return reference.gru(x_TBD, h_BH, w_ih, w_hh, b_ih, b_hh, norms=Norms(*norms), **options)


# torch.compile takes each of these as one operation: tracing into it would lose what `create_graph=True` asks
# of the backward pass.
apply_lstm, apply_gru = (
    torch.compiler.allow_in_graph(lambda *args, function=function: function.apply(*args))  # type: ignore[no-untyped-call]
    for function in (NormedLSTM, NormedGRU)
)


def lstm(
    tensors: tuple[Tensor, ...],
    norms: Norms,
    masks: Masks,
    lengths: Tensor | None,
    compute_dtype: torch.dtype,
    cells: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """As `fused.lstm`, of x, h, c, w_ih, w_hh, b_ih and b_hh."""
    outputs: tuple[Tensor, ...] = apply_lstm(*tensors, *norms, *masks, lengths, compute_dtype, cells, backend)
    return outputs


def gru(
    tensors: tuple[Tensor, ...],
    norms: Norms,
    masks: Masks,
    lengths: Tensor | None,
    reset_after: bool,
    compute_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `fused.gru`, of x, h, w_ih, w_hh, b_ih and b_hh."""
    outputs: tuple[Tensor, Tensor] = apply_gru(
        *tensors, norms.ih, norms.hh, masks.x, masks.h, lengths, reset_after, compute_dtype, backend
    )
    return outputs
