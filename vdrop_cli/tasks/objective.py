"""What a training step descends, and what it reports."""

from typing import NamedTuple

from torch import Tensor

from vdrop_cli.layers import State


class Objective(NamedTuple):
    """The loss of a batch."""

    descended: Tensor  # with penalties
    reported: Tensor  # without them
    state: State  # for the next batch
