"""The average of a model's weights over updates, which often predicts better than the last weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vdrop_cli.settings.train import Schedule


class Average:
    """The average of a model's parameters, and after how many updates it was taken.

    The n-th update counts with weight 1/n, and with at least 1 - `decay`: a plain mean for decay 1 (Polyak &
    Juditsky 1992), else one that forgets earlier updates exponentially.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.names, self.parameters = zip(*model.named_parameters(), strict=True)
        self.decay = decay
        self.count = 0
        self.tensors: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights as they are now."""
        self.count += 1
        weights = [parameter.detach() for parameter in self.parameters]
        if self.count == 1:
            self.tensors = [weight.clone() for weight in weights]
        else:
            torch._foreach_lerp_(self.tensors, weights, max(1 - self.decay, 1 / self.count))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Replaces the model's weights by their average within the context, where there is one.

        The numbers are copied: a captured CUDA graph reads weights by their address.
        """
        if not self.tensors:
            yield
            return
        weights = [parameter.detach().clone() for parameter in self.parameters]
        self.write(self.tensors)
        try:
            yield
        finally:
            self.write(weights)

    @torch.no_grad()
    def write(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the average by the parameters' names; empty before the first update."""
        return dict(zip(self.names, self.tensors, strict=True)) if self.tensors else {}

    def load_state_dict(self, state: dict[str, Tensor], count: int) -> None:
        """Restores an average after so many updates."""
        self.count = count
        device = self.parameters[0].device
        self.tensors = [state[name].to(device, copy=True) for name in self.names] if count else []


def average_begins(schedule: Schedule, validations: list[float]) -> bool:
    """Returns whether updates after these epochs are averaged, by their selection metrics.

    They are after `average_from` epochs; where that is unset, once a validation is worse than the best of
    those that are more than `average_trigger` epochs older (Merity et al. 2018).
    """
    if schedule.average_decay is None:
        return False
    if schedule.average_from is not None:
        return len(validations) >= schedule.average_from
    return any(
        validations[epoch] > min(validations[: epoch - schedule.average_trigger])
        for epoch in range(schedule.average_trigger + 1, len(validations))
    )
