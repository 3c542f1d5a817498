"""The average of a model's weights over updates, which often predicts better than the last weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vdrop_cli.settings.train import Schedule


class Average:
    """The average of a model's parameters over updates, and the number of these updates.

    The n-th update has the weight max(1/n, 1 - `decay`). With decay 1 this is a plain mean (Polyak & Juditsky
    1992); with a smaller decay the weight of earlier updates falls exponentially.
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
        """Within the context, the model has the average of its weights, if there is one yet.

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
    """Returns whether updates are averaged after the epochs whose selection metrics are `validations`.

    The average begins after `average_from` epochs. Where `average_from` is unset, it begins once a validation
    is worse than the best validation from more than `average_trigger` epochs earlier (Merity et al. 2018).
    """
    if schedule.average_decay is None:
        return False
    if schedule.average_from is not None:
        return len(validations) >= schedule.average_from
    return any(
        validations[epoch] > min(validations[: epoch - schedule.average_trigger])
        for epoch in range(schedule.average_trigger + 1, len(validations))
    )
