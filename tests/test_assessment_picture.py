"""The picture of an evaluation of ratings shows the numbers of its tables."""

import pytest

pytest.importorskip("matplotlib")

from tests.test_assessment import TEXTS, assessed
from vdrop_cli.assessment_picture import BARS, BINS, draw
from vdrop_cli.settings.choices import Interval
from vdrop_cli.uncertainty import rmse


def test_the_axes_show_what_the_tables_say() -> None:
    one = assessed()
    calibration, ratings, selective, errors = draw(one).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in calibration.lines[1:]}
    expected = {kind: [100 * row[kind] for row in one.calibration()] for kind in one.intervals}
    assert drawn == expected
    assert f"{BARS} of {TEXTS} texts" in ratings.get_xlabel() and "conformal" in ratings.get_ylabel()
    rows = one.selective()[:-1]
    assert [list(line.get_ydata()) for line in selective.lines] == [
        [row[name] for row in rows] for name in ("std", "length", "error")
    ]
    (curve, diagonal) = errors.lines
    assert len(curve.get_xdata()) == BINS and list(curve.get_xdata()) == sorted(curve.get_xdata())
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    squares = [error**2 for error in curve.get_ydata()]
    whole = rmse(one.predicted.mean_R, one.ratings_R)
    assert (sum(squares) / BINS) ** 0.5 == pytest.approx(whole), "groups of one size"


def test_ratings_are_drawn_across_and_predictions_upwards_with_the_ends_of_their_intervals() -> None:
    """The first text and the last one are among those that are drawn."""
    one = assessed()
    _, axes, *_ = draw(one, Interval.quantile).axes
    points, _, (bars,) = axes.containers[0]
    low_R, high_R = one.intervals["quantile"](95)
    assert len(bars.get_segments()) == BARS
    for end in (0, -1):
        rating, mean = one.ratings_R[end].item(), one.predicted.mean_R[end].item()
        assert (points.get_xdata()[end], points.get_ydata()[end]) == (rating, mean)
        ends = [rating, low_R[end].item(), rating, high_R[end].item()]
        assert bars.get_segments()[end].flatten().tolist() == pytest.approx(ends)


def test_a_kind_of_interval_is_drawn_alone() -> None:
    calibration, ratings, *_ = draw(assessed(), Interval.quantile).axes
    assert [line.get_label() for line in calibration.lines] == ["calibrated", "quantile"]
    assert "quantile" in ratings.get_ylabel()


def test_without_a_spread_the_error_by_it_is_left_out() -> None:
    figure = draw(assessed(passes=1))
    assert len(figure.axes) == 3 and len(figure.axes[2].lines) == 2


def test_levels_without_conformal_intervals_are_left_out() -> None:
    """10 validation texts are too few for 95 %: the curve ends before, the error bars are Gaussian."""
    calibration, ratings, *_ = draw(assessed(validation=10), Interval.conformal).axes
    assert max(calibration.lines[1].get_xdata()) == 90 and "gaussian" in ratings.get_ylabel()
