"""The picture of an evaluation of ratings: calibration, predictions, selective prediction, errors."""

from typing import TYPE_CHECKING

import torch

from vdrop_cli.assessment import LEVEL, Assessment
from vdrop_cli.intervals import TooFewTexts
from vdrop_cli.pictures import panels
from vdrop_cli.settings.choices import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 10  # groups of texts with like standard deviations
BARS = 200  # the largest number of texts with error bars
STYLES = {"gaussian": ("tab:blue", "o"), "quantile": ("tab:orange", "s"), "conformal": ("tab:green", "^")}
ORDERS = {"std": "by standard deviation", "length": "by length", "error": "by the error itself"}


def draw(assessment: Assessment, interval: Interval | None = None) -> "Figure":
    """Returns a figure: calibration, predicted against true ratings, selective prediction, errors.

    The fourth axes show the error by standard deviation. They are left out where all texts have the same
    standard deviation. `interval` is the only kind of interval that is drawn; None: all kinds.
    """
    kinds = [kind for kind in assessment.intervals if interval is None or kind == str(interval)]
    count = 4 if assessment.has_spread else 3
    figure, axes = panels(count, width=5, height=4.5)
    draw_calibration(axes[0], assessment, kinds)
    draw_ratings(axes[1], assessment, kinds[-1])
    draw_selective(axes[2], assessment)
    if assessment.has_spread:
        draw_errors(axes[3], assessment)
    return figure


def draw_calibration(axes: "Axes", assessment: Assessment, kinds: list[str]) -> None:
    """Draws the share of ratings inside the intervals by level; on the diagonal both are equal."""
    axes.plot([0, 100], [0, 100], color="0.5", linestyle="--", label="calibrated")
    rows = assessment.calibration()
    for kind in kinds:
        shown = [row for row in rows if row[kind] is not None]
        colour, marker = STYLES[kind]
        shares = [100 * row[kind] for row in shown]
        axes.plot(
            [row["level"] for row in shown], shares, color=colour, marker=marker, markersize=4, label=kind
        )
    axes.set_xlabel("level of the interval, %")
    axes.set_ylabel("test ratings inside, %")
    axes.legend(fontsize="small", loc="upper left")


def draw_ratings(axes: "Axes", assessment: Assessment, kind: str) -> None:
    """Predicted against true ratings, with intervals; evenly spaced texts where there are many."""
    texts = len(assessment.ratings_R)
    shown = torch.linspace(0, texts - 1, min(texts, BARS)).round().long()
    mean, ratings = assessment.predicted.mean_R[shown], assessment.ratings_R[shown]
    try:
        low_R, high_R = assessment.intervals[kind](LEVEL)
    except TooFewTexts:
        kind = "gaussian"
        low_R, high_R = assessment.intervals[kind](LEVEL)
    bars = torch.stack([mean - low_R[shown], high_R[shown] - mean]).clamp(min=0)
    points = (ratings.numpy(), mean.numpy(), bars.numpy())  # older versions of Matplotlib take no tensors
    axes.errorbar(*points, fmt="o", markersize=3, elinewidth=0.5, color="tab:blue", ecolor="0.75", alpha=0.8)
    ends = [ratings.min().item(), ratings.max().item()]
    axes.plot(ends, ends, color="0.3", linestyle="--")
    axes.set_xlabel(f"true rating ({len(shown):,} of {texts:,} texts)")
    axes.set_ylabel(f"predicted rating, {kind} {LEVEL} % intervals")


def draw_selective(axes: "Axes", assessment: Assessment) -> None:
    """The error of the most certain texts by their share."""
    rows = assessment.selective()[:-1]
    for (name, label), marker in zip(ORDERS.items(), "os^", strict=True):
        if name in rows[0]:
            axes.plot(
                [row["share"] for row in rows],
                [row[name] for row in rows],
                marker=marker,
                markersize=4,
                label=label,
            )
    axes.set_xlabel("share of texts, the most certain ones, %")
    axes.set_ylabel("test RMSE (rating units)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def draw_errors(axes: "Axes", assessment: Assessment) -> None:
    """Draws the RMSE of groups of texts with similar standard deviations; on the diagonal both are equal."""
    std_R = assessment.predicted.std_R
    squared_R = (assessment.predicted.mean_R - assessment.ratings_R).square()
    groups = [group for group in std_R.argsort().tensor_split(BINS) if len(group)]
    stds = [std_R[group].mean().item() for group in groups]
    errors = [squared_R[group].mean().sqrt().item() for group in groups]
    axes.plot(stds, errors, "o-", color="tab:blue", markersize=4)
    ends = [min(stds), max(stds)]
    axes.plot(ends, ends, color="0.5", linestyle="--")
    axes.set_xlabel(f"predicted standard deviation, {len(groups)} groups of texts")
    axes.set_ylabel("test RMSE (rating units)")
