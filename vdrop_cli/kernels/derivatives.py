"""Gradients by automatic differentiation of `reference`, where a backward pass is itself differentiated or
batched.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vdrop_cli.kernels.autograd import all_gradients
from vdrop_cli.kernels.contexts import in_transform
from vdrop_cli.kernels.packing import zero_padding
from vdrop_cli.kernels.weights import unflatten


def needs_reference(grad_outputs: Sequence[Tensor | None]) -> bool:
    """Whether a hand-written backward pass cannot compute the gradients.

    That is so for gradients that will be differentiated again (`create_graph=True`), and for gradients of a
    batch of `grad_outputs` (`is_grads_batched=True`, `vmap`).
    """
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():  # compiled functions have neither
        return False
    return in_transform() or any(
        dy is not None and torch._C._functorch.is_legacy_batchedtensor(dy) for dy in grad_outputs
    )


def reference_gradients(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    is_needed: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradient of each input that needs one, None for the others. With `create_graph=True` the gradients
    can be differentiated with respect to `inputs` and `grad_outputs`.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: one input may depend on another, or be the same tensor, and the gradient of each is only
        # that of its own argument.
        aliases = [tensor.view_as(tensor) for tensor in inputs]
        pairs = [(y, dy) for y, dy in zip(function(*aliases), grad_outputs, strict=False) if dy is not None]
    indices = [index for index, needed in enumerate(is_needed) if needed]
    gradients: list[Tensor | None] = [None] * len(inputs)
    if pairs and indices:
        outputs, upstream = zip(*pairs, strict=True)
        computed = torch.autograd.grad(
            outputs, [aliases[i] for i in indices], upstream, create_graph=create_graph, allow_unused=True
        )
        for i, gradient in zip(indices, computed, strict=True):
            gradients[i] = gradient
    return gradients


def cell_gradients(
    cell: Callable[..., tuple[Tensor, ...]],
    states: int,
    inputs: Sequence[Tensor],
    is_needed: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
    lengths: Tensor | None,
    **options: Any,
) -> list[Tensor | None]:
    """The gradients of a cell of `reference`; `inputs` are x, so many states, and the weights one by one."""

    def function(x_TBD: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights = unflatten(tensors[states:])
        return cell(zero_padding(x_TBD, lengths), *tensors[:states], weights, lengths=lengths, **options)

    return reference_gradients(function, inputs, is_needed, grad_outputs)


class SavedCell(Protocol):
    """The part of the tensors saved for a cell's backward pass that `gradients_by_definition` reads."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments that may need a gradient: x, the states, and the weights one by one."""

    @property
    def lengths(self) -> Tensor | None: ...


def gradients_by_definition(
    ctx: Any,
    cell: Callable[..., tuple[Tensor, ...]],
    states: int,
    saved: SavedCell,
    grad_outputs: Sequence[Tensor | None],
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """The result of a cell's backward pass if `reference` must compute the gradients. `states` is the number
    of states: 2 for an LSTM, 1 for a GRU.
    """
    inputs = saved.inputs
    is_needed = ctx.needs_input_grad[: len(inputs)]
    gradients = cell_gradients(cell, states, inputs, is_needed, grad_outputs, saved.lengths, **options)
    return all_gradients(ctx, *gradients)
