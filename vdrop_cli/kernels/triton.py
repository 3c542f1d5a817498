"""The back end for CUDA: products by cuBLAS, and all operations between two of them in one Triton program.

The input projections of a layer are one product before the loop over time, the weight gradients one after it,
as in `fused`; the loop is a CUDA graph (`graphs`). The cells are operators of torch, `vdrop::lstm` and
`vdrop::gru`, which `torch.compile` does not trace. States and gates are saved for the backward pass, or with
`recompute` the states alone: two more products recompute the gates.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)
K groups of gates: 1, or one for each gate
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vdrop_cli.kernels import programs
from vdrop_cli.kernels.fused import linear_cross_entropy
from vdrop_cli.kernels.gates import (
    Gates,
    input_gradient,
    masked_inputs,
    project_inputs,
    sum_over_steps,
    weight_gradient,
)
from vdrop_cli.kernels.graphs import Graphs
from vdrop_cli.kernels.loops import (
    ALL_GRU,
    ALL_LSTM,
    ONLY_N,
    R_AND_Z,
    aligned_weights,
    gru_backward_loop,
    gru_loop,
    lstm_backward_loop,
    lstm_loop,
)
from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.operators import (
    PASS_CONTEXT,
    Layer,
    empty_states,
    gru_operator,
    lstm_operator,
    pass_context,
    writable,
)
from vdrop_cli.kernels.products import mm_into
from vdrop_cli.kernels.self_check import largest_error
from vdrop_cli.kernels.weights import Weights

__all__ = ["gru", "linear_cross_entropy", "lstm", "unavailable_reason"]

TOLERANCE = 5e-3  # relative error of the self-check; that of tf32 products is smaller
GRAPHS = Graphs()


def graphs() -> Graphs:
    """The graphs of all loops, except within a self-check, which has its own."""
    own = PASS_CONTEXT.get()
    return own if isinstance(own, Graphs) else GRAPHS


def zeros_or(gradient: Tensor | None, like: Tensor) -> Tensor:
    """The upstream gradient, or zeros where none comes."""
    return torch.zeros_like(like) if gradient is None else gradient.contiguous()


def outputs(hs: Tensor, lengths: Tensor | None) -> Tensor:
    """A copy of the states after each step, zero beyond the end of a sequence."""
    if lengths is None:
        return hs[1:].clone()
    alive_TB = torch.arange(len(hs) - 1, device=hs.device)[:, None] < lengths
    return hs[1:] * alive_TB[..., None]


def loop_inputs(layer: Layer) -> dict[str, Tensor | None]:
    """The inputs of a loop over time, forward and backward."""
    return {"w_GRR": aligned_weights(layer.w_hh, layer.compute_dtype), **layer.loop_masks()}


def add_products(gates: Gates, part: slice, w_hh: Tensor, inputs_ND: list[Tensor]) -> None:
    """Adds the recurrent products of all steps at once, which is possible once all states are known."""
    for group, input_ND in zip(gates.groups(part), inputs_ND, strict=True):
        mm_into(gates.matrix(group), input_ND, w_hh[gates.rows(group)].T, add=True)


def lstm_forward(h: Tensor, c: Tensor, layer: Layer) -> tuple[Tensor, ...]:
    gates, time = layer.gates(), layer.x.shape[0]
    hs, cs = empty_states(h, time), empty_states(c, time)
    project_inputs(gates, layer.x, layer.lowp(layer.w_ih), layer.b_ih + layer.b_hh, layer.mask_x)
    graphs().run(
        lstm_loop, {"a": gates.memory}, {"h": hs, "c": cs}, {"h_BH": h, "c_BH": c} | loop_inputs(layer)
    )
    saved = (gates.memory.new_empty(0) if layer.recompute else gates.memory, hs, cs)
    cells = outputs(cs, layer.lengths) if layer.cells else cs.new_empty(0)
    return outputs(hs, layer.lengths), hs[-1].clone(), cs[-1].clone(), cells, *saved


def lstm_gates(layer: Layer, hs: Tensor) -> Gates:
    """The gates of all steps, computed from the states of all steps."""
    gates = layer.gates()
    project_inputs(gates, layer.x, layer.lowp(layer.w_ih), layer.b_ih + layer.b_hh, layer.mask_x)
    add_products(
        gates,
        ALL_LSTM,
        layer.lowp(layer.w_hh),
        masked_inputs(gates, ALL_LSTM, hs[:-1], layer.compute_dtype, layer.mask_h),
    )
    g_TBH = gates.view_GTBH[2].tanh()
    gates.memory.sigmoid_()
    gates.view_GTBH[2].copy_(g_TBH)
    return gates


def lstm_backward(
    upstream: Sequence[Tensor | None], a: Tensor, hs: Tensor, cs: Tensor, layer: Layer
) -> tuple[Tensor, ...]:
    dy, dh, dc, dcells = upstream
    gates = lstm_gates(layer, hs) if layer.recompute else Gates(a, 4)
    da, dh = gates.empty_like(layer.compute_dtype), writable(dh, hs[0])
    dc = writable(dc, cs[0])
    read = {"a": gates.memory, "c": cs, "dy": zeros_or(dy, hs[1:])} | loop_inputs(layer)
    read["dcells"] = dcells if dcells is None else dcells.contiguous()
    graphs().run(lstm_backward_loop, {"dh": dh, "dc": dc}, {"da": da.memory}, read)
    dw_ih, dw_hh = torch.empty_like(layer.w_ih), torch.empty_like(layer.w_hh)
    weight_gradient(
        da, ALL_LSTM, masked_inputs(da, ALL_LSTM, layer.x, layer.compute_dtype, layer.mask_x), dw_ih
    )
    weight_gradient(
        da, ALL_LSTM, masked_inputs(da, ALL_LSTM, hs[:-1], layer.compute_dtype, layer.mask_h), dw_hh
    )
    db = sum_over_steps(da, layer.b_ih.dtype)
    dx = input_gradient(da, layer.lowp(layer.w_ih), layer.mask_x, layer.x.dtype)
    return dh, dc, dx, dw_ih, dw_hh, db, db.clone()


apply_lstm = lstm_operator("lstm", lstm_forward, lstm_backward)


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
    flat = (weights.w_ih, weights.w_hh, weights.b_ih, weights.b_hh, *masks)
    options = (compute_dtype or x_TBD.dtype, recompute, cells)
    outputs: tuple[Tensor, ...] = apply_lstm(h_BH, c_BH, x_TBD, *flat, lengths, *options)
    return outputs[: 4 if cells else 3]


def project_gru(layer: Layer, gates: Gates, reset_after: bool) -> None:
    """The input products with all biases but the candidate's recurrent one where that is inside the reset
    gate.
    """
    bias = layer.b_ih + layer.b_hh
    if reset_after:
        bias[2 * gates.hidden :] = layer.b_ih[2 * gates.hidden :]
    project_inputs(gates, layer.x, layer.lowp(layer.w_ih), bias, layer.mask_x)


def candidate_inputs(layer: Layer, gates: Gates, hs: Tensor, reset_after: bool) -> list[Tensor]:
    """The inputs of the candidate's recurrent product at all steps."""
    h_TBH = hs[:-1] if reset_after else hs[:-1] * gates.view_GTBH[0]
    return masked_inputs(gates, ONLY_N, h_TBH, layer.compute_dtype, layer.mask_h)


def gru_forward(h: Tensor, layer: Layer, reset_after: bool) -> tuple[Tensor, ...]:
    gates, hs = layer.gates(), empty_states(h, layer.x.shape[0])
    project_gru(layer, gates, reset_after)
    filled, read = {"h": hs}, {"h_BH": h} | loop_inputs(layer)
    inner = h.new_empty(0)
    if reset_after:
        filled["inner"] = inner = torch.empty_like(hs[1:])
        read["b_n"] = layer.b_hh[2 * gates.hidden :]
    graphs().run(gru_loop, {"a": gates.memory}, filled, read)
    saved = (h.new_empty(0), hs, h.new_empty(0)) if layer.recompute else (gates.memory, hs, inner)
    return outputs(hs, layer.lengths), hs[-1].clone(), *saved


def gru_gates(layer: Layer, hs: Tensor, reset_after: bool) -> tuple[Gates, Tensor]:
    """The gates of all steps, and the products U_n (m ∘ h) + b, computed from the states of all steps."""
    gates, w_hh = layer.gates(), layer.lowp(layer.w_hh)
    project_gru(layer, gates, reset_after)
    add_products(gates, R_AND_Z, w_hh, masked_inputs(gates, R_AND_Z, hs[:-1], w_hh.dtype, layer.mask_h))
    r_TBH, z_TBH, n_TBH = gates.view_GTBH
    r_TBH.sigmoid_()
    z_TBH.sigmoid_()
    (n_input_ND,) = candidate_inputs(layer, gates, hs, reset_after)
    inner_TBH = (n_input_ND @ w_hh[gates.rows(ONLY_N)].T).view_as(n_TBH).to(hs.dtype)
    if reset_after:
        inner_TBH = inner_TBH + layer.b_hh[2 * gates.hidden :]
    n_TBH.add_(r_TBH * inner_TBH if reset_after else inner_TBH).tanh_()
    return gates, inner_TBH


def gru_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    a: Tensor,
    hs: Tensor,
    inner: Tensor,
    layer: Layer,
    reset_after: bool,
) -> tuple[Tensor, ...]:
    gates, inner = gru_gates(layer, hs, reset_after) if layer.recompute else (Gates(a, 3), inner)
    da, dh = gates.empty_like(layer.compute_dtype), writable(dh, hs[0])
    dp, filled = da, {"da": da.memory}
    read = {"a": gates.memory, "h": hs, "dy": zeros_or(dy, hs[1:])} | loop_inputs(layer)
    if reset_after:
        dp, read["inner"] = da.empty_like(), inner
        filled["dp"] = dp.memory
    graphs().run(gru_backward_loop, {"dh": dh}, filled, read)
    dw_ih, dw_hh = torch.empty_like(layer.w_ih), torch.empty_like(layer.w_hh)
    weight_gradient(
        da, ALL_GRU, masked_inputs(da, ALL_GRU, layer.x, layer.compute_dtype, layer.mask_x), dw_ih
    )
    weight_gradient(
        dp, R_AND_Z, masked_inputs(da, R_AND_Z, hs[:-1], layer.compute_dtype, layer.mask_h), dw_hh
    )
    weight_gradient(dp, ONLY_N, candidate_inputs(layer, gates, hs, reset_after), dw_hh)
    db_ih, db_hh = (sum_over_steps(gates, layer.b_ih.dtype) for gates in (da, dp))
    dx = input_gradient(da, layer.lowp(layer.w_ih), layer.mask_x, layer.x.dtype)
    return dh, dx, dw_ih, dw_hh, db_ih, db_hh


apply_gru = gru_operator("gru", gru_forward, gru_backward)


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
    flat = (weights.w_ih, weights.w_hh, weights.b_ih, weights.b_hh, *masks)
    options = (compute_dtype or x_TBD.dtype, recompute, False, reset_after)
    y_TBH, h_BH, *_ = apply_gru(h_BH, x_TBD, *flat, lengths, *options)
    return y_TBH, h_BH


def unavailable_reason(device: torch.device) -> str:
    """Why the Triton programs cannot be used on a device; empty where they can.

    It runs forward and backward of both cells on a few numbers, and compares them with the definition.
    """
    if device.type != "cuda" and not programs.INTERPRETED:
        return "Triton's programs are for CUDA devices"
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first call of a cell on a device runs a self-check, which a CUDA graph cannot contain; call "
            "a cell once before the capture"
        )
    try:
        # The caller may be in any of these modes.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            errors = [self_check(device, cell) for cell in ("lstm", "gru")]
    except Exception as failure:  # of Triton, its compiler or the driver, by many names
        return (
            f"the self-check failed with {type(failure).__name__}: "
            f"{str(failure).strip().partition(chr(10))[0]}"
        )
    too_large = [error for error in errors if not error < TOLERANCE]  # or NaN
    return f"the self-check is off by {too_large[0]:.1g}" if too_large else ""


def self_check(device: torch.device, cell: str) -> float:
    """The largest relative error of three passes: one without graphs, one that captures them, and one that
    only replays them.
    """
    functions: dict[str, Callable[..., tuple[Tensor, ...]]] = {"lstm": lstm, "gru": gru}
    # These graphs free their memory after the check.
    with pass_context(Graphs(GRAPHS.capture, GRAPHS.possible, strict=True)):
        return largest_error(cell, functions[cell], device, passes=3)
