"""The tables of an evaluation of ratings agree with their definitions and with each other."""

import pytest
import torch

from vdrop_cli.assessment import Assessment
from vdrop_cli.intervals import CURVE, LEVELS, calibration_error, conformal_scores
from vdrop_cli.uncertainty import Predictive, rmse

TEXTS = 400


def assessed(std: float = 1.0, validation: int = 200, passes: int = 20) -> Assessment:
    """Texts whose error grows with their standard deviation, which shrinks with their length."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    lengths = torch.arange(1, TEXTS + 1)
    spread = std * (1 + 3 / lengths.double().sqrt())
    predicted = Predictive(drawn(passes, TEXTS) * spread, 0.5)
    ratings = drawn(TEXTS) * spread + 0.5 * drawn(TEXTS)
    other = Predictive(drawn(passes, validation), 0.5)
    scores = conformal_scores(other, drawn(validation) * 1.2)
    return Assessment(predicted, ratings, lengths, scores, ["a", "b"] * (TEXTS // 2))


def test_metrics_are_those_of_the_gaussian_intervals() -> None:
    one = assessed()
    metrics = one.metrics("_mc20")
    intervals = one.intervals["gaussian"]
    shares = [metrics[f"test_coverage_{level}_mc20"] for level in LEVELS]
    assert shares == [intervals(level).coverage(one.ratings_R) for level in LEVELS]
    assert shares == sorted({*shares}), "each level has a share of its own"
    assert metrics["test_width_95_mc20"] == pytest.approx(2 * 1.959964 * one.predicted.std_R.mean().item())
    assert metrics["test_interval_score_95_mc20"] == intervals(95).score(one.ratings_R, 95)
    assert metrics["test_calibration_error_mc20"] == calibration_error(intervals, one.ratings_R)
    assert metrics["test_crps_mc20"] == one.predicted.crps(one.ratings_R)
    assert metrics["test_log_likelihood_mc20"] == one.predicted.log_likelihood(one.ratings_R)


def test_the_table_of_intervals_has_the_numbers_of_each_kind() -> None:
    one = assessed()
    rows = one.sharpness()
    assert rows == [
        {
            "intervals": kind,
            "width_95": intervals(95).width(),
            "score_95": intervals(95).score(one.ratings_R, 95),
            "calibration_error": calibration_error(intervals, one.ratings_R),
        }
        for kind, intervals in one.intervals.items()
    ]
    assert len({row["calibration_error"] for row in rows}) == 3, "the kinds differ"


def test_the_calibration_curve_rises_and_agrees_with_the_metrics() -> None:
    one = assessed()
    rows = one.calibration()
    assert [row["level"] for row in rows] == list(CURVE)
    for kind in ("gaussian", "quantile", "conformal"):
        shares = [row[kind] for row in rows]
        assert shares == sorted(shares) and shares[0] < 0.3 and shares[-1] > 0.85
    assert rows[-1]["gaussian"] == one.metrics("")["test_coverage_95"]


def test_groups_have_every_text_once_and_their_coverages_give_the_whole() -> None:
    one = assessed()
    rows = one.groups()
    whole = one.coverages(95)
    for named in (rows[:2], rows[2:]):
        assert sum(row["texts"] for row in named) == TEXTS
        for kind, share in whole.items():
            assert sum(row["texts"] * row[kind] for row in named) / TEXTS == pytest.approx(share)
        squares = sum(row["texts"] * row["rmse"] ** 2 for row in named) / TEXTS
        assert squares**0.5 == pytest.approx(rmse(one.predicted.mean_R, one.ratings_R))
    assert [row["group"] for row in rows] == [
        *("a", "b"),
        *("1 to 100 tokens", "101 to 200 tokens", "201 to 300 tokens", "301 to 400 tokens"),
    ]


def test_texts_of_one_length_are_one_group() -> None:
    one = assessed()
    same = Assessment(one.predicted, one.ratings_R, torch.full((TEXTS,), 7))
    (row,) = same.groups()
    assert row["group"] == "7 to 7 tokens" and row["texts"] == TEXTS and "conformal" not in row


def test_selective_prediction_uses_what_knows_the_error() -> None:
    """Here standard deviation and length do, and the error itself does best."""
    one = assessed()
    *rows, areas = one.selective()
    whole = rmse(one.predicted.mean_R, one.ratings_R)
    assert rows[0] == {"share": 100} | dict.fromkeys(("std", "length", "error"), pytest.approx(whole))
    assert areas["error"] < areas["std"] < rows[0]["std"] and areas["length"] < rows[0]["length"]
    assert areas["std"] == one.metrics("")["test_aurc"]


def test_without_a_spread_there_is_no_order_by_it() -> None:
    one = assessed(passes=1)
    assert "test_aurc" not in one.metrics("") and "std" not in one.selective()[0]


def test_levels_that_take_more_validation_texts_are_left_out() -> None:
    one = assessed(validation=10)  # 95 % takes 19
    shares = {row["level"]: row["conformal"] for row in one.calibration()}
    assert shares[90] is not None and shares[95] is None
    assert [row["intervals"] for row in one.sharpness()] == ["gaussian", "quantile"]
    (problem,) = one.problems
    assert "conformal intervals of 95 % need 19 validation texts, got 10" in problem
    assert assessed().problems == []
    without = Assessment(one.predicted, one.ratings_R, one.lengths_R)
    assert without.problems and "conformal" not in without.calibration()[0]
    assert all(row["conformal"] is None for row in one.groups())
