"""What runs around a call: autocast, transforms of `torch.func`, forward-mode derivatives and tracers."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_transform() -> bool:
    """Whether code runs inside a transform of `torch.func` (grad, vmap, jacrev, …)."""
    return bool(torch._C._are_functorch_transforms_active())


def without_transforms(tensor: Tensor) -> Tensor:
    """The tensor below the transforms of `torch.func`; within vmap, that of all calls together."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_forward_mode() -> bool:
    """Whether code runs where forward-mode derivatives are computed."""
    return forward_ad._current_level >= 0


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unsupported_context() -> str:
    """The transform or tracer around the call that only `reference` supports; empty without one."""
    if in_transform():
        return "the transforms of torch.func (grad, vmap, jacrev, …)"
    if in_forward_mode():
        return "forward-mode derivatives (torch.autograd.forward_ad)"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # new in torch 2.7
    return "torch.export" if is_exporting() else ""


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context without a user's autocast; torch has no autocast for the device meta."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
