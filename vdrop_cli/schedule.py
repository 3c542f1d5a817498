"""The optimiser's step, and the learning rate as a function of the epoch."""

import math
from typing import Any

import torch
from torch import nn

from vdrop_cli.config import Schedule


def learning_rate(schedule: Schedule, epoch: int) -> float:
    """Of an epoch, counted from 1: divided by `decay` at the end of every epoch after `max_epoch` (Zaremba et al. 2014, code)."""
    return schedule.lr / schedule.decay ** max(0, epoch - 1 - schedule.max_epoch)


SMALLEST_RATE = 1e-30  # by which weight decay is divided; with less the quotient would not be a number of fp32


class Optimiser:
    """Plain SGD with a limit on the gradient's global norm, then weight decay on every parameter: two passes over the weights."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self.schedule = schedule
        self.parameters: list[torch.Tensor] = list(model.parameters())
        self.sgd = torch.optim.SGD(self.parameters, lr=schedule.lr, fused=True)

    def state_dict(self) -> dict[str, Any]:
        return self.sgd.state_dict()

    def load_state_dict(self, held: dict[str, Any]) -> None:
        self.sgd.load_state_dict(held)

    def step(self, loss: torch.Tensor, epoch: int) -> float:
        """One step down the gradient of `loss`; returns the gradient's norm before clipping. A norm that is not finite changes nothing."""
        self.sgd.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = global_norm([p.grad for p in self.parameters if p.grad is not None])
        if not math.isfinite(norm):
            return norm
        # w ← (1 - wd)·(w - lr·g) as the one step that `SGD` makes, w - lr'·(g + wd'·w); clipping scales lr instead of g.
        keep = 1 - self.schedule.weight_decay
        lr = max(keep * learning_rate(self.schedule, epoch) * min(1.0, self.schedule.clip / (norm + 1e-6)), SMALLEST_RATE)
        for group in self.sgd.param_groups:
            group["lr"], group["weight_decay"] = lr, self.schedule.weight_decay / lr
        self.sgd.step()
        return norm


def global_norm(gradients: list[torch.Tensor]) -> float:
    """Row by row first: on the CPU that is exact to fp32 and quick, a norm over millions of numbers at once is neither."""
    return float(torch.cat([torch.linalg.vector_norm(g, dim=-1).flatten() for g in gradients]).norm())
