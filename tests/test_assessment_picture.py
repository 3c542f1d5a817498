"""The picture of an evaluation of ratings shows the numbers of its tables."""

import pytest

pytest.importorskip("matplotlib")

from tests.test_assessment import TEXTS, assessed
from vdrop_cli.assessment_picture import BARS, BINS, draw
from vdrop_cli.settings.choices import Interval


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
