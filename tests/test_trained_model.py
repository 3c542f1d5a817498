"""A model with the weights of a checkpoint, and the task that it was trained on."""

from pathlib import Path

import pytest
import torch

from tests.conftest import TINY
from tests.test_checkpoint import at_epoch
from vdrop_cli.errors import ConfigError
from vdrop_cli.trained_model import task_of


def test_another_text_than_that_of_the_training_is_refused(text: list[str]) -> None:
    snapshot = at_epoch(1, 1, *TINY, *text)
    with pytest.raises(
        ConfigError,
        match=r"^checkpoint=a was trained on another corpus than .*; give it the text that it was trained "
        r"on; vdrop eval file=… evaluates another one$",
    ):
        task_of(Path("a"), snapshot, snapshot.train.data, torch.device("cpu"))
