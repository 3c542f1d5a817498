"""The check that a back end compiled on the user's machine has to pass before its use: a cell against the
definition, on a few numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vdrop_cli.kernels import reference
from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.weights import unflatten

Cell = Callable[..., tuple[Tensor, ...]]


def largest_error(cell: str, function: Cell, device: torch.device, passes: int = 1) -> float:
    """The largest relative error of an output or a gradient of `lstm` or `gru`; NaN where one of them is
    NaN.
    """
    time = 3
    batch = 2
    inputs = 5
    hidden = 23  # more than a whole block of units
    gates, states = {"lstm": (4, 2), "gru": (3, 1)}[cell]
    rows, generator = gates * hidden, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        memory = torch.empty(shape, device="cpu", dtype=torch.float32)
        return memory.uniform_(-1, 1, generator=generator).to(device)

    sequence_shapes = [(time, batch, inputs), *[(batch, hidden)] * states]
    shapes = [*sequence_shapes, (rows, inputs), (rows, hidden), (rows,), (rows,)]
    tensors = [random(*shape).requires_grad_() for shape in shapes]
    masks = Masks(random(1, 1, batch, inputs), random(1, gates, batch, hidden))

    def results(function: Cell) -> list[Tensor]:
        y_TBH, *_ = function(*tensors[: 1 + states], unflatten(tensors[1 + states :]), masks)
        return [y_TBH.detach(), *torch.autograd.grad(y_TBH.square().sum(), tensors)]

    expected = results(getattr(reference, cell))
    errors = [
        (actual - exact).norm() / exact.norm()
        for _ in range(passes)
        for actual, exact in zip(results(function), expected, strict=True)
    ]
    return torch.stack(errors).max().item()


def mismatch(check: Callable[[str], float], device: torch.device, tolerance: float) -> str:
    """By how much a back end differs from the definition, as "off by 0.2"; empty within the tolerance.

    `check` returns the largest relative error of `lstm` or `gru` on the device, and may raise.
    """
    # The caller may be in any of these modes. It may also have hooks that count saved tensors, as
    # `torch.utils.checkpoint` has. Only the innermost hooks are called, which are set here.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        errors = [check(cell) for cell in ("lstm", "gru")]
    too_large = [error for error in errors if not error < tolerance]  # or NaN
    return f"off by {too_large[0]:.1g}" if too_large else ""
