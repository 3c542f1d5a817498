"""What the hand-written forward and backward passes share."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from vdrop_cli.kernels.contexts import no_autocast
from vdrop_cli.kernels.products import exact_sums

F = TypeVar("F", bound=Callable[..., Any])


def without_autocast(function: F) -> F:
    """Decorates the forward or backward of an autograd function. Inside, a user's autocast is off, because it
    would round some products and not others. Sums of products have full precision (`exact_sums`).
    """

    @wraps(function)
    def wrapper(ctx: Any, *tensors: Any) -> Any:
        if function.__name__ == "forward":
            ctx.device_type = tensors[0].device.type
        with no_autocast(ctx.device_type), exact_sums(ctx.device_type):
            return function(ctx, *tensors)

    return cast(F, wrapper)


def as_one_operation(function: type[torch.autograd.Function], *last: Any) -> Callable[..., Any]:
    """Returns the call of an autograd function, with `last` as its last arguments, as one operation for
    torch.compile: a trace of the backward pass would lose the second derivatives of `create_graph=True`.
    """

    def apply(*args: Any) -> Any:
        return function.apply(*args, *last)  # type: ignore[no-untyped-call]

    in_graph: Callable[..., Any] = torch.compiler.allow_in_graph(apply)  # type: ignore[no-untyped-call]
    return in_graph


def all_gradients(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The result of a backward pass: `gradients` for the first arguments of the forward pass, None for all
    others.
    """
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


def sigmoid_gradient(d: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """d · y · (1 - y)"""
    result: Tensor = torch.ops.aten.sigmoid_backward.grad_input(d, y, grad_input=out)
    return result


def tanh_gradient(d: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """d · (1 - y²)"""
    result: Tensor = torch.ops.aten.tanh_backward.grad_input(d, y, grad_input=out)
    return result
