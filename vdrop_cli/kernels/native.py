"""The same functions as `reference` on the CPU, compiled from `native.c`: whole recurrences, with their
products and all that lies between.

The products over all steps at once (input projections, gradients of weights and inputs, the head) are
torch's, or on processors with AMX those of `native.c`, whose bf16 products have results in fp32. Sequences of
different lengths are packed (`layout.py`).

T time  B batch  N rows: the steps of all sequences  D input size  H hidden size  G gates (LSTM i f g o; GRU r
z n) K groups of gates: 1, or each for itself  V vocabulary
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vdrop_cli.kernels import compiler, fused
from vdrop_cli.kernels.gates import (
    Gates,
    input_gradient,
    masked_inputs,
    project_inputs,
    some_gates,
    weight_gradient,
)
from vdrop_cli.kernels.layout import Layout
from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.operators import Layer, Tensors, empty_states, gru_operator, lstm_operator, writable
from vdrop_cli.kernels.products import mm_into
from vdrop_cli.kernels.self_check import largest_error

__all__ = ["gru", "linear_cross_entropy", "lstm", "supports", "unavailable_reason"]

CHECKED_TO = 1e-4  # relative error of the self-check
BLOCK, TILE = 16, 32  # columns that are packed together, and columns of bf16 in a tile of AMX
TILE_BYTES = 1024
FEATURES = {1: "bf16 products", 2: "AMX", 4: "AVX-512", 8: "AVX2", 16: "NEON"}  # by their bits
AMX = 2
LOGITS_AT_ONCE = 8_000_000  # elements of the chunk of logits that is held in fp32: 32 MB

SIZE, POINTER = ctypes.c_ssize_t, ctypes.c_void_p


class CMask(ctypes.Structure):
    _fields_ = (("data", POINTER), ("t", SIZE), ("g", SIZE), ("b", SIZE))


class CRecurrence(ctypes.Structure):
    _fields_ = (
        *(
            (name, SIZE)
            for name in (
                "steps",
                "batch",
                "hidden",
                "depth",
                "groups",
                "gate_row",
                "gate_stride",
                "da_row",
                "da_stride",
            )
        ),
        *((name, SIZE) for name in ("threads", "reset_after")),
        *((name, POINTER) for name in ("first", "places", "gates", "bias", "bias_n")),
        ("mask_h", CMask),
        ("mask_c", CMask),
        *(
            (name, POINTER)
            for name in (
                "weights",
                "inputs",
                "inputs_n",
                "h",
                "c",
                "y",
                "inner",
                "dy",
                "dcells",
                "dh",
                "dc",
                "da",
                "da_inner",
            )
        ),
        ("bias_sums", POINTER),
    )


class CGemm(ctypes.Structure):
    _fields_ = (
        *((name, SIZE) for name in ("rows", "columns", "tiles", "threads", "add", "pairs")),
        ("a", POINTER * 3),
        ("w", POINTER * 3),
        *((name, SIZE) for name in ("a_row", "a_tile", "a_block", "w_block")),
        ("c", POINTER),
        ("c_row", SIZE),
    )


SUFFIXES = {
    (torch.float32, torch.float32): "f32",
    (torch.float32, torch.bfloat16): "bf16",
    (torch.float64, torch.float64): "f64",
}
FORKED: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        after_in_child=lambda: FORKED.append(True) if compiler.library.cache_info().currsize else None
    )


def threads() -> int:
    """Those of torch; one where the process was forked after the first call, since the threads of OpenMP are
    not inherited.
    """
    return 1 if FORKED else torch.get_num_threads()


@lru_cache(1)
def feature_bits() -> int:
    found: int = compiler.library().vdrop_features()
    return found


def features() -> list[str]:
    """Names of the processor's extensions that the library uses."""
    return [name for bit, name in FEATURES.items() if feature_bits() & bit]


def has_amx() -> bool:
    return bool(feature_bits() & AMX)


def supports(dtype: torch.dtype, compute_dtype: torch.dtype | None) -> bool:
    """Whether there are kernels for a type of the states and one that products are multiplied in."""
    return (dtype, compute_dtype or dtype) in SUFFIXES


@lru_cache
def function(name: str) -> Any:
    feature_bits()  # which asks the system for the use of AMX
    found = getattr(compiler.library(), name)
    found.restype = None
    return found


def call(name: str, *arguments: Any) -> None:
    """A function of the library; tensors stand for their memory, integers for sizes."""
    function(name)(
        *(
            POINTER(a.data_ptr()) if isinstance(a, Tensor) else SIZE(a) if isinstance(a, int) else a
            for a in arguments
        )
    )


def padded(columns: int, dtype: torch.dtype) -> int:
    """Columns that the left side of a product has: those of bf16 fill tiles."""
    return -(-columns // TILE) * TILE if dtype == torch.bfloat16 else columns


def pack(w: Tensor, dtype: torch.dtype, gates: int, *, transposed: bool = False) -> Tensor:
    """Weights [gates·R, C] as the right side of products, in the order that `native.c` reads them.

    Of `x_g @ w_g.T`, or transposed of `x_g @ w_g`.
    """
    if dtype == torch.bfloat16:
        return pack_bf16(w, gates, transposed=transposed)[0]
    w = w.contiguous()
    rows, columns = w.shape[0] // gates, w.shape[1]
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    strides = (columns, 1) if transposed else (1, columns)
    to = w.new_empty(-(-outputs // BLOCK), gates, inputs, BLOCK)
    call(
        f"vdrop_pack_{SUFFIXES[dtype, dtype]}",
        w,
        rows * columns,
        *strides,
        gates,
        inputs,
        outputs,
        to,
        ctypes.c_int(threads()),
    )
    return to


def pack_bf16(w: Tensor, gates: int, *, transposed: bool = False, rest: bool = False) -> list[Tensor]:
    """Likewise in bf16; with `rest` what rounding loses of the weights, too."""
    w = w.contiguous()
    rows, columns = w.shape[0] // gates, w.shape[1]
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    depth, blocks = padded(inputs, torch.bfloat16), -(-outputs // BLOCK)
    packed = [w.new_empty(blocks, gates, depth, BLOCK, dtype=torch.bfloat16) for _ in range(1 + rest)]
    scratch = w.new_empty(threads(), 64, BLOCK * blocks if transposed else depth, dtype=torch.bfloat16)
    given = (w, rows * columns, columns, ctypes.c_int(not transposed), gates, inputs, outputs, depth)
    call("vdrop_pack_bf16", *given, packed[0], packed[1] if rest else None, scratch, ctypes.c_int(threads()))
    return packed


def rounded_rows(x_TBD: Tensor, mask: Tensor | None) -> Tensor:
    """The left side of a product, [T·B, D and zeros]: `x ∘ mask` in bf16, the mask [T|1, B|1, D]."""
    x_TBD = x_TBD.contiguous()
    time, batch, columns = x_TBD.shape
    to = x_TBD.new_empty(time * batch, padded(columns, torch.bfloat16), dtype=torch.bfloat16)
    pointer, mask_t, mask_b = None, 0, 0
    if mask is not None:
        mask = mask.expand(-1, -1, columns).contiguous()
        pointer, mask_t, mask_b = mask, *(mask.stride(d) if mask.shape[d] > 1 else 0 for d in (0, 1))
    given = (x_TBD, time * batch, columns, pointer, mask_t, mask_b, batch)
    call("vdrop_round_rows", *given, to, None, to.shape[1], ctypes.c_int(threads()))
    return to


def halves(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to bf16, and what that loses of them, likewise."""
    high, low = (
        x_ND.new_empty(len(x_ND), padded(x_ND.shape[1], torch.bfloat16), dtype=torch.bfloat16)
        for _ in range(2)
    )
    given = (x_ND.contiguous(), len(x_ND), x_ND.shape[1], None, 0, 0, 1)
    call("vdrop_round_rows", *given, high, low, high.shape[1], ctypes.c_int(threads()))
    return high, low


def packed_rows(x_ND: Tensor, columns: int) -> Tensor:
    """Rows of bf16 as the right side of a product that sums over them."""
    to = x_ND.new_empty(-(-columns // BLOCK), -(-len(x_ND) // TILE) * TILE, BLOCK)
    call("vdrop_pack_rows", x_ND, x_ND.stride(0), len(x_ND), columns, to, ctypes.c_int(threads()))
    return to


def transposed_rows(d_NX: Tensor) -> Tensor:
    """Rows of bf16 as the left side of a product that sums over them: tiles of 16 columns and 32 rows."""
    to = d_NX.new_empty(-(-d_NX.shape[1] // BLOCK), -(-len(d_NX) // TILE) * TILE, BLOCK)
    call("vdrop_pack_transposed", d_NX, d_NX.stride(0), len(d_NX), d_NX.shape[1], to, ctypes.c_int(threads()))
    return to


def gemm(
    out: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
    *,
    add: bool = False,
    first: int = 0,
    gate: int | None = None,
    transposed: bool = False,
) -> None:
    """`out (+)= Σ a @ w` by AMX, for one or more pairs.

    `a` is rows of bf16 from column `first` on, or transposed tiles from there on; `w` is packed, all or one
    of its gates.
    """
    rows, columns = out.shape
    (a, w), data = pairs[0], CGemm()
    data.rows, data.columns, data.threads, data.add, data.pairs = rows, columns, threads(), add, len(pairs)
    depth = w.shape[-2]
    if transposed:
        data.a_row, data.a_tile, data.a_block = 2 * TILE, TILE_BYTES, a.shape[1] // TILE * TILE_BYTES
        skipped = first // BLOCK * data.a_block
    else:
        data.a_row, data.a_tile, data.a_block, skipped = (
            2 * a.stride(0),
            2 * TILE,
            2 * BLOCK * a.stride(0),
            2 * first,
        )
    data.tiles, data.w_block = depth // TILE, 2 * w.stride(0)
    for index, (left, right) in enumerate(pairs):
        data.a[index] = left.data_ptr() + skipped
        data.w[index] = right.data_ptr() + (0 if gate is None else 2 * gate * w.stride(1))
    data.c, data.c_row = out.data_ptr(), out.stride(0)
    if rows and columns:
        function("vdrop_gemm")(ctypes.byref(data))


class Work:
    """One layer's sequences as the library reads them, forward or backward.

    Rows are the steps of all sequences, packed where they end at different steps. The states of all steps, [T
    + 1, B, H], begin with those of the start; memory for gates and states is that of sequences of full
    length, of which packed ones fill the beginning.
    """

    def __init__(self, layer: Layer, gates: int, memory: Tensor | None = None) -> None:
        self.layer, self.gates_number, self.layout = layer, gates, Layout.of(layer.x, layer.lengths)
        self.dtype, self.compute_dtype, self.hidden = layer.x.dtype, layer.compute_dtype, layer.w_hh.shape[1]
        self.suffix = SUFFIXES[self.dtype, self.compute_dtype]
        self.amx = self.compute_dtype == torch.bfloat16 and has_amx()
        self.memory = self.whole(layer.gates().memory) if memory is None else memory
        self.gates = Gates(self.layout.within(self.memory, -2), gates)
        self.x_TBD = self.layout.pack(layer.x).contiguous()
        self.rows = self.gates.time * self.gates.batch
        self.depth = padded(self.hidden, self.compute_dtype)
        self.held: list[Tensor] = []  # tensors that the library reads
        data = self.data = CRecurrence()
        data.steps, data.batch, data.hidden, data.depth = (
            self.layout.time,
            layer.x.shape[1],
            self.hidden,
            self.depth,
        )
        data.threads = threads()
        data.first = self.pointer(torch.tensor(self.layout.row_starts, dtype=torch.int64))
        data.places = self.pointer(self.layout.row_places)
        data.gates = self.pointer(self.gates.memory)
        data.gate_stride, _, data.gate_row, _ = self.gates.view_GTBH.stride()
        if self.layout.is_packed:  # rows are the steps of batches of one
            data.gate_row = self.gates.view_GTBH.stride(1)
        mask_h, mask_c = self.layout.mask_of_steps(layer.mask_h), self.layout.mask_of_steps(layer.mask_c)
        data.mask_h = self.mask(mask_h)
        data.mask_c = self.mask(None if mask_c is None else mask_c[:, None])
        data.groups = 1 if mask_h is None else mask_h.shape[1]

    def pointer(self, tensor: Tensor | None) -> int | None:
        """Where a tensor lies, which is held as long as this object."""
        if tensor is None or tensor.numel() == 0:
            return None
        self.held.append(tensor)
        return tensor.data_ptr()

    def mask(self, mask_TKBH: Tensor | None) -> CMask:
        if mask_TKBH is None:
            return CMask()
        mask_TKBH = mask_TKBH.expand(-1, -1, -1, self.hidden).contiguous()
        return CMask(
            self.pointer(mask_TKBH), *(mask_TKBH.stride(d) if mask_TKBH.shape[d] > 1 else 0 for d in range(3))
        )

    def whole(self, memory: Tensor) -> Tensor:
        """Memory of which every element is written: zeros where packed sequences fill only a part."""
        return memory.zero_() if self.layout.is_packed else memory

    def states(self, memory_TBH: Tensor) -> Tensor:
        """States as the layout has them."""
        return self.layout.within(memory_TBH, -2, start=True)

    def start(self, state_BH: Tensor) -> Tensor:
        """Memory for the states of all steps, that of the start filled in."""
        memory_TBH = self.whole(empty_states(state_BH, self.layer.x.shape[0]))
        memory_TBH[0] = self.layout.sort(state_BH)
        return memory_TBH

    def outputs(self) -> Tensor:
        """Memory for the outputs, zero where no step is."""
        return self.whole(self.layer.x.new_empty(*self.layer.x.shape[:2], self.hidden))

    def project(self) -> None:
        """Fills the gates with `W (m_x ∘ x)`."""
        mask_x, w_ih = self.layout.mask_of_all(self.layer.mask_x), self.layer.w_ih
        if not self.amx:
            project_inputs(self.gates, self.x_TBD, w_ih.to(self.compute_dtype), None, mask_x)
            return
        for group, rows_ND in self.inputs_by_group(mask_x):
            gemm(self.gates.matrix(group), [(rows_ND, pack(w_ih[self.gates.rows(group)], torch.bfloat16, 1))])

    def inputs_by_group(self, mask_x: Tensor | None) -> list[tuple[slice, Tensor]]:
        """Each group of gates with what enters its input product, in bf16."""
        return self.rounded_by_group(self.x_TBD, mask_x, slice(0, self.gates_number))

    def rounded_by_group(self, x_TBX: Tensor, mask: Tensor | None, part: slice) -> list[tuple[slice, Tensor]]:
        """Each group of the gates of `part` with `m ∘ x` in bf16; where all gates have the same, it is made
        once.
        """
        if mask is None or mask.shape[1] == 1:
            rows_NX = rounded_rows(x_TBX, None if mask is None else mask[:, 0])
            return [(group, rows_NX) for group in self.gates.groups(part)]
        return [(group, rounded_rows(x_TBX, mask[:, group.start])) for group in self.gates.groups(part)]

    def run(self, name: str) -> None:
        if self.rows:
            function(f"vdrop_{name}_{self.suffix}")(ctypes.byref(self.data))

    def inputs_memory(self) -> None:
        """What enters the recurrent products of a step and of the next."""
        batch, zeros = self.layer.x.shape[1], self.layer.x.new_zeros
        self.data.inputs = self.pointer(
            zeros(2, self.data.groups, batch, self.depth, dtype=self.compute_dtype)
        )
        self.data.inputs_n = self.pointer(zeros(batch, self.depth, dtype=self.compute_dtype))


class Gradients:
    """The gradients of the gates of all rows, in the type that is multiplied in, and the products with them.

    Of bf16 they are [N, G, H and zeros]; of other types they lie as the gates do.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.bf16 = work, work.compute_dtype == torch.bfloat16
        gates, like = work.gates_number, work.layer.x
        if self.bf16:
            self.memory = like.new_empty(work.rows, gates, work.depth, dtype=torch.bfloat16)
            self.memory[..., work.hidden :] = 0
            work.data.da_row, work.data.da_stride = self.memory.stride()[:2]
            self.as_gates = None
        else:
            self.as_gates = work.gates.another()
            self.memory = self.as_gates.memory
            stride, steps, rows, _ = self.as_gates.view_GTBH.stride()
            work.data.da_row, work.data.da_stride = (steps if work.layout.is_packed else rows), stride
        work.data.da = work.pointer(self.memory)
        self.inner_NH = like.new_empty(0)
        self.bias_sums = like.new_zeros(work.data.threads, gates + 1, work.hidden)
        work.data.bias_sums = work.pointer(self.bias_sums)
        self.transposed: Tensor | None = None

    def with_inner(self) -> None:
        """Memory for the gradient of the candidate's recurrent product."""
        work = self.work
        self.inner_NH = work.layer.x.new_zeros(work.rows, work.depth, dtype=work.compute_dtype)
        work.data.da_inner = work.pointer(self.inner_NH)

    def bias(self) -> Tensor:
        """[G + 1, H]"""
        return self.bias_sums.sum(0)

    def gates(self) -> Gates:
        """As torch multiplies them."""
        if self.as_gates is None:
            work = self.work
            low = work.gates.another(torch.bfloat16)
            low.view_GTBH.copy_(self.memory[..., : work.hidden].permute(1, 0, 2).view_as(low.view_GTBH))
            self.as_gates = low
        return self.as_gates

    def weights(self, part: slice, inputs: list[tuple[slice, Tensor]], out: Tensor) -> None:
        """Writes `daᵀ x` of the gates of `part`, by AMX; the inputs are those of groups of gates."""
        if self.transposed is None:
            self.transposed = transposed_rows(self.memory.flatten(1))
        last_NX, right = None, out
        for group, rows_NX in inputs:
            if rows_NX is not last_NX:  # gates without masks of their own share their inputs
                last_NX, right = rows_NX, packed_rows(rows_NX, out.shape[1])
            for gate in range(group.start, group.stop):
                rows = slice(
                    (gate - part.start) * self.work.hidden, (gate - part.start + 1) * self.work.hidden
                )
                gemm(out[rows], [(self.transposed, right)], first=gate * self.work.depth, transposed=True)

    def input_weights(self, out: Tensor) -> None:
        work = self.work
        every, mask_x = slice(0, work.gates_number), work.layout.mask_of_all(work.layer.mask_x)
        if work.amx:
            self.weights(every, work.inputs_by_group(mask_x), out)
        else:
            inputs_ND = masked_inputs(work.gates, every, work.x_TBD, work.compute_dtype, mask_x)
            weight_gradient(self.gates(), every, inputs_ND, out)

    def recurrent_weights(self, part: slice, before_TBH: Tensor, out: Tensor) -> None:
        """Of some gates, which the masked states before each step entered."""
        work = self.work
        mask_h = work.layout.mask_of_all(work.layer.mask_h)
        if work.amx:
            self.weights(part, work.rounded_by_group(before_TBH, mask_h, part), out)
        else:
            inputs_NH = masked_inputs(work.gates, part, before_TBH, work.compute_dtype, mask_h)
            weight_gradient(self.gates(), part, inputs_NH, out)

    def inputs(self) -> Tensor:
        """That of the layer's input, [T, B, D]."""
        work = self.work
        mask_x, w_ih, x_TBD = work.layout.mask_of_all(work.layer.mask_x), work.layer.w_ih, work.x_TBD
        if not work.amx:
            return input_gradient(self.gates(), w_ih.to(work.compute_dtype), mask_x, work.dtype)
        da_NX = self.memory.flatten(1)
        if mask_x is None or mask_x.shape[1] == 1:
            dx_TBD = torch.empty_like(x_TBD)
            gemm(
                dx_TBD.flatten(0, 1),
                [(da_NX, pack(w_ih, torch.bfloat16, work.gates_number, transposed=True).flatten(1, 2))],
            )
            return dx_TBD if mask_x is None else dx_TBD.mul_(mask_x[:, 0])
        total_TBD, part_TBD = torch.zeros_like(x_TBD), torch.empty_like(x_TBD)
        packed = pack(w_ih, torch.bfloat16, work.gates_number, transposed=True)
        for gate in range(work.gates_number):
            gemm(part_TBD.flatten(0, 1), [(da_NX, packed)], first=gate * work.depth, gate=gate)
            total_TBD.addcmul_(part_TBD, mask_x[:, gate])
        return total_TBD


def lstm_forward(h: Tensor, c: Tensor, layer: Layer) -> Tensors:
    work = Work(layer, 4)
    work.project()
    hs, cs, y = work.start(h), work.start(c), work.outputs()
    work.inputs_memory()
    data = work.data
    data.bias, data.weights = (
        work.pointer(layer.b_ih + layer.b_hh),
        work.pointer(pack(layer.w_hh, layer.compute_dtype, 4)),
    )
    data.h, data.c, data.y = map(work.pointer, (hs, cs, y))
    work.run("lstm_forward")
    last = (work.layout.last(work.states(states)) for states in (hs, cs))
    cells = work.layout.outputs(work.states(cs)) if layer.cells else c.new_empty(0)
    return y, *last, cells, work.memory, hs, cs


def lstm_backward(
    upstream: Sequence[Tensor | None], a: Tensor, hs: Tensor, cs: Tensor, layer: Layer
) -> Tensors:
    dy, dh, dc, dcells = upstream
    work = Work(layer, 4, a)
    gradients, data = Gradients(work), work.data
    dh, dc = (work.layout.sort(writable(d, s[0])).contiguous() for d, s in ((dh, hs), (dc, cs)))
    data.weights = work.pointer(pack(layer.w_hh, layer.compute_dtype, 4, transposed=True))
    data.h, data.c, data.dh, data.dc = map(work.pointer, (hs, cs, dh, dc))
    data.dy, data.dcells = (work.pointer(d if d is None else d.contiguous()) for d in (dy, dcells))
    work.run("lstm_backward")
    every, dw_ih, dw_hh = slice(0, 4), torch.empty_like(layer.w_ih), torch.empty_like(layer.w_hh)
    gradients.input_weights(dw_ih)
    gradients.recurrent_weights(every, work.layout.before(work.states(hs)), dw_hh)
    db = gradients.bias()[:4].flatten()
    dx = work.layout.unpack(gradients.inputs())
    return work.layout.unsort(dh), work.layout.unsort(dc), dx, dw_ih, dw_hh, db, db.clone()


apply_lstm = lstm_operator("native_lstm", lstm_forward, lstm_backward)
R_AND_Z, ONLY_N = slice(0, 2), slice(2, 3)


def gru_forward(h: Tensor, layer: Layer, reset_after: bool) -> Tensors:
    work = Work(layer, 3)
    work.project()
    hs, y, hidden = work.start(h), work.outputs(), work.hidden
    work.inputs_memory()
    data, bias, inner = work.data, layer.b_ih + layer.b_hh, h.new_empty(0)
    if reset_after:
        bias[2 * hidden :] = layer.b_ih[2 * hidden :]
        data.bias_n = work.pointer(layer.b_hh[2 * hidden :].contiguous())
        inner = work.whole(torch.empty_like(hs[1:]))
    data.reset_after, data.bias, data.weights = (
        reset_after,
        work.pointer(bias),
        work.pointer(pack(layer.w_hh, layer.compute_dtype, 3)),
    )
    data.h, data.y, data.inner = map(work.pointer, (hs, y, inner))
    work.run("gru_forward")
    return y, work.layout.last(work.states(hs)), work.memory, hs, inner


def gru_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    a: Tensor,
    hs: Tensor,
    inner: Tensor,
    layer: Layer,
    reset_after: bool,
) -> Tensors:
    work = Work(layer, 3, a)
    gradients, data, hidden = Gradients(work), work.data, work.hidden
    if reset_after:
        gradients.with_inner()
    dh = work.layout.sort(writable(dh, hs[0])).contiguous()
    data.reset_after, data.weights = (
        reset_after,
        work.pointer(pack(layer.w_hh, layer.compute_dtype, 3, transposed=True)),
    )
    data.h, data.inner, data.dh = map(work.pointer, (hs, inner, dh))
    data.dy = work.pointer(dy if dy is None else dy.contiguous())
    work.run("gru_backward")
    dw_ih, dw_hh = torch.empty_like(layer.w_ih), torch.empty_like(layer.w_hh)
    gradients.input_weights(dw_ih)
    before_TBH = work.layout.before(work.states(hs))
    gradients.recurrent_weights(R_AND_Z, before_TBH, dw_hh[: 2 * hidden])
    candidate_weights(gradients, before_TBH, dw_hh[2 * hidden :], reset_after)
    sums = gradients.bias()
    db_hh = torch.cat([sums[:2], sums[3:] if reset_after else sums[2:3]]).flatten()
    return (
        work.layout.unsort(dh),
        work.layout.unpack(gradients.inputs()),
        dw_ih,
        dw_hh,
        sums[:3].flatten(),
        db_hh,
    )


def candidate_weights(gradients: Gradients, before_TBH: Tensor, out: Tensor, reset_after: bool) -> None:
    """The gradient of U_n: of what entered its product, r ∘ m ∘ h or m ∘ h."""
    work = gradients.work
    mask_n = some_gates(work.layout.mask_of_all(work.layer.mask_h), ONLY_N)
    if not reset_after:
        before_TBH = work.gates.view_GTBH[0] * before_TBH
    (inputs_NH,) = masked_inputs(Gates(before_TBH, 1), slice(0, 1), before_TBH, work.compute_dtype, mask_n)
    if reset_after:
        d_NH = gradients.inner_NH[:, : work.hidden]
    else:
        d_NH = (
            gradients.memory[:, 2, : work.hidden]
            if gradients.bf16
            else gradients.gates().view_GTBH[2].flatten(0, 1)
        )
    if work.amx:
        gemm(out, [(transposed_rows(d_NH), packed_rows(inputs_NH, work.hidden))], transposed=True)
    else:
        mm_into(out, d_NH.T, inputs_NH)


apply_gru = gru_operator("native_gru", gru_forward, gru_backward)


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
) -> Tensors:
    options = (compute_dtype or x_TBD.dtype, False, cells)
    outputs: Tensors = apply_lstm(h_BH, c_BH, x_TBD, w_ih, w_hh, b_ih, b_hh, *masks, lengths, *options)
    return outputs[: 4 if cells else 3]


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
    dtype = compute_dtype or x_TBD.dtype
    y_TBH, h_BH, *_ = apply_gru(
        h_BH, x_TBD, w_ih, w_hh, b_ih, b_hh, *masks, lengths, dtype, False, False, reset_after
    )
    return y_TBH, h_BH


def logits_by_halves(out_MV: Tensor, x_high: Tensor, x_low: Tensor, w_high: Tensor, w_low: Tensor) -> None:
    """`x Wᵀ` by AMX: three products of bf16 that together err no more than numbers of 16 bits."""
    gemm(out_MV, [(x_high, w_high), (x_low, w_high), (x_high, w_low)])


def softmax(
    logits_MV: Tensor,
    b_V: Tensor,
    targets_M: Tensor,
    dnll_M: Tensor | None,
    nll_M: Tensor,
    d_MV: Tensor | None,
    sums: Tensor,
) -> None:
    dtype = logits_MV.dtype if d_MV is None else d_MV.dtype
    rows, words = logits_MV.shape
    given = (
        logits_MV,
        rows,
        words,
        b_V,
        targets_M,
        dnll_M,
        nll_M,
        d_MV,
        0 if d_MV is None else d_MV.stride(0),
        sums,
    )
    call(f"vdrop_softmax_{SUFFIXES[logits_MV.dtype, dtype]}", *given, ctypes.c_int(len(sums)))


def head(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    targets_N: Tensor,
    dnll_N: Tensor | None,
    compute_dtype: torch.dtype,
    needs_gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Negative log-likelihood of each token, and the gradients of x, w and b where they are needed (`dnll_N`
    None: all ones).
    """
    x_ND, w_VD, b_V, targets_N = (tensor.contiguous() for tensor in (x_ND, w_VD, b_V, targets_N))
    (tokens, _), words = x_ND.shape, len(b_V)
    outside = (targets_N < 0) | (targets_N >= words)
    if bool(outside.any()):
        raise IndexError(f"target {int(targets_N[outside][0])} is out of bounds: there are {words} words")
    bf16 = compute_dtype == torch.bfloat16
    amx = bf16 and has_amx()
    nll_N, sums = x_ND.new_empty(tokens), x_ND.new_zeros(threads(), words)
    packed = [weights.flatten(1, 2) for weights in pack_bf16(w_VD, 1, rest=True)] if amx else []
    gradients = [torch.empty_like(x_ND), torch.empty_like(w_VD)] if needs_gradients else []
    w_low_VD = w_VD if amx else w_VD.to(compute_dtype)
    w_back = (
        pack(w_VD, torch.bfloat16, 1, transposed=True).flatten(1, 2) if amx and needs_gradients else w_low_VD
    )
    rows_at_once = max(1, LOGITS_AT_ONCE // words)
    logits_MV = x_ND.new_empty(min(rows_at_once, tokens), words)
    low_MV = (
        x_ND.new_empty(len(logits_MV), padded(words, compute_dtype) if amx else words, dtype=torch.bfloat16)
        if bf16
        else logits_MV
    )
    for part in fused.chunks(tokens, rows_at_once):
        x_MD = x_ND[part]
        logits, d_MV = logits_MV[: len(x_MD)], low_MV[: len(x_MD)]
        if amx:
            x_high, x_low = halves(x_MD)
            logits_by_halves(logits, x_high, x_low, *packed)
        else:
            torch.mm(x_MD, w_VD.T, out=logits)
        dnll_M = None if dnll_N is None else dnll_N[part].contiguous()
        softmax(logits, b_V, targets_N[part], dnll_M, nll_N[part], d_MV if needs_gradients else None, sums)
        if not needs_gradients:
            continue
        dx_ND, dw_VD = gradients
        if amx:
            gemm(dx_ND[part], [(d_MV, w_back)])
            gemm(
                dw_VD,
                [(transposed_rows(d_MV), packed_rows(x_high, x_MD.shape[1]))],
                add=part.start > 0,
                transposed=True,
            )
        else:
            mm_into(dx_ND[part], d_MV, w_low_VD)
            mm_into(dw_VD, d_MV.T, x_MD.to(compute_dtype), add=part.start > 0)
    return nll_N, [*gradients, sums.sum(0)] if needs_gradients else []


def loss_and_gradients(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    targets_N: Tensor,
    dnll_N: Tensor | None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    return head(x_ND, w_VD, b_V, targets_N, dnll_N, compute_dtype, needs_gradients=True)


class LinearCrossEntropy(torch.autograd.Function):
    """As that of `fused`, with the softmax, its gradient, rounding and the gradient of the bias in passes of
    their own.
    """

    @staticmethod
    @fused.without_autocast
    def forward(
        ctx: Any, x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor, compute_dtype: torch.dtype
    ) -> Tensor:
        return fused.head_forward(
            ctx, loss_and_gradients, x_ND, w_VD, b_V, targets_N, compute_dtype=compute_dtype
        )

    @staticmethod
    @fused.without_autocast
    def backward(ctx: Any, dnll_N: Tensor) -> tuple[Tensor | None, ...]:
        return fused.head_backward(ctx, loss_and_gradients, dnll_N)


def linear_cross_entropy(
    x_ND: Tensor, w_VD: Tensor, b_V: Tensor, targets_N: Tensor, compute_dtype: torch.dtype | None = None
) -> Tensor:
    if torch.compiler.is_compiling():
        return fused.linear_cross_entropy(x_ND, w_VD, b_V, targets_N, compute_dtype)
    with torch.autocast(x_ND.device.type, enabled=False):  # it would round the logits
        x_ND = x_ND.to(w_VD.dtype)
        dtype = compute_dtype or x_ND.dtype
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, w_VD, b_V)):
            nll_N: Tensor = LinearCrossEntropy.apply(x_ND, w_VD, b_V, targets_N, dtype)  # type: ignore[no-untyped-call]
            return nll_N
        return head(x_ND, w_VD, b_V, targets_N, None, dtype, needs_gradients=False)[0]


@lru_cache(1)
def unavailable_reason() -> str:
    """Why the library cannot be used here; empty where it can. It is compiled and checked once in a
    process.
    """
    device = torch.device("cpu")
    try:
        feature_bits()
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):  # whatever the caller is in
            errors = [largest_error(cell, FUNCTIONS[cell], device) for cell in FUNCTIONS]
    except compiler.CompilerError as error:
        return str(error)
    too_large = [error for error in errors if not error < CHECKED_TO]  # or not a number
    return f"the self-check of the compiled kernels is off by {too_large[0]:.1g}" if too_large else ""


FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"lstm": lstm, "gru": gru}
