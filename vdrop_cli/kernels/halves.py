"""fp32 products by the bf16 units of a GPU, which are many times faster than its fp32 units.

Each number is approximated by the sum of two bf16 numbers, its high half and its low half. A product of such
sums has four products of halves. Three of them are computed: high by high, low by high, and high by low.
Their sum is as exact as a product of numbers with 16 bits. The halves lie side by side in memory, so the
three are one bf16 product with sums in fp32.

N, M rows  D columns  S size of an aligned row, at least D  V vocabulary
"""

import torch
from torch import Tensor

from vdrop_cli.errors import lacks_memory
from vdrop_cli.kernels.alignment import aligned_size

TOLERANCE = 1e-5  # relative error of such a product; that of bf16 alone is 3e-3, and fp32's 3e-7
CHECKED: dict[torch.device, bool] = {}  # whether the products of a device are exact
LEFT, RIGHT = (0, 1, 0), (0, 0, 1)  # the halves of each side of a product: 0 high, 1 low


def side_by_side(x_ND: Tensor, order: tuple[int, ...]) -> Tensor:
    """The halves of a matrix in this order, each in an aligned row: [N, 3·S]."""
    columns = x_ND.shape[1]
    size = aligned_size(columns, torch.bfloat16)
    high_ND = x_ND.bfloat16()
    halves = (high_ND, (x_ND - high_ND).bfloat16())
    rows_NKS = x_ND.new_zeros(len(x_ND), len(order), size, dtype=torch.bfloat16)
    for place, half in enumerate(order):
        rows_NKS[:, place, :columns] = halves[half]
    return rows_NKS.flatten(1)


def product(left_MX: Tensor, right_NX: Tensor) -> Tensor:
    """`left @ right.T` of bf16, with sums and results in fp32."""
    return torch.mm(left_MX, right_NX.T, out_dtype=torch.float32)


def is_exact_on(device: torch.device) -> bool:
    """Whether a device computes products of halves within `TOLERANCE`; torch has them from 2.8 on.

    The first call on a device computes one as a check. While a CUDA graph is captured no check is possible,
    and the result for a device that has not been checked is False.
    """
    if device not in CHECKED:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        CHECKED[device] = check(device)
    return CHECKED[device]


def check(device: torch.device) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    x_MD, w_VD = (torch.randn(rows, 650, generator=generator, device="cpu").to(device) for rows in (64, 96))
    try:
        actual_MV = product(side_by_side(x_MD, LEFT), side_by_side(w_VD, RIGHT)).double()
    except (TypeError, NotImplementedError, RuntimeError) as error:
        if lacks_memory(error):  # says nothing about the device
            raise
        return False
    exact_MV = x_MD.double() @ w_VD.double().T
    return bool((actual_MV - exact_MV).norm() < TOLERANCE * exact_MV.norm())
