"""The steps of the cells with layer norm (`normed.Steps`), compiled from `native.c`: on the CPU, in float32
and float64.
"""

import ctypes
from typing import Any

from torch import Tensor

from vdrop_cli.kernels.native_library import SUFFIXES, call, threads
from vdrop_cli.kernels.normed import Moments, Steps


def run(name: str, like: Tensor, *arguments: Any) -> None:
    """Calls a function of the library for as many rows as `like` [B, H] has.

    It gets bare pointers, so all tensors must be contiguous.
    """
    rows, hidden = like.shape
    flags = [argument for argument in arguments if isinstance(argument, bool)]
    tensors = [argument for argument in arguments if not isinstance(argument, bool)]
    assert all(tensor.is_contiguous() for tensor in tensors if isinstance(tensor, Tensor)), name
    if rows:
        call(
            f"vdrop_norm_{name}_{SUFFIXES[like.dtype, like.dtype]}",
            *tensors,
            rows,
            hidden,
            *map(int, flags),
            ctypes.c_int(threads()),
        )


def mask_rows(mask: Tensor | None, like: Tensor) -> tuple[Tensor | None, int]:
    """A mask [B|1, H] in contiguous memory, and the stride of its rows in elements."""
    if mask is None:
        return None, 0
    mask = mask.expand(-1, like.shape[1]).contiguous()
    return mask, mask.stride(0) if len(mask) > 1 else 0


class NativeSteps(Steps):
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
        run("lstm", c, a, u, gain, gain_c, bias_c, *mask_rows(mask, c), c_before, c, h, tanh_c, *moments)

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
        dcell = dcell if dcell is None else dcell.contiguous()
        saved = (gates, u, gain, gain_c, *mask_rows(mask, c), c_before, c, tanh_c, *moments)
        run("lstm_backward", c, *saved, dh, dc, dcell, da, du, dn)

    @staticmethod
    def gru_gates(rz: Tensor, u: Tensor, gain: Tensor, moments: Moments) -> None:
        run("gru_gates", rz[:, : rz.shape[1] // 2], rz, u, gain, *moments)

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
        run("gru_candidate", n, n, u, gain, bias, rz, h_before, v, h, *moments, reset_after)

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
        saved = (rz, n, v, u, gain, *moments, h_before)
        run("gru_candidate_backward", n, *saved, dh, da_n, dv, da_rz, du, reset_after)

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
        saved = (rz, u, gain, *moments, h_before)
        run("gru_gates_backward", dh, *saved, d_input.contiguous(), dh, da_rz, du, reset_after)
