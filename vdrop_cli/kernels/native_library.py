"""The functions of `native.c` as Python calls them.

This file has the structures of `native.c`, the features of the processor that `native.c` uses, and functions
that pack the sides of products in the order in which `native.c` reads them.

T time  B batch  N rows of all steps  D input size  R rows and C columns of weights  X any size
"""

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vdrop_cli.kernels import compiler
from vdrop_cli.kernels.masks import mask_strides

BLOCK, TILE = 16, 32  # columns of a packed block, and columns of bf16 in a tile of AMX
TILE_BYTES = 1024
FEATURES = {1: "bf16 products", 2: "AMX", 4: "AVX-512", 8: "AVX2", 16: "NEON"}  # by their bits
AMX = 2

SIZE, POINTER = ctypes.c_ssize_t, ctypes.c_void_p


class CMask(ctypes.Structure):
    """`struct mask` of `native.c`."""

    _fields_ = (("data", POINTER), ("t", SIZE), ("g", SIZE), ("b", SIZE))


SIZES = "steps batch hidden depth groups gate_row gate_stride da_row da_stride threads reset_after"
POINTERS_BEFORE = "first places gates bias bias_n"
POINTERS_AFTER = "weights inputs inputs_n h c y inner dy dcells dh dc da da_inner bias_sums"


class CRecurrence(ctypes.Structure):
    """`struct recurrence` of `native.c`."""

    _fields_ = (
        *((name, SIZE) for name in SIZES.split()),
        *((name, POINTER) for name in POINTERS_BEFORE.split()),
        ("mask_h", CMask),
        ("mask_c", CMask),
        *((name, POINTER) for name in POINTERS_AFTER.split()),
    )


class CGemm(ctypes.Structure):
    """`struct gemm` of `native.c`."""

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
    """The number of threads: that of torch, or one where the process was forked after the first call, since
    a fork does not inherit the threads of OpenMP.
    """
    return 1 if FORKED else torch.get_num_threads()


@lru_cache(1)
def feature_bits() -> int:
    bits: int = compiler.library().vdrop_features()
    return bits


def features() -> list[str]:
    """Names of the processor's extensions that the library uses."""
    return [name for bit, name in FEATURES.items() if feature_bits() & bit]


def has_amx() -> bool:
    return bool(feature_bits() & AMX)


def supports(dtype: torch.dtype, compute_dtype: torch.dtype | None) -> bool:
    """Whether kernels exist for a type of the states and one of the products."""
    return (dtype, compute_dtype or dtype) in SUFFIXES


@lru_cache
def function(name: str) -> Any:
    feature_bits()  # requests the use of AMX from the system
    c_function = getattr(compiler.library(), name)
    c_function.restype = None
    return c_function


def call(name: str, *arguments: Any) -> None:
    """Calls a function of the library; a tensor is passed as a pointer, an integer as a size."""

    def as_c(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return POINTER(argument.data_ptr())
        return SIZE(argument) if isinstance(argument, int) else argument

    function(name)(*map(as_c, arguments))


def padded(columns: int, dtype: torch.dtype) -> int:
    """Columns of the left side of a product: those of bf16 fill tiles."""
    return -(-columns // TILE) * TILE if dtype == torch.bfloat16 else columns


def pack(w: Tensor, dtype: torch.dtype, gates: int, *, transposed: bool = False) -> Tensor:
    """Weights [gates·R, C] as the right side of products, in the order in which `native.c` reads them.

    The products are `x_g @ w_g.T`, or with `transposed` `x_g @ w_g`.
    """
    if dtype == torch.bfloat16:
        return pack_bf16(w, gates, transposed=transposed)[0]
    w = w.contiguous()
    rows, columns = w.shape[0] // gates, w.shape[1]
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    strides = (columns, 1) if transposed else (1, columns)
    packed = w.new_empty(-(-outputs // BLOCK), gates, inputs, BLOCK)
    arguments = (w, rows * columns, *strides, gates, inputs, outputs, packed, ctypes.c_int(threads()))
    call(f"vdrop_pack_{SUFFIXES[dtype, dtype]}", *arguments)
    return packed


def pack_bf16(w: Tensor, gates: int, *, transposed: bool = False, rest: bool = False) -> list[Tensor]:
    """As `pack` in bf16; with `rest` also the rounding errors of the weights."""
    w = w.contiguous()
    rows, columns = w.shape[0] // gates, w.shape[1]
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    depth, blocks = padded(inputs, torch.bfloat16), -(-outputs // BLOCK)
    packed = [w.new_empty(blocks, gates, depth, BLOCK, dtype=torch.bfloat16) for _ in range(1 + rest)]
    scratch = w.new_empty(threads(), 64, BLOCK * blocks if transposed else depth, dtype=torch.bfloat16)
    arguments = (w, rows * columns, columns, ctypes.c_int(not transposed), gates, inputs, outputs, depth)
    targets = (packed[0], packed[1] if rest else None, scratch, ctypes.c_int(threads()))
    call("vdrop_pack_bf16", *arguments, *targets)
    return packed


def rounded_rows(x_TBD: Tensor, mask: Tensor | None) -> Tensor:
    """The left side of a product, [T·B, D and zeros]: `x ∘ mask` in bf16, the mask [T|1, B|1, D]."""
    x_TBD = x_TBD.contiguous()
    time, batch, columns = x_TBD.shape
    rounded = x_TBD.new_empty(time * batch, padded(columns, torch.bfloat16), dtype=torch.bfloat16)
    if mask is not None:
        mask = mask.expand(-1, -1, columns).contiguous()
    arguments = (x_TBD, time * batch, columns, mask, *mask_strides(mask, 2), batch)
    call("vdrop_round_rows", *arguments, rounded, None, rounded.shape[1], ctypes.c_int(threads()))
    return rounded


def split_bf16(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to bf16, and their rounding errors in bf16."""
    high, low = (
        x_ND.new_empty(len(x_ND), padded(x_ND.shape[1], torch.bfloat16), dtype=torch.bfloat16)
        for _ in range(2)
    )
    arguments = (x_ND.contiguous(), len(x_ND), x_ND.shape[1], None, 0, 0, 1)
    call("vdrop_round_rows", *arguments, high, low, high.shape[1], ctypes.c_int(threads()))
    return high, low


def packed_rows(x_ND: Tensor, columns: int) -> Tensor:
    """Rows of bf16 as the right side of a product that sums over them."""
    packed = x_ND.new_empty(-(-columns // BLOCK), -(-len(x_ND) // TILE) * TILE, BLOCK)
    call("vdrop_pack_rows", x_ND, x_ND.stride(0), len(x_ND), columns, packed, ctypes.c_int(threads()))
    return packed


def transposed_rows(d_NX: Tensor) -> Tensor:
    """Rows of bf16 as the left side of a product that sums over them: tiles of 16 columns and 32 rows."""
    rows, columns = d_NX.shape
    tiles = d_NX.new_empty(-(-columns // BLOCK), -(-rows // TILE) * TILE, BLOCK)
    call("vdrop_pack_transposed", d_NX, d_NX.stride(0), rows, columns, tiles, ctypes.c_int(threads()))
    return tiles


def gemm(
    out: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
    *,
    add: bool = False,
    first: int = 0,
    gate: int | None = None,
    transposed: bool = False,
) -> None:
    """Computes `out = Σ a @ w`, or with `add` `out += Σ a @ w`, by AMX, for one or more pairs of a and w.

    `a` has rows of bf16, read from column `first` on. With `transposed`, `a` has the tiles of
    `transposed_rows`, read from the same column on. `w` is packed; `gate` chooses one of its gates, None all
    of them.
    """
    rows, columns = out.shape
    (a, w), data = pairs[0], CGemm()
    data.rows = rows
    data.columns = columns
    data.threads = threads()
    data.add = add
    data.pairs = len(pairs)
    depth = w.shape[-2]
    if transposed:
        data.a_row, data.a_tile = 2 * TILE, TILE_BYTES
        data.a_block = a.shape[1] // TILE * TILE_BYTES
        offset = first // BLOCK * data.a_block
    else:
        data.a_row, data.a_tile = 2 * a.stride(0), 2 * TILE
        data.a_block = 2 * BLOCK * a.stride(0)
        offset = 2 * first
    data.tiles, data.w_block = depth // TILE, 2 * w.stride(0)
    for index, (left, right) in enumerate(pairs):
        data.a[index] = left.data_ptr() + offset
        data.w[index] = right.data_ptr() + (0 if gate is None else 2 * gate * w.stride(1))
    data.c, data.c_row = out.data_ptr(), out.stride(0)
    if depth == 0:  # no rows of a batch; the program would write nothing
        if not add:
            out.zero_()
    elif rows and columns:
        function("vdrop_gemm")(ctypes.byref(data))
