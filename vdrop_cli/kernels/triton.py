"""The back end for CUDA: products by cuBLAS, and all operations between two of them in one Triton program.

The input projections of a layer are one product before the loop over time, the weight gradients one after it,
as in `fused`; the loop is a CUDA graph (`graphs`). The cells are operators of torch, `vdrop::lstm` and
`vdrop::gru`, which `torch.compile` does not trace. States and gates are saved for the backward pass, or with
`recompute` the states alone: two more products recompute the gates.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)
R, S sizes of aligned rows, at least H and D (`alignment.py`): gates and products have such rows, states none
K groups of gates: 1, or one for each gate
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vdrop_cli.errors import lacks_memory, one_line
from vdrop_cli.kernels import programs
from vdrop_cli.kernels.alignment import pad_bias, pad_weights, unpad_bias, unpad_weights
from vdrop_cli.kernels.gates import (
    ALL_LSTM,
    ONLY_N,
    R_AND_Z,
    Gates,
    input_gradient,
    masked_inputs,
    project_inputs,
    sum_over_steps,
    weight_gradient,
)
from vdrop_cli.kernels.graphs import Graphs
from vdrop_cli.kernels.head import linear_cross_entropy
from vdrop_cli.kernels.loops import gru_backward_loop, gru_loop, lstm_backward_loop, lstm_loop
from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.operators import (
    ACTIVE_GRAPHS,
    Layer,
    empty_states,
    gru_operator,
    lstm_operator,
    use_graphs,
    writable,
)
from vdrop_cli.kernels.products import mm_into
from vdrop_cli.kernels.self_check import largest_error, mismatch
from vdrop_cli.kernels.weights import Weights

__all__ = ["gru", "linear_cross_entropy", "lstm", "unavailable_reason"]

TOLERANCE = 5e-3  # relative error of the self-check; that of tf32 products is smaller
GRAPHS = Graphs()


def graphs() -> Graphs:
    """The graphs that loops use now: those of `use_graphs`, as within a self-check, otherwise those of the
    back end.
    """
    own = ACTIVE_GRAPHS.get()
    return GRAPHS if own is None else own


def zeros_or(gradient: Tensor | None, like: Tensor) -> Tensor:
    """The upstream gradient, or zeros where none comes."""
    return torch.zeros_like(like) if gradient is None else gradient.contiguous()


def outputs(hs: Tensor, lengths: Tensor | None) -> Tensor:
    """A copy of the states after each step, zero beyond the end of a sequence."""
    if lengths is None:
        return hs[1:].clone()
    alive_TB = torch.arange(len(hs) - 1, device=hs.device)[:, None] < lengths
    return hs[1:] * alive_TB[..., None]


def aligned(layer: Layer, weights: Tensor) -> Tensor:
    """Weights in the type of the products, in rows that are aligned: [G·R, S]."""
    return pad_weights(weights, layer.w_hh.shape[1], layer.compute_dtype)


def loop_inputs(layer: Layer) -> dict[str, Tensor | None]:
    """The inputs of a loop over time, forward and backward."""
    return {"w_hh": aligned(layer, layer.w_hh), **layer.loop_masks()}


def add_products(gates: Gates, part: slice, w_hh: Tensor, inputs_ND: list[Tensor]) -> None:
    """Adds the recurrent products of all steps at once, which is possible once all states are known."""
    for group, input_ND in zip(gates.groups(part), inputs_ND, strict=True):
        mm_into(gates.matrix(group), input_ND, w_hh[gates.rows(group)].T, add=True)


def project(layer: Layer, reset_after: bool = False) -> Gates:
    """The input products plus all biases. With `reset_after` the candidate's recurrent bias is left out,
    because the reset gate multiplies it.
    """
    gates, hidden = layer.gates(is_aligned=True), layer.w_hh.shape[1]
    bias = layer.b_ih + layer.b_hh
    if reset_after:
        bias[2 * hidden :] = layer.b_ih[2 * hidden :]
    bias = pad_bias(bias, hidden, gates.row_size)
    project_inputs(gates, layer.x, aligned(layer, layer.w_ih), bias, layer.mask_x)
    return gates


def lstm_forward(h: Tensor, c: Tensor, layer: Layer) -> tuple[Tensor, ...]:
    time = layer.x.shape[0]
    hs, cs = empty_states(h, time), empty_states(c, time)
    gates = project(layer)
    graphs().run(
        lstm_loop, {"a": gates.memory}, {"h": hs, "c": cs}, {"h_BH": h, "c_BH": c} | loop_inputs(layer)
    )
    saved = (gates.memory.new_empty(0) if layer.recompute else gates.memory, hs, cs)
    cells = outputs(cs, layer.lengths) if layer.cells else cs.new_empty(0)
    return outputs(hs, layer.lengths), hs[-1].clone(), cs[-1].clone(), cells, *saved


def lstm_gates(layer: Layer, hs: Tensor) -> Gates:
    """The gates of all steps, computed from the states of all steps."""
    gates = project(layer)
    add_products(gates, ALL_LSTM, aligned(layer, layer.w_hh), recurrent_inputs(layer, gates, ALL_LSTM, hs))
    g_TBH = gates.view_GTBR[2].tanh()
    gates.memory.sigmoid_()
    gates.view_GTBR[2].copy_(g_TBH)
    return gates


def recurrent_inputs(layer: Layer, gates: Gates, part: slice, hs: Tensor) -> list[Tensor]:
    """The inputs of the recurrent products of each group of gates at all steps, [T·B, R]."""
    return masked_inputs(gates, part, hs[:-1], layer.compute_dtype, layer.mask_h, gates.row_size)


def weight_gradients(layer: Layer, weights: Tensor, *products: tuple[Gates, slice, list[Tensor]]) -> Tensor:
    """The gradient of `weights`. Each of `products` has gradients of gates, the part of the gates that this
    product computed, and the inputs of the product.
    """
    hidden, row, (inputs_NS, *_) = layer.w_hh.shape[1], products[0][0].row_size, products[0][2]
    padded = inputs_NS.new_empty(len(weights) // hidden * row, inputs_NS.shape[1])
    for gates, part, inputs in products:
        weight_gradient(gates, part, inputs, padded)
    return unpad_weights(padded, weights, hidden, row)


def input_gradients(layer: Layer, da: Gates, needs_dx: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the input (empty without `needs_dx`), of the weights that multiply it, and of its
    bias.
    """
    w_ih, all_gates, size = aligned(layer, layer.w_ih), slice(0, da.gates), layer.x.shape[2]
    inputs = masked_inputs(da, all_gates, layer.x, layer.compute_dtype, layer.mask_x, w_ih.shape[1])
    dw_ih = weight_gradients(layer, layer.w_ih, (da, all_gates, inputs))
    db = bias_gradient(layer, da)
    if not needs_dx:
        return layer.x.new_empty(0), dw_ih, db
    return input_gradient(da, w_ih, layer.mask_x, layer.x.dtype, size), dw_ih, db


def bias_gradient(layer: Layer, da: Gates) -> Tensor:
    return unpad_bias(sum_over_steps(da, layer.b_ih.dtype), layer.w_hh.shape[1], da.row_size)


def lstm_backward(
    upstream: Sequence[Tensor | None], a: Tensor, hs: Tensor, cs: Tensor, layer: Layer, needs_dx: bool
) -> tuple[Tensor, ...]:
    dy, dh, dc, dcells = upstream
    gates = lstm_gates(layer, hs) if layer.recompute else Gates(a, 4)
    da, dh = gates.empty_like(layer.compute_dtype), writable(dh, hs[0])
    dc = writable(dc, cs[0])
    read = {"a": gates.memory, "c": cs, "dy": zeros_or(dy, hs[1:])} | loop_inputs(layer)
    read["dcells"] = dcells if dcells is None else dcells.contiguous()
    graphs().run(lstm_backward_loop, {"dh": dh, "dc": dc}, {"da": da.memory}, read)
    dx, dw_ih, db = input_gradients(layer, da, needs_dx)
    dw_hh = weight_gradients(layer, layer.w_hh, (da, ALL_LSTM, recurrent_inputs(layer, da, ALL_LSTM, hs)))
    return dh, dc, dx, dw_ih, dw_hh, db, db.clone()


apply_lstm = lstm_operator("lstm", lstm_forward, lstm_backward, is_aligned=True)


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


def candidate_inputs(layer: Layer, gates: Gates, hs: Tensor, reset_after: bool) -> list[Tensor]:
    """The inputs of the candidate's recurrent product at all steps, [T·B, R]."""
    h_TBH = hs[:-1] if reset_after else hs[:-1] * gates.view_GTBR[0, ..., : hs.shape[2]]
    return masked_inputs(gates, ONLY_N, h_TBH, layer.compute_dtype, layer.mask_h, gates.row_size)


def gru_forward(h: Tensor, layer: Layer, reset_after: bool) -> tuple[Tensor, ...]:
    gates, hs = project(layer, reset_after), empty_states(h, layer.x.shape[0])
    filled, read = {"h": hs}, {"h_BH": h} | loop_inputs(layer)
    inner = h.new_empty(0)
    if reset_after:
        filled["inner"] = inner = torch.empty_like(hs[1:])
        read["b_n"] = layer.b_hh[2 * h.shape[1] :].contiguous()
    graphs().run(gru_loop, {"a": gates.memory}, filled, read)
    saved = (h.new_empty(0), hs, h.new_empty(0)) if layer.recompute else (gates.memory, hs, inner)
    return outputs(hs, layer.lengths), hs[-1].clone(), *saved


def gru_gates(layer: Layer, hs: Tensor, reset_after: bool) -> tuple[Gates, Tensor]:
    """The gates of all steps, and the products U_n (m ∘ h) + b, computed from the states of all steps."""
    gates, w_hh, hidden = project(layer, reset_after), aligned(layer, layer.w_hh), hs.shape[2]
    add_products(gates, R_AND_Z, w_hh, recurrent_inputs(layer, gates, R_AND_Z, hs))
    r_TBR, z_TBR, n_TBR = gates.view_GTBR
    r_TBR.sigmoid_()
    z_TBR.sigmoid_()
    (n_input_NR,) = candidate_inputs(layer, gates, hs, reset_after)
    product_TBR = (n_input_NR @ w_hh[gates.rows(ONLY_N)].T).view_as(n_TBR)
    inner_TBH = product_TBR[..., :hidden].to(hs.dtype).contiguous()
    if reset_after:
        inner_TBH = inner_TBH + layer.b_hh[2 * hidden :]
    n_TBH = n_TBR[..., :hidden]
    n_TBH.add_(r_TBR[..., :hidden] * inner_TBH if reset_after else inner_TBH).tanh_()
    return gates, inner_TBH


def gru_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    a: Tensor,
    hs: Tensor,
    inner: Tensor,
    layer: Layer,
    reset_after: bool,
    needs_dx: bool,
) -> tuple[Tensor, ...]:
    gates, inner = gru_gates(layer, hs, reset_after) if layer.recompute else (Gates(a, 3), inner)
    da, dh = gates.empty_like(layer.compute_dtype), writable(dh, hs[0])
    dp, filled = da, {"da": da.memory}
    read = {"a": gates.memory, "h": hs, "dy": zeros_or(dy, hs[1:])} | loop_inputs(layer)
    if reset_after:
        dp, read["inner"] = da.empty_like(), inner
        filled["dp"] = dp.memory
    graphs().run(gru_backward_loop, {"dh": dh}, filled, read)
    dx, dw_ih, db_ih = input_gradients(layer, da, needs_dx)
    dw_hh = weight_gradients(
        layer,
        layer.w_hh,
        (dp, R_AND_Z, recurrent_inputs(layer, da, R_AND_Z, hs)),
        (dp, ONLY_N, candidate_inputs(layer, gates, hs, reset_after)),
    )
    return dh, dx, dw_ih, dw_hh, db_ih, bias_gradient(layer, dp)


apply_gru = gru_operator("gru", gru_forward, gru_backward, is_aligned=True)


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
    """The reason why the Triton programs cannot be used on a device; empty if they can.

    The check runs forward and backward of both cells on a few numbers, and compares them with `reference`.
    Raises RuntimeError while a CUDA graph is captured, which cannot contain the check.
    """
    if device.type != "cuda" and not programs.INTERPRETED:
        return "Triton's programs are for CUDA devices"
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first call of a cell on a device runs a self-check, which a CUDA graph cannot contain; call "
            "a cell once before the capture"
        )
    try:
        error = mismatch(lambda cell: self_check(device, cell), device, TOLERANCE)
    except Exception as failure:  # of Triton, its compiler or the driver, by many names
        if lacks_memory(failure):  # says nothing about the device
            raise
        return f"the self-check failed with {one_line(failure)}"
    return f"the self-check is {error}" if error else ""


def self_check(device: torch.device, cell: str) -> float:
    """The largest relative error of three passes: one without graphs, one that captures them, and one that
    only replays them.
    """
    functions: dict[str, Callable[..., tuple[Tensor, ...]]] = {"lstm": lstm, "gru": gru}
    # These graphs free their memory after the check.
    with use_graphs(Graphs(GRAPHS.capture, GRAPHS.possible, strict=True)):
        return largest_error(cell, functions[cell], device, passes=3)
