"""The optimiser's step, and the learning rate as a function of the epoch."""

import math
from typing import Any

import torch
from torch import nn

from vdrop_cli.config import Descent, Schedule


def learning_rate(schedule: Schedule, epoch: int) -> float:
    """Of an epoch, counted from 1: divided by `decay` at the end of every epoch after `max_epoch` (Zaremba et al. 2014, code)."""
    return schedule.lr / schedule.decay ** max(0, epoch - 1 - schedule.max_epoch)


SMALLEST_RATE = 1e-30  # by which weight decay is divided; with less the quotient would not be a number of fp32


class Optimiser:
    """Plain SGD or Adam, with a limit on the gradient's global norm.

    Weight decay is on every parameter. SGD: after the step, in the same two passes over the weights; Adam: in the gradient, as the
    authors' penalty of weight_decay/2 on the squared weights.
    """

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self.schedule = schedule
        self.parameters: list[torch.Tensor] = list(model.parameters())
        self.inner: torch.optim.Optimizer
        if schedule.optimiser is Descent.adam:
            self.inner = torch.optim.Adam(self.parameters, lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True)
        else:
            self.inner = torch.optim.SGD(self.parameters, lr=schedule.lr, fused=True)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, held: dict[str, Any], steps: int) -> None:
        """The moments after so many steps; how a step is made is a matter of the settings. Raises ValueError where they do not fit."""
        self.require_fitting(held, steps)
        self.inner.load_state_dict({"state": held["state"], "param_groups": self.inner.state_dict()["param_groups"]})

    def require_fitting(self, held: dict[str, Any], steps: int) -> None:
        """Raises ValueError unless `held` is a state of this optimiser, for these parameters."""
        numbers = list(range(len(self.parameters)))
        groups, state = held.get("param_groups"), held.get("state")
        if not (isinstance(groups, list) and len(groups) == 1 and isinstance(groups[0], dict) and groups[0].get("params") == numbers):
            raise ValueError("its optimiser is of other parameters")
        if not isinstance(state, dict) or not all(isinstance(moments, dict) for moments in state.values()):
            raise ValueError("its optimiser has no state")
        if self.schedule.optimiser is not Descent.adam:
            if any(moment is not None for moments in state.values() for moment in moments.values()):
                raise ValueError("its optimiser has a state, and plain SGD has none")
        elif (steps > 0 or state) and (set(state) != set(numbers) or not all(are_moments(state[n], self.parameters[n]) for n in numbers)):
            raise ValueError("its optimiser does not hold the moments of all weights")

    def step(self, loss: torch.Tensor, epoch: int) -> tuple[float, float]:
        """One step down the gradient of `loss`; returns the loss, and the gradient's norm before clipping.

        A norm that is not finite changes nothing. Both numbers are waited for once, before the update, which a GPU makes while the
        processor goes on.
        """
        self.inner.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        total, norm = torch.stack([loss.detach().double(), global_norm(gradients).double()]).tolist()
        if not math.isfinite(norm):
            return total, norm
        clipped, lr = min(1.0, self.schedule.clipped_at / (norm + 1e-6)), learning_rate(self.schedule, epoch)
        if self.schedule.optimiser is Descent.adam:
            if clipped < 1:
                for gradient in gradients:
                    gradient.mul_(clipped)
            self.set(lr, self.schedule.weight_decay)
        else:
            # w ← (1 - wd)·(w - lr·g) as the one step that `SGD` makes, w - lr'·(g + wd'·w); clipping scales lr instead of g.
            lr = max((1 - self.schedule.weight_decay) * lr * clipped, SMALLEST_RATE)
            self.set(lr, self.schedule.weight_decay / lr)
        self.inner.step()
        return total, norm

    def set(self, lr: float, weight_decay: float) -> None:
        for group in self.inner.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay


def are_moments(held: dict[str, Any], parameter: torch.Tensor) -> bool:
    """Whether this is what Adam remembers of a parameter."""
    if set(held) != {"step", "exp_avg", "exp_avg_sq"} or not all(isinstance(moment, torch.Tensor) for moment in held.values()):
        return False
    step, mean, square = held["step"], held["exp_avg"], held["exp_avg_sq"]
    fits = mean.shape == square.shape == parameter.shape and mean.dtype == square.dtype == parameter.dtype and step.numel() == 1
    return fits and bool(step.isfinite() & (step >= 1)) and bool(mean.isfinite().all()) and bool((square.isfinite() & (square >= 0)).all())


def global_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Row by row first: on the CPU that is exact to fp32 and quick, a norm over millions of numbers at once is neither."""
    norm: torch.Tensor = torch.cat([torch.linalg.vector_norm(g, dim=-1).flatten() for g in gradients]).norm()
    return norm
