"""The same functions as `reference`, with forward and backward written by hand; any device, plain torch operations.

All input projections of a layer are one product before the loop over time, all weight gradients one product after it.
Masks that differ from gate to gate make each product four (GRU: three) of a quarter the size, so they cost little more.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)  N tokens  V vocabulary
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vdrop_cli.kernels.masks import Masks, at

LOGITS_AT_ONCE = 4_000_000  # elements of the chunk of logits that is held in fp32: 16 MB


def cast(tensor: Tensor, compute_dtype: torch.dtype | None) -> Tensor:
    return tensor if compute_dtype is None else tensor.to(compute_dtype)


def mm_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """`out (+)= a @ b` for matrices, where `a` and `b` may be of a lower precision than `out`."""
    if a.dtype != out.dtype:
        product = (a @ b).to(out.dtype)
        out.add_(product) if add else out.copy_(product)
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def differs_by_gate(mask: Tensor | None) -> bool:
    return mask is not None and mask.shape[1] > 1


def gate(mask: Tensor | None, g: int) -> Tensor | None:
    """The mask of gate `g`, [T or 1, B or 1, ·], of one that differs by gate or not."""
    return None if mask is None else mask[:, g if mask.shape[1] > 1 else 0]


def masked(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else value * mask


def add_masked(out: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`out += value ∘ mask`"""
    return out.add_(value) if mask is None else out.addcmul_(value, mask)


class Gates:
    """The pre-activations of every gate and step, laid out so that each product writes its part in one go.

    Time first ([T, B, G·H]) when no mask differs by gate; gate first ([G, T, B, H]) when one does.
    """

    def __init__(self, time: int, batch: int, gates: int, hidden: int, by_gate: bool, like: Tensor) -> None:
        self.gates, self.hidden, self.by_gate = gates, hidden, by_gate
        self.memory = like.new_empty((gates, time, batch, hidden) if by_gate else (time, batch, gates * hidden))
        self.view_GTBH = self.memory if by_gate else self.memory.view(time, batch, gates, hidden).permute(2, 0, 1, 3)

    @classmethod
    def of(cls, x_TBD: Tensor, hidden: int, gates: int, masks: Masks) -> "Gates":
        by_gate = differs_by_gate(masks.x) or differs_by_gate(masks.h)
        return cls(x_TBD.shape[0], x_TBD.shape[1], gates, hidden, by_gate, like=x_TBD)

    def another(self) -> "Gates":
        """Of the same layout, for the gradients."""
        _, time, batch, _ = self.view_GTBH.shape
        return Gates(time, batch, self.gates, self.hidden, self.by_gate, like=self.memory)

    def rows(self, part: slice) -> slice:
        """The rows of a weight matrix that belong to some gates."""
        return slice(part.start * self.hidden, part.stop * self.hidden)

    def parts(self, part: slice) -> list[slice]:
        """How the gates of `part` are grouped into products: all together, or one by one."""
        return [slice(g, g + 1) for g in range(part.start, part.stop)] if self.by_gate else [part]

    def steps(self, part: slice) -> Tensor:
        """Gates of every step as a matrix, [T·B, gates·H]."""
        return self.memory[part.start].flatten(0, 1) if self.by_gate else self.memory.flatten(0, 1)[:, self.rows(part)]

    def step(self, part: slice, t: int) -> Tensor:
        """Gates of step `t` as a matrix, [B, gates·H]."""
        return self.memory[part.start, t] if self.by_gate else self.memory[t][:, self.rows(part)]


def project_inputs(gates: Gates, x_TBD: Tensor, w_ih: Tensor, b_ih: Tensor, mask_x: Tensor | None) -> None:
    """Fills the gates with `W (m_x ∘ x) + b` for all steps at once."""
    every = slice(0, gates.gates)
    for part in gates.parts(every):
        x_ND = cast(masked(x_TBD, gate(mask_x, part.start)), w_ih.dtype).flatten(0, 1)
        mm_into(gates.steps(part), x_ND, w_ih[gates.rows(part)].T, add=False)
    gates.view_GTBH.add_(b_ih.view(gates.gates, 1, 1, -1))


def add_recurrence(gates: Gates, part: slice, t: int, h_BH: Tensor, w_hh: Tensor, mask_h: Tensor | None) -> None:
    """Adds `U (m_h ∘ h_{t-1})` to the gates of one step."""
    mask_GBH = at(mask_h, t)
    for some in gates.parts(part):
        m_BH = None if mask_GBH is None else mask_GBH[some.start if mask_GBH.shape[0] > 1 else 0]
        mm_into(gates.step(some, t), cast(masked(h_BH, m_BH), w_hh.dtype), w_hh[gates.rows(some)].T, add=True)


def add_recurrence_gradient(dh_BH: Tensor, da: Gates, part: slice, t: int, w_hh: Tensor, mask_h: Tensor | None) -> None:
    """Adds to the gradient of h_{t-1} what comes through the recurrent products of step `t`."""
    mask_GBH = at(mask_h, t)
    for some in da.parts(part):
        m_BH = None if mask_GBH is None else mask_GBH[some.start if mask_GBH.shape[0] > 1 else 0]
        through_BH = (cast(da.step(some, t), w_hh.dtype) @ w_hh[da.rows(some)]).to(dh_BH.dtype)
        add_masked(dh_BH, through_BH, m_BH)


def input_gradient(da: Gates, x_TBD: Tensor, w_ih: Tensor, mask_x: Tensor | None) -> Tensor:
    dx_TBD = torch.zeros_like(x_TBD)
    for part in da.parts(slice(0, da.gates)):
        through_ND = (cast(da.steps(part), w_ih.dtype) @ w_ih[da.rows(part)]).to(dx_TBD.dtype)
        add_masked(dx_TBD, through_ND.view_as(x_TBD), gate(mask_x, part.start))
    return dx_TBD


def weight_gradient(da: Gates, part: slice, input_TBD: Tensor, mask: Tensor | None, dw: Tensor, compute_dtype: torch.dtype) -> None:
    """Writes the gradient of the weights that multiply `input ∘ mask`, summed over all steps, in one product."""
    for some in da.parts(part):
        input_ND = cast(masked(input_TBD, gate(mask, some.start)), compute_dtype).flatten(0, 1)
        mm_into(dw[da.rows(some)], cast(da.steps(some), compute_dtype).T, input_ND, add=False)


def sum_over_steps(da: Gates) -> Tensor:
    """The gradient of the biases, [G·H]."""
    return da.view_GTBH.sum((1, 2)).flatten()


def alive_steps(lengths: Tensor | None, time: int) -> Tensor | None:
    """[T, B, 1]: whether step t lies before the sequence's end."""
    return None if lengths is None else (torch.arange(time, device=lengths.device)[:, None] < lengths)[..., None]


def previous(first_BH: Tensor, states_TBH: Tensor) -> Tensor:
    """The state that each step started from, [T, B, H]."""
    return torch.cat([first_BH[None], states_TBH[:-1]])


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
        gates = Gates.of(x_TBD, hidden, 4, Masks(mask_x, mask_h, mask_c))
        project_inputs(gates, x_TBD, w_ih, b_ih + b_hh, mask_x)
        i_TBH, f_TBH, g_TBH, o_TBH = gates.view_GTBH
        i_and_f_GTBH = gates.view_GTBH[:2]
        c_TBH, h_TBH = (
            torch.empty_like(o_TBH, memory_format=torch.contiguous_format),
            torch.empty_like(o_TBH, memory_format=torch.contiguous_format),
        )
        alive_TB1 = alive_steps(lengths, time)
        h, c = h_BH, c_BH
        for t in range(time):
            add_recurrence(gates, every, t, h, w_hh, mask_h)
            i_and_f_GTBH[:, t].sigmoid_()
            g_TBH[t].tanh_()
            o_TBH[t].sigmoid_()
            c_new = torch.mul(f_TBH[t], c, out=c_TBH[t]).addcmul_(i_TBH[t], g_TBH[t])
            if (m_BH := at(mask_c, t)) is not None:
                c_new.mul_(m_BH)
            h_new = torch.tanh(c_new, out=h_TBH[t]).mul_(o_TBH[t])
            if alive_TB1 is not None:
                c_new.copy_(torch.where(alive_TB1[t], c_new, c))
                h_new.copy_(torch.where(alive_TB1[t], h_new, h))
            h, c = h_new, c_new
        ctx.save_for_backward(x_TBD, h_BH, c_BH, w_ih, w_hh, mask_x, mask_h, mask_c, alive_TB1, h_TBH, c_TBH)
        ctx.gates = gates
        y_TBH = h_TBH if alive_TB1 is None else h_TBH * alive_TB1
        return y_TBH, h.clone(), c.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TBH: Tensor, dh_BH: Tensor, dc_BH: Tensor) -> tuple[Tensor | None, ...]:
        x_TBD, h_BH, c_BH, w_ih, w_hh, mask_x, mask_h, mask_c, alive_TB1, h_TBH, c_TBH = ctx.saved_tensors
        gates: Gates = ctx.gates
        every = slice(0, 4)
        i_TBH, f_TBH, g_TBH, o_TBH = gates.view_GTBH
        tanh_c_TBH = c_TBH.tanh()
        c_before_TBH = previous(c_BH, c_TBH)
        # What does not depend on the gradient is worked out for all steps at once: d a_gate = slope ∘ (dc or dh).
        da = gates.another()
        slope_i, slope_f, slope_g, slope_o = da.view_GTBH
        torch.mul(g_TBH * i_TBH, 1 - i_TBH, out=slope_i)
        torch.mul(c_before_TBH * f_TBH, 1 - f_TBH, out=slope_f)
        torch.mul(i_TBH, 1 - g_TBH * g_TBH, out=slope_g)
        torch.mul(tanh_c_TBH * o_TBH, 1 - o_TBH, out=slope_o)
        c_slope_TBH = o_TBH * (1 - tanh_c_TBH * tanh_c_TBH)
        if alive_TB1 is not None:
            da.view_GTBH.mul_(alive_TB1)
            c_slope_TBH.mul_(alive_TB1)
            dy_TBH = dy_TBH * alive_TB1
        i_f_g_GTBH = da.view_GTBH[:3]
        dh, dc = dh_BH.clone(), dc_BH.clone()
        for t in reversed(range(len(x_TBD))):
            dh.add_(dy_TBH[t])
            slope_o[t].mul_(dh)
            dc.addcmul_(dh, c_slope_TBH[t])
            dc_new = masked(dc, at(mask_c, t))
            i_f_g_GTBH[:, t].mul_(dc_new)
            carried = dc_new * f_TBH[t]
            dh_before = torch.zeros_like(dh)
            if alive_TB1 is not None:
                carried = torch.where(alive_TB1[t], carried, dc)
                dh_before = torch.where(alive_TB1[t], dh_before, dh)
            add_recurrence_gradient(dh_before, da, every, t, w_hh, mask_h)
            dh, dc = dh_before, carried
        db = sum_over_steps(da)
        dw_ih, dw_hh = torch.empty_like(w_ih, dtype=x_TBD.dtype), torch.empty_like(w_hh, dtype=x_TBD.dtype)
        weight_gradient(da, every, x_TBD, mask_x, dw_ih, w_ih.dtype)
        weight_gradient(da, every, previous(h_BH, h_TBH), mask_h, dw_hh, w_hh.dtype)
        dx_TBD = input_gradient(da, x_TBD, w_ih, mask_x) if ctx.needs_input_grad[0] else None
        return dx_TBD, dh, dc, dw_ih, dw_hh, db, db, None, None, None, None, None


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
        project_inputs(gates, x_TBD, w_ih, b_ih if reset_after else b_ih + b_hh, mask_x)
        if reset_after:
            gates.view_GTBH[r_and_z].add_(b_hh.view(3, 1, 1, -1)[r_and_z])
        r_TBH, z_TBH, n_TBH = gates.view_GTBH
        h_TBH = torch.empty_like(n_TBH, memory_format=torch.contiguous_format)
        inner_TBH = torch.empty_like(h_TBH)  # reset_after: U_n (m ∘ h) + b; otherwise r ∘ m ∘ h
        mask_n = gate(mask_h, 2)
        alive_TB1 = alive_steps(lengths, time)
        h = h_BH
        for t in range(time):
            add_recurrence(gates, r_and_z, t, h, w_hh, mask_h)
            gates.view_GTBH[r_and_z, t].sigmoid_()
            masked_h = masked(h, at(mask_n, t))
            if reset_after:
                inner_TBH[t] = b_hh[2 * hidden :]
                mm_into(inner_TBH[t], cast(masked_h, compute_dtype), w_hh[2 * hidden :].T, add=True)
                n_TBH[t].addcmul_(r_TBH[t], inner_TBH[t])
            else:
                torch.mul(r_TBH[t], masked_h, out=inner_TBH[t])
                mm_into(gates.step(only_n, t), cast(inner_TBH[t], compute_dtype), w_hh[2 * hidden :].T, add=True)
            n_TBH[t].tanh_()
            h_new = torch.lerp(n_TBH[t], h, z_TBH[t], out=h_TBH[t])
            if alive_TB1 is not None:
                h_new.copy_(torch.where(alive_TB1[t], h_new, h))
            h = h_new
        ctx.save_for_backward(x_TBD, h_BH, w_ih, w_hh, mask_x, mask_h, alive_TB1, h_TBH, inner_TBH)
        ctx.gates, ctx.reset_after = gates, reset_after
        y_TBH = h_TBH if alive_TB1 is None else h_TBH * alive_TB1
        return y_TBH, h.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TBH: Tensor, dh_BH: Tensor) -> tuple[Tensor | None, ...]:
        x_TBD, h_BH, w_ih, w_hh, mask_x, mask_h, alive_TB1, h_TBH, inner_TBH = ctx.saved_tensors
        gates: Gates = ctx.gates
        r_and_z, only_n, every = slice(0, 2), slice(2, 3), slice(0, 3)
        r_TBH, z_TBH, n_TBH = gates.view_GTBH
        h_before_TBH = previous(h_BH, h_TBH)
        mask_n = gate(mask_h, 2)
        w_n = w_hh[2 * gates.hidden :]
        da = gates.another()
        da_r, da_z, da_n = da.view_GTBH
        torch.mul(r_TBH, 1 - r_TBH, out=da_r)
        torch.mul((h_before_TBH - n_TBH) * z_TBH, 1 - z_TBH, out=da_z)
        torch.mul(1 - n_TBH * n_TBH, 1 - z_TBH, out=da_n)
        if alive_TB1 is not None:
            da.view_GTBH.mul_(alive_TB1)
            dy_TBH = dy_TBH * alive_TB1
        d_inner_TBH = torch.empty_like(inner_TBH) if ctx.reset_after else None
        dh = dh_BH.clone()
        for t in reversed(range(len(x_TBD))):
            dh.add_(dy_TBH[t])
            da_z[t].mul_(dh)
            da_n[t].mul_(dh)
            carry = z_TBH[t] if alive_TB1 is None else torch.where(alive_TB1[t], z_TBH[t], 1.0)
            dh = dh * carry
            if d_inner_TBH is not None:
                da_r[t].mul_(da_n[t] * inner_TBH[t])
                torch.mul(da_n[t], r_TBH[t], out=d_inner_TBH[t])
                through = (cast(d_inner_TBH[t], w_n.dtype) @ w_n).to(dh.dtype)
                add_masked(dh, through, at(mask_n, t))
            else:
                through = masked((cast(da.step(only_n, t), w_n.dtype) @ w_n).to(dh.dtype), at(mask_n, t))
                da_r[t].mul_(through * h_before_TBH[t])
                dh.addcmul_(through, r_TBH[t])
            add_recurrence_gradient(dh, da, r_and_z, t, w_hh, mask_h)
        db_ih = sum_over_steps(da)
        dw_ih, dw_hh = torch.empty_like(w_ih, dtype=x_TBD.dtype), torch.empty_like(w_hh, dtype=x_TBD.dtype)
        weight_gradient(da, every, x_TBD, mask_x, dw_ih, w_ih.dtype)
        weight_gradient(da, r_and_z, h_before_TBH, mask_h, dw_hh, w_hh.dtype)
        if d_inner_TBH is not None:
            d_ND, inner_input_TBH = d_inner_TBH.flatten(0, 1), masked(h_before_TBH, mask_n)
            db_hh = torch.cat([db_ih[: 2 * gates.hidden], d_ND.sum(0)])
        else:
            d_ND, inner_input_TBH = da.steps(only_n), inner_TBH
            db_hh = db_ih
        mm_into(dw_hh[2 * gates.hidden :], cast(d_ND, w_n.dtype).T, cast(inner_input_TBH, w_n.dtype).flatten(0, 1), add=False)
        dx_TBD = input_gradient(da, x_TBD, w_ih, mask_x) if ctx.needs_input_grad[0] else None
        return dx_TBD, dh, dw_ih, dw_hh, db_ih, db_hh, None, None, None, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """Works through the logits chunk by chunk, and makes the gradients of a chunk while its logits are there.

    They are made for an upstream gradient of one a token. Any other that is the same for all tokens, as that of a sum or
    a mean, scales them; one that differs from token to token has the chunks worked through once more.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor, compute_dtype: torch.dtype) -> Tensor:
        nll_N, gradients = loss_and_gradients(x_ND, w_VD, b_V, targets_N, None, compute_dtype, True)
        ctx.save_for_backward(x_ND, w_VD, b_V, targets_N, *gradients)
        ctx.compute_dtype = compute_dtype
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, w_VD, b_V, targets_N, *gradients = ctx.saved_tensors
        if bool((dnll_N == dnll_N[0]).all()):
            dx_ND, dw_VD, db_V = (gradient * dnll_N[0] for gradient in gradients)
        else:
            _, (dx_ND, dw_VD, db_V) = loss_and_gradients(x_ND, w_VD, b_V, targets_N, dnll_N, ctx.compute_dtype, True)
        return dx_ND, dw_VD, db_V, None, None


def loss_and_gradients(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    targets_N: Tensor,
    dnll_N: Tensor | None,
    compute_dtype: torch.dtype,
    with_gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Negative log-likelihood of each token and, if asked for, the gradients of x, w and b (`dnll_N` None: all ones)."""
    nll_N = torch.empty_like(targets_N, dtype=x_ND.dtype)
    dx_ND, dw_VD, db_V = (torch.zeros_like(t) for t in (x_ND, w_VD, b_V)) if with_gradients else (x_ND, w_VD, b_V)
    w_low_VD = cast(w_VD, compute_dtype)
    rows = max(1, LOGITS_AT_ONCE // len(b_V))
    for start in range(0, len(x_ND), rows):
        part = slice(start, start + rows)
        targets_M1 = targets_N[part, None]
        logits_MV = torch.addmm(b_V, x_ND[part], w_VD.T)  # always fp32: rounding them to bf16 unsettles training
        log_total_M1 = logits_MV.logsumexp(1, keepdim=True)
        nll_N[part] = (log_total_M1 - logits_MV.gather(1, targets_M1)).squeeze(1)
        if not with_gradients:
            continue
        d_MV = logits_MV.sub_(log_total_M1).exp_()
        d_MV.scatter_add_(1, targets_M1, torch.full_like(log_total_M1, -1.0))
        if dnll_N is not None:
            d_MV.mul_(dnll_N[part, None])
        db_V += d_MV.sum(0)
        d_low_MV = cast(d_MV, compute_dtype)
        mm_into(dx_ND[part], d_low_MV, w_low_VD, add=False)
        mm_into(dw_VD, d_low_MV.T, cast(x_ND[part], compute_dtype), add=True)
    return nll_N, [dx_ND, dw_VD, db_V] if with_gradients else []


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
    compute_dtype = compute_dtype or x_ND.dtype
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, w_VD, b_V))):
        return loss_and_gradients(x_ND, w_VD, b_V, targets_N, None, compute_dtype, False)[0]
    nll_N: Tensor = LinearCrossEntropy.apply(x_ND, w_VD, b_V, targets_N, compute_dtype)  # type: ignore[no-untyped-call]
    return nll_N
