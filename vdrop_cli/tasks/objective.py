"""The loss of a training step: what is minimised, and what is reported."""

from typing import NamedTuple

from torch import Tensor

from vdrop_cli.layers import State


class Objective(NamedTuple):
    """The loss of a batch."""

    descended: Tensor  # what is minimised: the loss with penalties
    reported: Tensor  # what is logged: the loss without penalties
    state: State  # for the next batch
