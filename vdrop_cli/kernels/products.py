"""Many small products with the same weights: the weights are brought once into the order that they are read
fastest in.

G gates  M rows  K inputs  N outputs
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor


@lru_cache
def packs() -> bool:
    """Whether oneDNN's packed bf16 weights are there and give what they should: torch does not promise these
    operators.
    """
    try:
        x, w = (torch.linspace(-1, 1, rows * 64).sin().view(rows, 64).bfloat16() for rows in (20, 48))
        return torch.allclose(packed_product(x, pack(w, 20)).float(), (x @ w.T).float(), rtol=0.05, atol=0.05)
    except (AttributeError, RuntimeError):
        return False


def pack(w_NK: Tensor, rows: int) -> Tensor:
    if not w_NK.is_contiguous():
        w_NK = torch.cat(w_NK.chunk(4, 1), 1)  # `contiguous` would work on one processor alone
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight.default(w_NK, rows)
    return packed


def packed_product(x_MK: Tensor, packed: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_MK, packed, None, "none", [], "")
    return product


class Weights:
    """A matrix [N, K] for products `x @ w.T` of about `rows` rows each.

    On the CPU, bf16 weights are packed, and fp32 weights transposed: that makes [20, 650] × [650, 2600]
    faster by 2.0 and 1.6. What is transposed already is packed only where it is large: before, it has to be
    brought back, which takes as long as is won.
    """

    TRANSPOSED_FROM = 4_000_000  # elements

    def __init__(self, w_NK: Tensor, rows: int) -> None:
        on_cpu = w_NK.device.type == "cpu"
        worthwhile = w_NK.is_contiguous() or w_NK.numel() >= self.TRANSPOSED_FROM
        self.packed = (
            pack(w_NK, rows) if on_cpu and w_NK.dtype == torch.bfloat16 and worthwhile and packs() else None
        )
        self.w_KN = w_NK.T.contiguous() if on_cpu and self.packed is None else w_NK.T

    def product(self, x_MK: Tensor) -> Tensor:
        return x_MK @ self.w_KN if self.packed is None else packed_product(x_MK, self.packed)

    def add_product(self, out_MN: Tensor, x_MK: Tensor) -> None:
        """`out += x @ w.T`, where the product may be of a lower precision than `out`."""
        if x_MK.dtype == out_MN.dtype:
            out_MN.addmm_(x_MK, self.w_KN)
        else:
            out_MN.add_(self.product(x_MK))


class WeightsByGate:
    """Matrices [G, N, K] of as many gates, for products `x_g @ w_g.T` of about `rows` rows each.

    Small ones are multiplied in one call; large ones packed one by one, which makes four of [20, 1500] ×
    [1500, 1500] faster by 1.9.
    """

    PACKED_FROM = 1_000_000  # elements of a matrix

    def __init__(self, w_GNK: Tensor, rows: int) -> None:
        packed = (
            w_GNK.device.type == "cpu"
            and w_GNK.dtype == torch.bfloat16
            and w_GNK[0].numel() >= self.PACKED_FROM
            and packs()
        )
        self.packed = [pack(w_NK, rows) for w_NK in w_GNK] if packed else None
        self.w_GKN = w_GNK.mT if w_GNK.dtype == torch.bfloat16 else w_GNK.mT.contiguous()

    def product(self, x_GMK: Tensor) -> Tensor:
        if self.packed is None:
            return torch.bmm(x_GMK, self.w_GKN)
        return torch.stack(
            [packed_product(x_MK, packed) for x_MK, packed in zip(x_GMK, self.packed, strict=True)]
        )

    def add_product(self, out_GMN: Tensor, x_GMK: Tensor) -> None:
        """`out += x @ w.T`, where the product may be of a lower precision than `out`."""
        if x_GMK.dtype == out_GMN.dtype:
            out_GMN.baddbmm_(x_GMK, self.w_GKN)
        else:
            out_GMN.add_(self.product(x_GMK))


def mm_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """`out (+)= a @ b` for matrices, where `a` and `b` may be of a lower precision than `out`."""
    if a.dtype != out.dtype:
        out.add_(a @ b) if add else out.copy_(a @ b)
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


class FullPrecisionSums:
    """While any thread is in it, cuBLAS sums products of bf16 and fp16 in fp32 only; then the user's settings
    are restored.

    The settings are of the process: the first thread in changes them, the last one out restores them.
    """

    SETTINGS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")

    def __init__(self) -> None:
        self.lock, self.inside, self.before = Lock(), 0, list[Any]()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        matmul = torch.backends.cuda.matmul
        with self.lock:
            if self.inside == 0:
                self.before = [getattr(matmul, name) for name in self.SETTINGS]
                for name, before in zip(self.SETTINGS, self.before, strict=True):
                    if before:  # where it is off, a user may have forbidden to split sums, too
                        setattr(matmul, name, False)
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if self.inside == 0:
                    for name, before in zip(self.SETTINGS, self.before, strict=True):
                        if before:
                            setattr(matmul, name, before)


full_precision_sums = FullPrecisionSums()


def exact_sums(device_type: str) -> AbstractContextManager[None]:
    """For products on a device: on a GPU `full_precision_sums`; torch.compile cannot trace it, and the user's
    settings hold there.
    """
    return (
        full_precision_sums()
        if device_type == "cuda" and not torch.compiler.is_compiling()
        else nullcontext()
    )
