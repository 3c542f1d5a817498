"""The optimiser's step, and the learning rate as a function of the epoch."""

import torch
from torch import nn

from vdrop_cli.config import Schedule


def learning_rate(schedule: Schedule, epoch: int) -> float:
    """Of an epoch, counted from 1: divided by `decay` at the end of every epoch after `max_epoch` (Zaremba et al. 2014, code)."""
    return schedule.lr / schedule.decay ** max(0, epoch - 1 - schedule.max_epoch)


class Optimiser:
    """Plain SGD with a limit on the gradient's global norm, then weight decay on every parameter."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self.schedule = schedule
        self.parameters: list[torch.Tensor] = list(model.parameters())
        self.sgd = torch.optim.SGD(self.parameters, lr=schedule.lr)

    def step(self, loss: torch.Tensor, epoch: int) -> float:
        """One step down the gradient of `loss`; returns the gradient's norm before clipping. A norm that is not finite changes nothing."""
        self.sgd.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip))
        if norm - norm != 0:  # NaN or infinite
            return norm
        for group in self.sgd.param_groups:
            group["lr"] = learning_rate(self.schedule, epoch)
        self.sgd.step()
        if self.schedule.weight_decay > 0:
            with torch.no_grad():
                torch._foreach_mul_(self.parameters, 1 - self.schedule.weight_decay)
        return norm
