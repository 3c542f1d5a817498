"""The optimiser's step, by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.conftest import settings
from vdrop_cli.optimizer import Optimizer, global_norm
from vdrop_cli.settings.choices import OptimizerName
from vdrop_cli.settings.train import Schedule


def one_step(
    *overrides: str, start: list[float], gradient: list[float], lr: float = 1
) -> tuple[list[float], float]:
    schedule = settings("model=lstm_small", "dropout=none", *overrides).schedule
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    loss = (model.w * torch.tensor(gradient, dtype=torch.float64)).sum()
    before = loss.item()
    total, norm = Optimizer(model, schedule).step(loss, lr).read()
    assert total == before or not math.isfinite(before)
    return model.w.tolist(), norm


def test_a_gradient_within_the_limit_is_left_alone() -> None:
    weights, norm = one_step("schedule.clip=5", start=[1.0, 1.0], gradient=[3.0, 4.0])
    assert norm == pytest.approx(5) and weights == pytest.approx([-2, -3], rel=1e-5)


def test_a_larger_gradient_is_scaled_to_the_limit_and_its_own_norm_is_returned() -> None:
    weights, norm = one_step("schedule.clip=1", start=[1.0, 1.0], gradient=[30.0, 40.0])
    assert norm == pytest.approx(50) and weights == pytest.approx([1 - 0.6, 1 - 0.8], rel=1e-5)


def test_weight_decay_comes_after_the_step_and_is_not_scaled_by_the_learning_rate() -> None:
    """w = 1, gradient 2, rate 1/4, decay 0.1: (1 - 2/4)·(1 - 0.1)."""
    weights, _ = one_step("schedule.weight_decay=0.1", start=[1.0], gradient=[2.0], lr=1 / 4)
    assert weights == pytest.approx([(1 - 2 / 4) * 0.9], rel=1e-9)


def test_weight_decay_outlives_the_learning_rate() -> None:
    """After 400 halvings nothing is left of the rate; the decay is as before."""
    schedule = settings("model=lstm_small", "dropout=none", "schedule.weight_decay=0.1").schedule
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([1.0, -3.0]))
    Optimizer(model, schedule).step((model.w * 2).sum(), 2.0**-400)
    assert model.w.tolist() == pytest.approx([0.9, -2.7], rel=1e-6)


def test_the_norm_of_many_numbers_is_exact() -> None:
    """torch's norm of six million numbers at once is 2e-4 off on a CPU."""
    gradients = [torch.randn(10_000, 650), torch.randn(10_000)]
    exact = sum((g.double() ** 2).sum().item() for g in gradients) ** 0.5
    assert global_norm(gradients).item() == pytest.approx(exact, rel=1e-6)


def test_adams_first_step_is_the_learning_rate_against_the_signs_of_the_clipped_gradient_and_its_decay() -> (
    None
):
    """The penalty is added to the gradient before it: at w = (1, -1) with decay 0.5, (3, 0.1) + (0.5, -0.5)
    has signs + and -.
    """
    adam = ["schedule.optimiser=adam", "schedule.lr=0.01"]
    weights, norm = one_step(
        *(*adam, "schedule.clip=inf", "schedule.weight_decay=0.5"),
        start=[1.0, -1.0],
        gradient=[3.0, 0.1],
        lr=0.01,
    )
    assert norm == pytest.approx(math.hypot(3, 0.1)) and weights == pytest.approx([0.99, -0.99], rel=1e-6)
    weights, _ = one_step(
        *(*adam, "schedule.clip=1e-3", "schedule.weight_decay=0.5"), start=[-1e-4], gradient=[3.0], lr=0.01
    )
    assert weights == pytest.approx([-1e-4 - 0.01], rel=1e-3), "clipped to 1e-3, above the decay's 5e-5"
    weights, _ = one_step(
        *(*adam, "schedule.clip=1e-5", "schedule.weight_decay=0.5"), start=[-1e-4], gradient=[3.0], lr=0.01
    )
    assert weights == pytest.approx([-1e-4 + 0.01], rel=1e-3), "clipped to 1e-5, below it"


def test_adamw_shrinks_the_weights_by_the_learning_rate_times_the_decay_beside_its_step() -> None:
    """The decay has no part in the gradient: (2, -2)·(1 - 0.01·0.5) - 0.01·(1, 1)."""
    adamw = [
        "schedule.optimiser=adamw",
        "schedule.lr=0.01",
        "schedule.clip=null",
        "schedule.weight_decay=0.5",
    ]
    weights, norm = one_step(*adamw, start=[2.0, -2.0], gradient=[3.0, 0.1], lr=0.01)
    assert norm == pytest.approx(math.hypot(3, 0.1))
    assert weights == pytest.approx([2 * 0.995 - 0.01, -2 * 0.995 - 0.01], rel=1e-6)


@pytest.mark.parametrize("descent", [OptimizerName.adam, OptimizerName.adamw])
def test_the_decays_of_adams_moments_are_free(descent: OptimizerName) -> None:
    """With beta1 = 0 (Melis et al. 2018) the second step knows nothing of the first gradient's sign: it is
    lr·g/√(mean of squares), mean of squares = (0.5·0.5·1 + 0.5·4) / (1 - 0.25) with beta2 = 0.5.
    """
    options = ["schedule.lr=0.1", "schedule.beta1=0", "schedule.beta2=0.5", "schedule.weight_decay=0"]
    schedule = settings(f"schedule.optimiser={descent}", *options).schedule
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    optimiser = Optimizer(model, schedule)
    optimiser.step(-model.w.sum(), 0.1)
    assert model.w.item() == pytest.approx(0.1)
    optimiser.step(2 * model.w.sum(), 0.1)
    assert model.w.item() == pytest.approx(0.1 - 0.1 * 2 / (2.25 / 0.75) ** 0.5)


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    """With weight decay."""
    return settings(
        "model=lstm_small", "dropout=none", "schedule.lr=0.05", "schedule.weight_decay=0.01"
    ).schedule


def trained(
    schedule: Schedule, delayed: bool, bad: float | None = None, steps: int = 6
) -> tuple[list[float], list[tuple[float, float]]]:
    """Weights and what was read of each step, with gradients of all sizes; that of the third step is
    `bad`.
    """
    model = nn.Module()
    model.w, model.b = (nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64)) for size in (53, 3))
    optimiser, numbers = Optimizer(model, schedule, delayed=delayed), []
    for step in range(steps):
        size = bad if bad is not None and step == 2 else 3.0 ** (step - 2)
        loss = size * (model.w.sin().sum() + (model.b**2).sum())
        numbers.append(optimiser.step(loss, schedule.lr / 2**step).read())
    return [*model.w.tolist(), *model.b.tolist()], numbers


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("descent", list(OptimizerName))
@pytest.mark.parametrize("clip", [5.0, 1e-2, None])
def test_a_delayed_update_is_that_of_the_immediate_one(
    schedule: Schedule, descent: OptimizerName, clip: float | None, bad: float | None
) -> None:
    """Clipped or not; after a gradient that is not finite, too."""
    schedule = replace(schedule, optimiser=descent, clip=clip)
    (losses, numbers), (expected, exact) = (trained(schedule, delayed, bad) for delayed in (True, False))
    assert losses == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert all(a == pytest.approx(b, rel=1e-6, nan_ok=True) for a, b in zip(numbers, exact, strict=True))
    assert [step for step, (_, norm) in enumerate(numbers) if not math.isfinite(norm)] == (
        [] if bad is None else [2]
    )
    shorter, _ = trained(schedule, True, steps=2)
    assert (trained(schedule, True, bad, steps=3)[0] == shorter) is (bad is not None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    weights, norm = one_step(start=[1.0, 2.0], gradient=[bad, 1.0])
    assert weights == [1.0, 2.0]
    assert not math.isfinite(norm)
