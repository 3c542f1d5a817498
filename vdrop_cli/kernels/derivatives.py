"""Gradients by automatic differentiation of `reference`, for what a hand-written backward pass does not
give.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vdrop_cli.kernels.layout import zero_padding


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_transform() -> bool:
    """Whether code runs inside a transform of `torch.func` (grad, vmap, jacrev, …)."""
    return bool(torch._C._are_functorch_transforms_active())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unsupported_context() -> str:
    """What surrounds the call that only `reference` supports; empty where nothing does."""
    if in_transform():
        return "the transforms of torch.func (grad, vmap, jacrev, …)"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 has none
    return "torch.export" if is_exporting() else ""


def needs_reference(grad_outputs: Sequence[Tensor | None]) -> bool:
    """Whether the current backward pass must give more than the hand-written one can.

    That is gradients which can themselves be differentiated (`create_graph=True`), or those of a batch of
    `grad_outputs` (`is_grads_batched=True`, `vmap`).
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
    needed: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradient of each input that needs one; with `create_graph=True` a function of inputs and
    `grad_outputs`.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: one input may depend on another, or be the same tensor, and the gradient of each is only
        # that of its own argument.
        aliases = [tensor.view_as(tensor) for tensor in inputs]
        pairs = [(y, dy) for y, dy in zip(function(*aliases), grad_outputs, strict=False) if dy is not None]
    places = [index for index, is_needed in enumerate(needed) if is_needed]
    gradients: list[Tensor | None] = [None] * len(inputs)
    if pairs and places:
        outputs, upstream = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outputs, [aliases[i] for i in places], upstream, create_graph=create_graph, allow_unused=True
        )
        for i, gradient in zip(places, found, strict=True):
            gradients[i] = gradient
    return gradients


def cell_gradients(
    cell: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
    lengths: Tensor | None,
    **options: Any,
) -> list[Tensor | None]:
    """Likewise of `reference.lstm` or `reference.gru`, whose order the inputs have: x, states, weights."""

    def function(x_TBD: Tensor, *states_and_weights: Tensor) -> tuple[Tensor, ...]:
        return cell(zero_padding(x_TBD, lengths), *states_and_weights, lengths=lengths, **options)

    return reference_gradients(function, inputs, needed, grad_outputs)
