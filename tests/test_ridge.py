"""Ridge regression on TF-IDF, where scikit-learn is."""

import pytest
import torch

from vdrop_cli import ridge
from vdrop_cli.ridge import Texts

if not ridge.is_available():
    pytest.skip("needs scikit-learn: pip install 'vdrop[baselines]'", allow_module_level=True)


def texts(seed: int, noise: float = 0.0) -> Texts:
    """100 texts of 20 words out of 30; the rating is how many are below 10, and noise."""
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(30, (100, 20), generator=draws)
    return ids.tolist(), (ids < 10).sum(1).float() + noise * torch.randn(100, generator=draws)


def error(predicted: torch.Tensor, of: Texts) -> float:
    return (predicted - of[1]).square().mean().sqrt().item()


def test_it_learns_which_words_count() -> None:
    train, test = texts(0), texts(1)
    assert error(ridge.ridge(train, test), test) < 0.5 * error(train[1].mean(), test)


def test_the_penalty_is_chosen_on_validation() -> None:
    """Where ratings are mostly noise, validation asks for a stronger one than 1; where they are none, for a
    weaker.
    """
    for noise, stronger in ((10.0, True), (0.0, False)):
        train = texts(0, noise)
        valid = texts(2, noise)
        test = texts(1, noise)
        chosen, one = ridge.ridge(train, test, valid), ridge.ridge(train, test)
        assert (chosen.std() < one.std()) == stronger and not torch.equal(chosen, one)


def test_words_that_are_new_are_left_out() -> None:
    train = texts(0)
    predicted = ridge.ridge(train, ([[99], []], torch.zeros(2)))
    assert torch.isfinite(predicted).all() and predicted[0] == predicted[1]
