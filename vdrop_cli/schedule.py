"""The optimiser's step, and the learning rate as a function of the epoch."""

import math
from typing import Any

import torch
from torch import nn

from vdrop_cli.config import Descent, Schedule


def learning_rate(schedule: Schedule, epoch: int) -> float:
    """Of an epoch, counted from 1: divided by `decay` at the end of every epoch after `max_epoch` (Zaremba et
    al. 2014, code).
    """
    return schedule.lr / schedule.decay ** max(0, epoch - 1 - schedule.max_epoch)


SMALLEST_RATE = (
    1e-30  # by which weight decay is divided; with less the quotient would not be a number of fp32
)


class Optimiser:
    """Plain SGD or Adam, with a limit on the gradient's global norm.

    Weight decay is on every parameter. SGD: after the step, in the same two passes over the weights; Adam: in
    the gradient, as the authors' penalty of weight_decay/2 on the squared weights.

    `delayed` (by default on a GPU alone): the update is made without a wait for the gradient's norm, which is
    read later.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, *, delayed: bool | None = None) -> None:
        self.schedule = schedule
        self.parameters: list[torch.Tensor] = list(model.parameters())
        self.delayed = self.parameters[0].is_cuda if delayed is None else delayed
        self.inner: torch.optim.Optimizer
        if schedule.optimiser is Descent.adam:
            self.inner = torch.optim.Adam(
                self.parameters, lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True
            )
        else:
            self.inner = torch.optim.SGD(self.parameters, lr=schedule.lr, fused=True)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, held: dict[str, Any], steps: int) -> None:
        """The moments after so many steps; how a step is made is a matter of the settings. Raises ValueError
        where they do not fit.
        """
        self.require_fitting(held, steps)
        self.inner.load_state_dict(
            {"state": held["state"], "param_groups": self.inner.state_dict()["param_groups"]}
        )

    def require_fitting(self, held: dict[str, Any], steps: int) -> None:
        """Raises ValueError unless `held` is a state of this optimiser, for these parameters."""
        numbers = list(range(len(self.parameters)))
        groups, state = held.get("param_groups"), held.get("state")
        group = (
            groups[0] if isinstance(groups, list) and len(groups) == 1 and isinstance(groups[0], dict) else {}
        )
        params = group.get("params")
        if not (
            isinstance(params, list) and all(type(number) is int for number in params) and params == numbers
        ):
            raise ValueError("its optimiser is of other parameters")
        if not isinstance(state, dict) or not all(isinstance(moments, dict) for moments in state.values()):
            raise ValueError("its optimiser has no state")
        if self.schedule.optimiser is not Descent.adam:
            if any(moment is not None for moments in state.values() for moment in moments.values()):
                raise ValueError("its optimiser has a state, and plain SGD has none")
        elif (steps > 0 or state) and (
            set(state) != set(numbers) or not all(are_moments(state[n], self.parameters[n]) for n in numbers)
        ):
            raise ValueError("its optimiser does not hold the moments of all weights")

    def step(self, loss: torch.Tensor, epoch: int) -> "LossAndNorm":
        """One step down the gradient of `loss`; returns the loss, and the gradient's norm before clipping.

        A norm that is not finite changes nothing.
        """
        self.inner.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = global_norm(gradients)
        numbers = LossAndNorm(torch.stack([loss.detach().double(), norm.double()]))
        if self.delayed:
            self.update_by_tensors(norm, epoch)
        else:
            self.update_by_numbers(numbers.read()[1], gradients, epoch)
        return numbers

    def update_by_numbers(self, norm: float, gradients: list[torch.Tensor], epoch: int) -> None:
        """The update where the norm is known."""
        if not math.isfinite(norm):
            return
        clipped = min(1.0, self.schedule.clipped_at / (norm + 1e-6))
        if clipped < 1 and self.schedule.optimiser is Descent.adam:
            for gradient in gradients:
                gradient.mul_(clipped)
            clipped = 1.0
        self.set_rates(epoch, clipped)
        self.inner.step()

    def update_by_tensors(self, norm: torch.Tensor, epoch: int) -> None:
        """The same update, clipped and decided on by the fused optimiser, which divides gradients by
        `grad_scale`.
        """
        inner: Any = self.inner
        inner.grad_scale = ((norm + 1e-6) / self.schedule.clipped_at).clamp(min=1).float()
        inner.found_inf = (~norm.isfinite()).float()
        self.set_rates(epoch)
        inner.step()

    def set_rates(self, epoch: int, clipped: float = 1.0) -> None:
        lr, weight_decay = learning_rate(self.schedule, epoch), self.schedule.weight_decay
        if self.schedule.optimiser is Descent.sgd:
            # w ← (1 - wd)·(w - lr·g) as the one step that `SGD` makes, w - lr'·(g + wd'·w); clipping scales
            # lr or g.
            lr = max((1 - weight_decay) * lr * clipped, SMALLEST_RATE)
            weight_decay = weight_decay / lr
        for group in self.inner.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay


def are_moments(held: dict[str, Any], parameter: torch.Tensor) -> bool:
    """Whether this is what Adam remembers of a parameter."""
    if set(held) != {"step", "exp_avg", "exp_avg_sq"} or not all(
        isinstance(moment, torch.Tensor) for moment in held.values()
    ):
        return False
    step, mean, square = held["step"], held["exp_avg"], held["exp_avg_sq"]
    fits = (
        mean.shape == square.shape == parameter.shape
        and mean.dtype == square.dtype == parameter.dtype
        and step.numel() == 1
    )
    return (
        fits
        and bool(step.isfinite() & (step >= 1))
        and bool(mean.isfinite().all())
        and bool((square.isfinite() & (square >= 0)).all())
    )


class LossAndNorm:
    """The loss of a step and its gradient's norm: on a GPU they are copied in the background, and read when
    the copy is there.
    """

    def __init__(self, numbers_2: torch.Tensor) -> None:
        self.numbers_2 = numbers_2.to("cpu", non_blocking=True)
        self.copied: torch.cuda.Event | None = None
        if numbers_2.is_cuda:
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.copied.record(torch.cuda.current_stream(numbers_2.device))

    def read(self) -> tuple[float, float]:
        if self.copied is not None:
            self.copied.synchronize()
        loss, norm = self.numbers_2.tolist()
        return loss, norm


def global_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Row by row first: on the CPU that is exact to fp32 and quick, a norm over millions of numbers at once
    is neither.
    """
    norm: torch.Tensor = torch.cat([torch.linalg.vector_norm(g, dim=-1).flatten() for g in gradients]).norm()
    return norm
