"""Matrix products: many small ones with the same weights, and bf16 on processors that do not multiply it.

For many small products, the weights are first packed or transposed, so that they are read fast.

G gates  M rows  K inputs  N outputs
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor


def can_pack() -> bool:
    """Whether oneDNN packs bf16 weights here. Tracers and other dispatch modes cannot see these operators."""
    is_plain = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0
    return is_plain and onednn_packs_bf16()


@lru_cache
def onednn_packs_bf16() -> bool:
    """Whether oneDNN's packed bf16 weights work in this build of torch, which does not promise their
    operators.
    """
    try:
        x, w = (
            torch.linspace(-1, 1, rows * 64, device="cpu").sin().view(rows, 64).bfloat16()
            for rows in (20, 48)
        )
        return torch.allclose(packed_product(x, pack(w, 20)).float(), (x @ w.T).float(), rtol=0.05, atol=0.05)
    except (AttributeError, RuntimeError):
        return False


@lru_cache
def onednn_multiplies_bf16() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this processor: with AVX-512 or instructions for bf16. Elsewhere
    torch has slow loops.
    """
    return onednn_multiplies_bf16()


def operand(x: Tensor) -> Tensor:
    """One side of a product: bf16 becomes fp32 where the processor does not multiply bf16.

    Products of two numbers of bf16 are exact in fp32. The result is their sum in fp32, which is not rounded
    to bf16.
    """
    is_slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not multiplies_bf16()
    return x.float() if is_slow else x


def pack(w_NK: Tensor, rows: int) -> Tensor:
    if not w_NK.is_contiguous():
        w_NK = torch.cat(w_NK.chunk(4, 1), 1)  # `contiguous` would use one processor only
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight.default(w_NK, rows)
    return packed


def packed_product(x_MK: Tensor, packed: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_MK, packed, None, "none", [], "")
    return product


class WeightMatrix:
    """A matrix [N, K] for products `x @ w.T` of about `rows` rows each.

    On the CPU, bf16 weights are packed, and fp32 weights are copied in transposed order. That makes [20, 650]
    × [650, 2600] faster, by factors of 2.0 and 1.6 in a measurement without a record. A transposed view must
    be copied before it can be packed. The copy takes as long as packing saves, unless the view is large. So
    only large views are packed.
    """

    TRANSPOSED_FROM = 4_000_000  # elements

    def __init__(self, w_NK: Tensor, rows: int) -> None:
        w_NK = operand(w_NK)
        on_cpu = w_NK.device.type == "cpu"
        is_worthwhile = w_NK.is_contiguous() or w_NK.numel() >= self.TRANSPOSED_FROM
        should_pack = on_cpu and w_NK.dtype == torch.bfloat16 and is_worthwhile and can_pack()
        self.packed = pack(w_NK, rows) if should_pack else None
        self.w_KN = w_NK.T.contiguous() if on_cpu and self.packed is None else w_NK.T

    def product(self, x_MK: Tensor) -> Tensor:
        return operand(x_MK) @ self.w_KN if self.packed is None else packed_product(x_MK, self.packed)

    def add_product(self, out_MN: Tensor, x_MK: Tensor) -> None:
        """`out += x @ w.T`, where the product may be of a lower precision than `out`."""
        x_MK = operand(x_MK)
        if x_MK.dtype == out_MN.dtype:
            out_MN.addmm_(x_MK, self.w_KN)
        else:
            out_MN.add_(self.product(x_MK))


class WeightMatrices:
    """The matrices [G, N, K] of G gates, for products `x_g @ w_g.T` of about `rows` rows each.

    Small ones are multiplied in one call; large ones packed one by one, which makes four of [20, 1500] ×
    [1500, 1500] faster by 1.9.
    """

    PACKED_FROM = 1_000_000  # elements of a matrix

    def __init__(self, w_GNK: Tensor, rows: int) -> None:
        w_GNK = operand(w_GNK)
        should_pack = (
            w_GNK.device.type == "cpu"
            and w_GNK.dtype == torch.bfloat16
            and w_GNK[0].numel() >= self.PACKED_FROM
            and can_pack()
        )
        self.packed = [pack(w_NK, rows) for w_NK in w_GNK] if should_pack else None
        self.w_GKN = w_GNK.mT if w_GNK.dtype == torch.bfloat16 else w_GNK.mT.contiguous()

    def product(self, x_GMK: Tensor) -> Tensor:
        if self.packed is None:
            return torch.bmm(operand(x_GMK), self.w_GKN)
        pairs = zip(x_GMK, self.packed, strict=True)
        return torch.stack([packed_product(x_MK, packed) for x_MK, packed in pairs])

    def add_product(self, out_GMN: Tensor, x_GMK: Tensor) -> None:
        """`out += x @ w.T`, where the product may be of a lower precision than `out`."""
        x_GMK = operand(x_GMK)
        if x_GMK.dtype == out_GMN.dtype:
            out_GMN.baddbmm_(x_GMK, self.w_GKN)
        else:
            out_GMN.add_(self.product(x_GMK))


def mm_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """Computes `out = a @ b`, or with `add` `out += a @ b`, for matrices. `a` and `b` may have a lower
    precision than `out`. Then `b` may also have more columns than `out`, which are left out.
    """
    a, b = operand(a), operand(b)
    if a.dtype != out.dtype:
        product = (a @ b)[:, : out.shape[1]]
        out.add_(product) if add else out.copy_(product)
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


class FullPrecisionSums:
    """A context in which cuBLAS sums products of bf16 and fp16 in fp32 only.

    The settings are of the process: the first thread that enters changes them, the last one that leaves
    restores those of the user.
    """

    SETTINGS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")

    def __init__(self) -> None:
        self.lock = Lock()
        self.entered_threads, self.user_settings = 0, list[Any]()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        matmul = torch.backends.cuda.matmul
        with self.lock:
            if self.entered_threads == 0:
                self.user_settings = [getattr(matmul, name) for name in self.SETTINGS]
                for name, value in zip(self.SETTINGS, self.user_settings, strict=True):
                    if value:  # where it is off, a user may have forbidden split sums, too
                        setattr(matmul, name, False)
            self.entered_threads += 1
        try:
            yield
        finally:
            with self.lock:
                self.entered_threads -= 1
                if self.entered_threads == 0:
                    for name, value in zip(self.SETTINGS, self.user_settings, strict=True):
                        if value:
                            setattr(matmul, name, value)


full_precision_sums = FullPrecisionSums()


def exact_sums(device_type: str) -> AbstractContextManager[None]:
    """The context for products on a device: on a GPU `full_precision_sums`.

    torch.compile cannot trace it, and leaves the user's settings as they are.
    """
    if device_type == "cuda" and not torch.compiler.is_compiling():
        return full_precision_sums()
    return nullcontext()
