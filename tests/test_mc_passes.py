"""What passes of MC dropout have in common; how each kind stops and resumes is in the tests of its module."""

import pytest
import torch

from vdrop_cli.mc_passes import is_numeric, is_state_of, mc_row, place_in_text, sample_counts


def test_sample_counts_end_with_all_samples() -> None:
    assert sample_counts(1) == [1]
    assert sample_counts(7) == [1, 2, 5, 7]
    assert sample_counts(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def test_a_row_has_mean_and_standard_deviation_over_groups() -> None:
    assert mc_row("ppl", 2, [1.0, 3.0]) == {
        "samples": 2,
        "ppl": 2.0,
        "deviation": pytest.approx(2**0.5),
        "groups": 2,
    }
    assert mc_row("rmse", 5, [0.25]) == {"samples": 5, "rmse": 0.25, "deviation": None, "groups": 1}
    assert list(mc_row("rmse", 5, [0.25])) == ["samples", "rmse", "deviation", "groups"]


def test_a_state_has_the_shapes_and_types_of_the_models() -> None:
    zeros = (torch.zeros(2, 3), torch.zeros(2, 4))
    good = [torch.ones(2, 3), torch.ones(2, 4)]
    assert is_state_of(good, zeros) and is_state_of([], ())
    for wrong in (None, tuple(good), good[:1], good[::-1], [good[0], good[1].double()], [good[0], None]):
        assert not is_state_of(wrong, zeros)
    assert not is_state_of([good[0], good[1] * torch.nan], zeros)
    assert is_numeric(torch.tensor([torch.inf]), (1,), torch.float32)


def test_a_place_is_that_of_a_segment_or_the_end() -> None:
    for number in (0, 1, 2, 3):
        assert place_in_text(number, 70 if number < 3 else 71, 35) == number
    for wrong in (-1, 3, True, 1.0, "1", None):
        with pytest.raises(ValueError, match="its place is outside the text"):
            place_in_text(wrong, 70, 35)
