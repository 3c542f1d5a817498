"""What a back end that is compiled on the user's machine has to pass before it is used: a cell against the
definition, on a few numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vdrop_cli.kernels import reference
from vdrop_cli.kernels.masks import Masks


def largest_error(
    cell: str, function: Callable[..., tuple[Tensor, ...]], device: torch.device, passes: int = 1
) -> float:
    """The largest relative error of an output or a gradient of `lstm` or `gru`; not a number where one of
    them is not.
    """
    time, batch, inputs, hidden = 3, 2, 5, 7
    rows, states = {"lstm": (4 * hidden, 2), "gru": (3 * hidden, 1)}[cell]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (
            torch.empty(shape, device="cpu", dtype=torch.float32)
            .uniform_(-1, 1, generator=generator)
            .to(device)
        )

    shapes = [
        (time, batch, inputs),
        *[(batch, hidden)] * states,
        (rows, inputs),
        (rows, hidden),
        (rows,),
        (rows,),
    ]
    tensors = [random(*shape).requires_grad_() for shape in shapes]
    masks = Masks(random(1, 1, batch, inputs), random(1, rows // hidden, batch, hidden))

    def results(function: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        y_TBH, *_ = function(*tensors, masks)
        return [y_TBH.detach(), *torch.autograd.grad(y_TBH.square().sum(), tensors)]

    exact: dict[str, Callable[..., tuple[Tensor, ...]]] = {"lstm": reference.lstm, "gru": reference.gru}
    expected = results(exact[cell])
    found = [results(function) for _ in range(passes)]
    errors = [(f - e).norm() / e.norm() for each in found for f, e in zip(each, expected, strict=True)]
    return torch.stack(errors).max().item()
