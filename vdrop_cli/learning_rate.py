"""The learning rate as a function of counts of steps and falls, so that a run can resume from these."""

import math
from dataclasses import dataclass

from vdrop_cli.settings.choices import LrShape
from vdrop_cli.settings.train import Schedule


@dataclass(frozen=True)
class LearningRate:
    """The rate of each update of a training.

    - `step`: `lr`, divided by `decay` at the end of every epoch after `max_epoch` (Zaremba et al. 2014,
      code);
    - `plateau`: divided by `decay` at each fall (`falls_after`);
    - `cosine` and `linear`: `lr` until the end of `max_epoch`, then down to `lr_end · lr` at the last update.

    During the first `warmup` updates the rate rises linearly; the last of them has the full rate.
    """

    schedule: Schedule
    steps_per_epoch: int
    total_steps: int

    def at(self, step: int, falls: int = 0) -> float:
        """Returns the rate of the update after `step` updates; `falls` counts the falls of a plateau."""
        schedule = self.schedule
        warm = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
        if schedule.lr_shape is LrShape.step:
            epoch = step // self.steps_per_epoch + 1
            return fallen(warm * schedule.lr, schedule.decay, max(0, epoch - 1 - schedule.max_epoch))
        if schedule.lr_shape is LrShape.plateau:
            return fallen(warm * schedule.lr, schedule.decay, falls)
        start = max(schedule.max_epoch * self.steps_per_epoch, schedule.warmup)
        share = min(1.0, max(0.0, (step - start) / max(1, self.total_steps - 1 - start)))
        height = 1 - share if schedule.lr_shape is LrShape.linear else (1 + math.cos(math.pi * share)) / 2
        return warm * schedule.lr * (schedule.lr_end + (1 - schedule.lr_end) * height)


def fallen(lr: float, decay: float, falls: int) -> float:
    """Returns the rate after `falls` divisions by `decay`; 0 where the divisor overflows."""
    try:
        return lr / decay**falls
    except OverflowError:
        return 0.0


def falls_after(schedule: Schedule, validations: list[float]) -> int:
    """Returns how often the rate of a plateau has fallen after these epochs, by their selection metrics.

    It falls after `plateau_epochs` epochs without a better validation, counted from the best epoch, the last
    fall or `max_epoch`, whichever came last. A validation is better if it is lower than the best one by more
    than the share `plateau_gain` of the best one.
    """
    if schedule.lr_shape is not LrShape.plateau:
        return 0
    best, since, falls = math.inf, schedule.max_epoch, 0
    for epoch, validation in enumerate(validations, 1):
        if validation < best * (1 - schedule.plateau_gain):
            best, since = validation, max(since, epoch)
        if epoch - since >= schedule.plateau_epochs:
            since, falls = epoch, falls + 1
    return falls
