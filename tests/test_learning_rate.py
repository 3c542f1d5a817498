"""The learning rate of every update, by hand."""

import math
from itertools import pairwise

import pytest
import torch

from tests.conftest import settings
from vdrop_cli.learning_rate import LearningRate, falls_after

PLAIN = ["schedule.lr=2", "schedule.decay=1", "schedule.epochs=4"]


def rates(*overrides: str, steps_per_epoch: int = 5, model: str = "lstm_small") -> list[float]:
    """Of all updates of a training."""
    schedule = settings(f"model={model}", "dropout=none", *overrides).schedule
    steps = schedule.steps_after(schedule.epochs, steps_per_epoch)
    rate = LearningRate(schedule, steps_per_epoch, steps)
    return [rate.at(step) for step in range(steps)]


def test_zarembas_decay_epoch_by_epoch() -> None:
    """Small: decay 2, max_epoch 4. The rate is halved at the end of epochs 5, 6, …: the first drop is seen in
    epoch 6.
    """
    by_epoch = [1.0, 1, 1, 1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
    assert rates("schedule.epochs=9", steps_per_epoch=3) == [rate for rate in by_epoch for _ in range(3)]


def test_a_rate_that_has_fallen_too_often_for_a_number_is_0() -> None:
    """2**1024 is too large; 1 / 2**1023 is not."""
    by_epoch = rates("schedule.epochs=1100", steps_per_epoch=1)
    assert by_epoch[4 + 1023] == 2.0**-1023 and by_epoch[4 + 1024 :] == [0.0] * (1100 - 1028)
    schedule = settings(*PLAIN[:1], "schedule.lr_shape=plateau", "schedule.decay=10").schedule
    assert [LearningRate(schedule, 5, 20).at(0, falls) for falls in (308, 309)] == [2 / 10.0**308, 0]


@pytest.mark.parametrize(("dropout", "first"), [("variational", 12), ("zaremba", 16)])
def test_the_large_variational_row_decays_earlier_than_zarembas(dropout: str, first: int) -> None:
    by_epoch = rates(f"dropout={dropout}", model="lstm_large", steps_per_epoch=1)
    assert by_epoch[: first - 1] == [1] * (first - 1)
    assert by_epoch[first - 1] == pytest.approx(1 / 1.15)


def test_a_line_is_full_until_max_epoch_and_ends_at_its_end() -> None:
    by_step = rates(*PLAIN, "schedule.lr_shape=linear", "schedule.max_epoch=2", "schedule.lr_end=0.1")
    assert by_step[:11] == [2] * 11
    differences = [a - b for a, b in pairwise(by_step[10:])]
    assert differences == pytest.approx([2 * 0.9 / 9] * 9) and by_step[-1] == pytest.approx(0.2)


def test_a_cosine_is_symmetric_about_its_middle() -> None:
    by_step = rates(*PLAIN, "schedule.lr_shape=cosine", "schedule.max_epoch=0", "schedule.lr_end=0.5")
    assert by_step[0] == 2 and by_step[-1] == pytest.approx(1)
    assert [a + b for a, b in zip(by_step, by_step[::-1], strict=True)] == pytest.approx([3] * 20)
    assert by_step[1] - by_step[2] < by_step[9] - by_step[10], "flat at the start, steep in the middle"


@pytest.mark.parametrize("shape", ["step", "cosine", "linear"])
def test_a_warm_up_rises_in_equal_parts_to_the_full_rate(shape: str) -> None:
    options = [*PLAIN, f"schedule.lr_shape={shape}", "schedule.max_epoch=0"]
    by_step, without = rates(*options, "schedule.warmup=4"), rates(*options)
    assert by_step[:4] == pytest.approx([0.5, 1, 1.5, 2]) and by_step[4] == 2
    assert max(by_step) == 2 and by_step[-1] == pytest.approx(without[-1])


def test_the_last_step_has_the_last_rate_when_steps_are_limited() -> None:
    by_step = rates(*PLAIN, "schedule.lr_shape=linear", "schedule.max_epoch=0", "schedule.max_steps=7")
    assert len(by_step) == 7 and by_step[-1] == 0


def test_a_plateau_falls_after_so_many_epochs_without_a_better_validation() -> None:
    """Of the losses 5 4 4 4 3 3 3 3 with two epochs of patience: after epochs 4, 7; not before max_epoch."""
    plateau = ["schedule.lr_shape=plateau", "schedule.plateau_epochs=2", "schedule.decay=4"]
    losses = [5.0, 4, 4, 4, 3, 3, 3, 3]
    for max_epoch, expected in ((0, [4, 7]), (4, [7]), (6, [8])):
        schedule = settings(*plateau, f"schedule.max_epoch={max_epoch}").schedule
        falls = [falls_after(schedule, losses[:epoch]) for epoch in range(9)]
        assert [epoch for epoch in range(1, 9) if falls[epoch] > falls[epoch - 1]] == expected
        assert falls[-1] == len(expected)
    rate = LearningRate(schedule, 5, 100)
    assert [rate.at(99, falls) for falls in range(3)] == [schedule.lr, schedule.lr / 4, schedule.lr / 16]
    assert falls_after(settings().schedule, losses) == 0


@pytest.mark.parametrize("gain", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_a_plateau_is_that_of_torchs_scheduler(gain: float, epochs: int) -> None:
    """On losses that fall by less and less, with noise."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=epochs - 1, threshold=gain, eps=0
    )
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(30, generator=generator).tolist()
    losses = [2 + math.exp(-epoch / 5) + 0.05 * noise[epoch] for epoch in range(30)]
    how = [f"schedule.plateau_epochs={epochs}", f"schedule.plateau_gain={gain}", "schedule.decay=2"]
    schedule = settings("schedule.lr_shape=plateau", "schedule.max_epoch=0", *how).schedule
    falls = 0
    for epoch in range(30):
        scheduler.step(losses[epoch])
        falls = falls_after(schedule, losses[: epoch + 1])
        assert optimizer.param_groups[0]["lr"] == 0.5**falls
    assert 1 <= falls < 30
