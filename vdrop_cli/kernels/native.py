"""The back end for the CPU, compiled from `native.c`: whole recurrences, their products included.

The products over all steps at once (input projections, gradients of weights and inputs) are torch's, or on
processors with AMX those of `native.c`, whose bf16 products have results in fp32. Sequences of different
lengths are packed (`packing.py`).

T time  B batch  N rows of all steps  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)
K groups of gates: 1, or one for each gate
"""

import ctypes
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from vdrop_cli.kernels import compiler, normed
from vdrop_cli.kernels.gates import (
    ALL_LSTM,
    ONLY_N,
    R_AND_Z,
    Gates,
    input_gradient,
    masked_inputs,
    project_inputs,
    select_gates,
    weight_gradient,
)
from vdrop_cli.kernels.masks import Masks, mask_strides
from vdrop_cli.kernels.native_head import linear_cross_entropy
from vdrop_cli.kernels.native_library import (
    SUFFIXES,
    CMask,
    CRecurrence,
    feature_bits,
    function,
    gemm,
    has_amx,
    pack,
    packed_rows,
    padded,
    rounded_rows,
    threads,
    transposed_rows,
)
from vdrop_cli.kernels.operators import (
    Layer,
    Tensors,
    empty_contiguous,
    empty_states,
    gru_operator,
    lstm_operator,
    writable,
)
from vdrop_cli.kernels.packing import layout_for
from vdrop_cli.kernels.products import mm_into
from vdrop_cli.kernels.self_check import Cell, largest_error, mismatch
from vdrop_cli.kernels.weights import Weights

__all__ = ["gru", "linear_cross_entropy", "lstm", "unavailable_reason"]

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # relative errors of the self-check


class Pass:
    """The forward or backward pass of one layer, with its arguments for the library.

    Rows are the steps of all sequences, packed where the lengths differ. The states of all steps, [T + 1, B,
    H], begin with those before the first. Memory for gates and states has full length; packed rows fill its
    beginning.
    """

    def __init__(self, layer: Layer, gates: int, memory: Tensor | None = None) -> None:
        self.layer = layer
        self.gate_count = gates
        self.layout = layout_for(layer.x, layer.lengths)
        self.dtype, self.compute_dtype = layer.x.dtype, layer.compute_dtype
        self.hidden = layer.w_hh.shape[1]
        self.suffix = SUFFIXES[self.dtype, self.compute_dtype]
        self.amx = self.compute_dtype == torch.bfloat16 and has_amx()
        self.memory = self.zeroed_if_packed(layer.gates().memory) if memory is None else memory
        self.gates = Gates(self.layout.packed_view(self.memory), gates)
        self.x_TBD = self.layout.pack(layer.x).contiguous()
        self.rows = self.gates.time * self.gates.batch
        self.depth = padded(self.hidden, self.compute_dtype)
        self.referenced: list[Tensor] = []  # tensors that the library reads
        data = self.data = CRecurrence()
        data.steps, data.batch = self.layout.time, layer.x.shape[1]
        data.hidden, data.depth = self.hidden, self.depth
        data.threads = threads()
        data.first = self.pointer(torch.tensor(self.layout.step_offsets, dtype=torch.int64))
        data.places = self.pointer(self.layout.padded_rows)
        data.gates = self.pointer(self.gates.memory)
        data.gate_stride, _, data.gate_row, _ = self.gates.view_GTBR.stride()
        if self.layout.is_packed:  # each row is a step of a batch of one
            data.gate_row = self.gates.view_GTBR.stride(1)
        mask_h, mask_c = self.layout.sort_mask(layer.mask_h), self.layout.sort_mask(layer.mask_c)
        data.mask_h = self.mask(mask_h)
        data.mask_c = self.mask(None if mask_c is None else mask_c[:, None])
        data.groups = 1 if mask_h is None else mask_h.shape[1]

    def pointer(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor, which stays allocated as long as this object."""
        if tensor is None or tensor.numel() == 0:
            return None
        self.referenced.append(tensor)
        return tensor.data_ptr()

    def mask(self, mask_TKBH: Tensor | None) -> CMask:
        if mask_TKBH is None:
            return CMask()
        mask_TKBH = mask_TKBH.expand(-1, -1, -1, self.hidden).contiguous()
        return CMask(self.pointer(mask_TKBH), *mask_strides(mask_TKBH, 3))

    @cached_property
    def mask_x(self) -> Tensor | None:
        """The mask of the input, of packed rows."""
        return self.layout.pack_mask(self.layer.mask_x)

    @cached_property
    def mask_h(self) -> Tensor | None:
        """The mask of the recurrence, of packed rows."""
        return self.layout.pack_mask(self.layer.mask_h)

    def zeroed_if_packed(self, memory: Tensor) -> Tensor:
        """Sets memory to zero if packed sequences will fill only a part of it, so that all its elements are
        defined.
        """
        return memory.zero_() if self.layout.is_packed else memory

    def states(self, memory_TBH: Tensor) -> Tensor:
        """The states as the layout expects them."""
        return self.layout.packed_view(memory_TBH, start=True)

    def start(self, state_BH: Tensor) -> Tensor:
        """Memory for the states of all steps, with the first ones filled in."""
        memory_TBH = self.zeroed_if_packed(empty_states(state_BH, self.layer.x.shape[0]))
        memory_TBH[0] = self.layout.sort(state_BH)
        return memory_TBH

    def outputs(self) -> Tensor:
        """Memory for the outputs, with zeros as padding."""
        return self.zeroed_if_packed(self.layer.x.new_empty(*self.layer.x.shape[:2], self.hidden))

    def project(self) -> None:
        """Fills the gates with `W (m_x ∘ x)`."""
        mask_x, w_ih = self.mask_x, self.layer.w_ih
        if not self.amx:
            project_inputs(self.gates, self.x_TBD, w_ih.to(self.compute_dtype), None, mask_x)
            return
        for group, rows_ND in self.inputs_by_group(mask_x):
            gemm(self.gates.matrix(group), [(rows_ND, pack(w_ih[self.gates.rows(group)], torch.bfloat16, 1))])

    def inputs_by_group(self, mask_x: Tensor | None) -> list[tuple[slice, Tensor]]:
        """Each group of gates with the input of its input product, in bf16."""
        return self.rounded_by_group(self.x_TBD, mask_x, slice(0, self.gate_count))

    def rounded_by_group(self, x_TBX: Tensor, mask: Tensor | None, part: slice) -> list[tuple[slice, Tensor]]:
        """Each group of the gates of `part` with `m ∘ x` in bf16, computed once where all gates share it."""
        if mask is None or mask.shape[1] == 1:
            rows_NX = rounded_rows(x_TBX, None if mask is None else mask[:, 0])
            return [(group, rows_NX) for group in self.gates.groups(part)]
        return [(group, rounded_rows(x_TBX, mask[:, group.start])) for group in self.gates.groups(part)]

    def run(self, name: str) -> None:
        if self.rows:
            function(f"vdrop_{name}_{self.suffix}")(ctypes.byref(self.data))

    def allocate_inputs(self) -> None:
        """Memory for the inputs of the recurrent products of a step and of the next."""
        batch, zeros = self.layer.x.shape[1], self.layer.x.new_zeros
        self.data.inputs = self.pointer(
            zeros(2, self.data.groups, batch, self.depth, dtype=self.compute_dtype)
        )
        self.data.inputs_n = self.pointer(zeros(batch, self.depth, dtype=self.compute_dtype))


class Gradients:
    """The gradients of the gates of all rows, in the type of the products, and the products with them.

    In bf16 they are [N, G, H and zeros]; in other types their layout is that of the gates.
    """

    def __init__(self, work: Pass) -> None:
        self.work, self.bf16 = work, work.compute_dtype == torch.bfloat16
        gates, like = work.gate_count, work.layer.x
        if self.bf16:
            self.memory = like.new_empty(work.rows, gates, work.depth, dtype=torch.bfloat16)
            self.memory[..., work.hidden :] = 0
            work.data.da_row, work.data.da_stride = self.memory.stride()[:2]
            self.as_gates = None
        else:
            self.as_gates = work.gates.empty_like()
            self.memory = self.as_gates.memory
            stride, steps, rows, _ = self.as_gates.view_GTBR.stride()
            work.data.da_row, work.data.da_stride = (steps if work.layout.is_packed else rows), stride
        work.data.da = work.pointer(self.memory)
        self.inner_NH = like.new_empty(0)
        self.bias_sums = like.new_zeros(work.data.threads, gates + 1, work.hidden)
        work.data.bias_sums = work.pointer(self.bias_sums)
        self.transposed: Tensor | None = None

    def allocate_inner(self) -> None:
        """Memory for the gradient of the candidate's recurrent product."""
        work = self.work
        self.inner_NH = work.layer.x.new_zeros(work.rows, work.depth, dtype=work.compute_dtype)
        work.data.da_inner = work.pointer(self.inner_NH)

    def bias(self) -> Tensor:
        """The gradients of the biases, [G + 1, H]. The last row is that of the candidate's recurrent bias,
        for GRUs with `reset_after`.
        """
        return self.bias_sums.sum(0)

    def gates(self) -> Gates:
        """The gradients in the layout of the gates, for products by torch."""
        if self.as_gates is None:
            work = self.work
            da_lowp = work.gates.empty_like(torch.bfloat16)
            rows_GNH = self.memory[..., : work.hidden].permute(1, 0, 2)
            da_lowp.view_GTBR.copy_(rows_GNH.view_as(da_lowp.view_GTBR))
            self.as_gates = da_lowp
        return self.as_gates

    def weights(self, part: slice, inputs: list[tuple[slice, Tensor]], out: Tensor) -> None:
        """Writes `daᵀ x` of the gates of `part`, by AMX; the inputs are those of groups of gates."""
        if self.transposed is None:
            self.transposed = transposed_rows(self.memory.flatten(1))
        last_NX, right = None, out
        for group, rows_NX in inputs:
            if rows_NX is not last_NX:  # gates without masks of their own share an input
                last_NX, right = rows_NX, packed_rows(rows_NX, out.shape[1])
            for gate in range(group.start, group.stop):
                first_row = (gate - part.start) * self.work.hidden
                rows = slice(first_row, first_row + self.work.hidden)
                gemm(out[rows], [(self.transposed, right)], first=gate * self.work.depth, transposed=True)

    def input_weights(self, out: Tensor) -> None:
        """Writes the gradient of the weights of the input."""
        work = self.work
        all_gates, mask_x = slice(0, work.gate_count), work.mask_x
        if work.amx:
            self.weights(all_gates, work.inputs_by_group(mask_x), out)
        else:
            inputs_ND = masked_inputs(work.gates, all_gates, work.x_TBD, work.compute_dtype, mask_x)
            weight_gradient(self.gates(), all_gates, inputs_ND, out)

    def recurrent_weights(self, part: slice, before_TBH: Tensor, out: Tensor) -> None:
        """Writes the gradient of the recurrent weights of some gates from the states before each step."""
        work = self.work
        if work.amx:
            self.weights(part, work.rounded_by_group(before_TBH, work.mask_h, part), out)
        else:
            inputs_NH = masked_inputs(work.gates, part, before_TBH, work.compute_dtype, work.mask_h)
            weight_gradient(self.gates(), part, inputs_NH, out)

    def inputs(self) -> Tensor:
        """The gradient of the layer's input, [T, B, D]."""
        work = self.work
        mask_x, w_ih, x_TBD = work.mask_x, work.layer.w_ih, work.x_TBD
        if not work.amx:
            return input_gradient(self.gates(), w_ih.to(work.compute_dtype), mask_x, work.dtype)
        da_NX = self.memory.flatten(1)
        packed = pack(w_ih, torch.bfloat16, work.gate_count, transposed=True)
        if mask_x is None or mask_x.shape[1] == 1:
            dx_TBD = torch.empty_like(x_TBD)
            gemm(dx_TBD.flatten(0, 1), [(da_NX, packed.flatten(1, 2))])
            return dx_TBD if mask_x is None else dx_TBD.mul_(mask_x[:, 0])
        total_TBD, part_TBD = torch.zeros_like(x_TBD), torch.empty_like(x_TBD)
        for gate in range(work.gate_count):
            gemm(part_TBD.flatten(0, 1), [(da_NX, packed)], first=gate * work.depth, gate=gate)
            total_TBD.addcmul_(part_TBD, mask_x[:, gate])
        return total_TBD


def lstm_forward(h: Tensor, c: Tensor, layer: Layer) -> Tensors:
    work = Pass(layer, 4)
    work.project()
    hs = work.start(h)
    cs = work.start(c)
    y = work.outputs()
    work.allocate_inputs()
    data = work.data
    data.bias = work.pointer(layer.b_ih + layer.b_hh)
    data.weights = work.pointer(pack(layer.w_hh, layer.compute_dtype, 4))
    data.h, data.c, data.y = map(work.pointer, (hs, cs, y))
    work.run("lstm_forward")
    last = (work.layout.last_state(work.states(states)) for states in (hs, cs))
    cells = work.layout.outputs(work.states(cs)) if layer.cells else c.new_empty(0)
    return y, *last, cells, work.memory, hs, cs


def lstm_backward(
    upstream: Sequence[Tensor | None], a: Tensor, hs: Tensor, cs: Tensor, layer: Layer, needs_dx: bool
) -> Tensors:
    dy, dh, dc, dcells = upstream
    work = Pass(layer, 4, a)
    gradients, data = Gradients(work), work.data
    dh, dc = (work.layout.sort(writable(d, s[0])).contiguous() for d, s in ((dh, hs), (dc, cs)))
    data.weights = work.pointer(pack(layer.w_hh, layer.compute_dtype, 4, transposed=True))
    data.h, data.c, data.dh, data.dc = map(work.pointer, (hs, cs, dh, dc))
    data.dy, data.dcells = (work.pointer(d if d is None else d.contiguous()) for d in (dy, dcells))
    work.run("lstm_backward")
    dw_ih, dw_hh = map(empty_contiguous, (layer.w_ih, layer.w_hh))
    gradients.input_weights(dw_ih)
    gradients.recurrent_weights(ALL_LSTM, work.layout.states_before(work.states(hs)), dw_hh)
    db = gradients.bias()[:4].flatten()
    dx = work.layout.unpack(gradients.inputs()) if needs_dx else layer.x.new_empty(0)
    return work.layout.unsort(dh), work.layout.unsort(dc), dx, dw_ih, dw_hh, db, db.clone()


apply_lstm = lstm_operator("native_lstm", lstm_forward, lstm_backward)


def gru_forward(h: Tensor, layer: Layer, reset_after: bool) -> Tensors:
    work = Pass(layer, 3)
    work.project()
    hs = work.start(h)
    y = work.outputs()
    hidden = work.hidden
    work.allocate_inputs()
    data = work.data
    bias = layer.b_ih + layer.b_hh
    inner = h.new_empty(0)
    if reset_after:
        bias[2 * hidden :] = layer.b_ih[2 * hidden :]
        data.bias_n = work.pointer(layer.b_hh[2 * hidden :].contiguous())
        inner = work.zeroed_if_packed(torch.empty_like(hs[1:]))
    data.reset_after, data.bias = reset_after, work.pointer(bias)
    data.weights = work.pointer(pack(layer.w_hh, layer.compute_dtype, 3))
    data.h, data.y, data.inner = map(work.pointer, (hs, y, inner))
    work.run("gru_forward")
    return y, work.layout.last_state(work.states(hs)), work.memory, hs, inner


def gru_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    a: Tensor,
    hs: Tensor,
    inner: Tensor,
    layer: Layer,
    reset_after: bool,
    needs_dx: bool,
) -> Tensors:
    work = Pass(layer, 3, a)
    gradients = Gradients(work)
    data = work.data
    hidden = work.hidden
    if reset_after:
        gradients.allocate_inner()
    dh = work.layout.sort(writable(dh, hs[0])).contiguous()
    data.reset_after = reset_after
    data.weights = work.pointer(pack(layer.w_hh, layer.compute_dtype, 3, transposed=True))
    data.h, data.inner, data.dh = map(work.pointer, (hs, inner, dh))
    data.dy = work.pointer(dy if dy is None else dy.contiguous())
    work.run("gru_backward")
    dw_ih, dw_hh = map(empty_contiguous, (layer.w_ih, layer.w_hh))
    gradients.input_weights(dw_ih)
    before_TBH = work.layout.states_before(work.states(hs))
    gradients.recurrent_weights(R_AND_Z, before_TBH, dw_hh[: 2 * hidden])
    candidate_weights(gradients, before_TBH, dw_hh[2 * hidden :], reset_after)
    sums = gradients.bias()
    db_hh = torch.cat([sums[:2], sums[3:] if reset_after else sums[2:3]]).flatten()
    dx = work.layout.unpack(gradients.inputs()) if needs_dx else layer.x.new_empty(0)
    return work.layout.unsort(dh), dx, dw_ih, dw_hh, sums[:3].flatten(), db_hh


def candidate_weights(gradients: Gradients, before_TBH: Tensor, out: Tensor, reset_after: bool) -> None:
    """Writes the gradient of U_n, whose product has the input r ∘ m ∘ h, or m ∘ h with `reset_after`."""
    work = gradients.work
    mask_n = select_gates(work.mask_h, ONLY_N)
    if not reset_after:
        before_TBH = work.gates.view_GTBR[0] * before_TBH
    (inputs_NH,) = masked_inputs(Gates(before_TBH, 1), slice(0, 1), before_TBH, work.compute_dtype, mask_n)
    if reset_after:
        d_NH = gradients.inner_NH[:, : work.hidden]
    elif gradients.bf16:
        d_NH = gradients.memory[:, 2, : work.hidden]
    else:
        d_NH = gradients.gates().view_GTBR[2].flatten(0, 1)
    if work.amx:
        gemm(out, [(transposed_rows(d_NH), packed_rows(inputs_NH, work.hidden))], transposed=True)
    else:
        mm_into(out, d_NH.T, inputs_NH)


apply_gru = gru_operator("native_gru", gru_forward, gru_backward)


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
) -> Tensors:
    dtype = compute_dtype or x_TBD.dtype
    if weights.norms is not None:
        steps = norm_steps()
        return normed.lstm(x_TBD, h_BH, c_BH, weights, masks, lengths, dtype, cells, steps)
    flat = (weights.w_ih, weights.w_hh, weights.b_ih, weights.b_hh, *masks)
    outputs: Tensors = apply_lstm(h_BH, c_BH, x_TBD, *flat, lengths, dtype, False, cells)
    return outputs[: 4 if cells else 3]


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
        return normed.gru(x_TBD, h_BH, weights, masks, lengths, reset_after, dtype, norm_steps())
    flat = (weights.w_ih, weights.w_hh, weights.b_ih, weights.b_hh, *masks)
    y_TBH, h_BH, *_ = apply_gru(h_BH, x_TBD, *flat, lengths, dtype, False, False, reset_after)
    return y_TBH, h_BH


def norm_steps() -> str:
    """The back end that computes the steps of cells with layer norm: `native`, or `fused` while torch.compile
    compiles, because it traces into these steps.
    """
    return "fused" if torch.compiler.is_compiling() else "native"


@lru_cache(1)
def unavailable_reason() -> str:
    """Why the library cannot be used here; empty where it can. It is compiled and checked once in a
    process.
    """
    try:
        feature_bits()
    except compiler.CompilerError as failure:
        return str(failure)
    for dtype, tolerance in TOLERANCES.items():
        if error := mismatch(partial(self_check, dtype), torch.device("cpu"), tolerance):
            return f"the self-check of the compiled kernels in {dtype} is {error}"
    return ""


def self_check(dtype: torch.dtype, cell: str) -> float:
    """The largest relative error of a cell whose products are in `dtype`."""
    cells: dict[str, Cell] = {"lstm": lstm, "gru": gru}
    return largest_error(cell, partial(cells[cell], compute_dtype=dtype), torch.device("cpu"))
