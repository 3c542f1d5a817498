"""The error that remains when the most uncertain texts are left out, by law and by hand."""

import math

import pytest
import torch

from vdrop_cli.selective import area, error_at, errors_by_count


def test_the_most_certain_come_first() -> None:
    errors = errors_by_count(torch.tensor([3.0, 1, 2]), torch.tensor([9.0, 1, 4]))
    assert errors.tolist() == pytest.approx([1, math.sqrt(5 / 2), math.sqrt(14 / 3)])
    assert area(errors) == pytest.approx(sum(errors.tolist()) / 3)


def test_texts_that_are_equally_certain_share_their_error() -> None:
    """Whatever their order: with one uncertainty for all, the curve is flat at the RMSE."""
    squared = torch.tensor([0.0, 1, 2, 5])
    assert errors_by_count(torch.ones(4), squared).tolist() == pytest.approx([math.sqrt(2)] * 4)
    tied = torch.tensor([1.0, 0, 1, 1])
    order = torch.tensor([3, 2, 1, 0])
    one, other = errors_by_count(tied, squared), errors_by_count(tied[order], squared[order])
    torch.testing.assert_close(one, other)
    assert one.tolist() == pytest.approx(
        [1, math.sqrt((1 + 7 / 3) / 2), math.sqrt((1 + 14 / 3) / 3), math.sqrt(2)]
    )


def test_no_order_is_better_than_that_of_the_error_and_all_end_at_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    squared = torch.rand(500, generator=generator)
    best = errors_by_count(squared, squared)
    worst = errors_by_count(-squared, squared)
    for _ in range(5):
        other = errors_by_count(torch.rand(500, generator=generator), squared)
        assert bool((best <= other + 1e-12).all()) and bool((other <= worst + 1e-12).all())
        assert area(best) < area(other) < area(worst)
        assert (
            other[-1].item() == pytest.approx(best[-1].item()) == pytest.approx(squared.mean().sqrt().item())
        )


def test_a_share_keeps_at_least_one_text() -> None:
    errors = torch.arange(1.0, 11.0)
    assert [error_at(errors, share) for share in (100, 50, 10, 1)] == [10, 5, 1, 1]
