"""Uncertainty of predicted ratings of a test part: likelihood, intervals, groups, selective prediction.

R test texts  n validation texts
"""

from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from vdrop_cli.intervals import (
    CURVE,
    LEVELS,
    Intervals,
    TooFewTexts,
    calibration_error,
    conformal,
    gaussian,
    quantile,
)
from vdrop_cli.selective import SHARES, area, error_at, errors_by_count
from vdrop_cli.uncertainty import Predictive, rmse

LEVEL = 95  # per cent, of widths, interval scores and groups
LENGTH_GROUPS = 4

Row = dict[str, Any]  # a row of a table: values by column


@dataclass(frozen=True)
class Assessment:
    """A test part with its predictions. Without a validation part, conformal intervals are left out."""

    predicted: Predictive
    ratings_R: Tensor
    lengths_R: Tensor  # tokens
    scores_n: Tensor | None = None  # of `conformal_scores` on the validation part
    sources: list[str] = field(default_factory=list)  # of each text, such as its reviewer; empty: unknown

    @cached_property
    def intervals(self) -> dict[str, Intervals]:
        """Every kind of interval by its name; each level is computed once."""
        kinds = {"gaussian": gaussian(self.predicted), "quantile": quantile(self.predicted)}
        if self.scores_n is not None:
            kinds["conformal"] = conformal(self.predicted, self.scores_n)
        return {kind: cache(intervals) for kind, intervals in kinds.items()}

    @property
    def problems(self) -> list[str]:
        """Reasons why conformal intervals are left out, at all levels or at the highest ones; a line each."""
        if self.scores_n is None:
            return [
                "conformal intervals are left out: there is no validation part that training has not seen"
            ]
        try:
            self.intervals["conformal"](max(CURVE))
        except TooFewTexts as reason:
            return [f"{reason}; those of such levels are left out"]
        return []

    def metrics(self, suffix: str) -> dict[str, float]:
        """All metrics by name, with Gaussian intervals; names end with `suffix`, such as _mc50."""
        intervals = self.intervals["gaussian"]
        bounds = {level: intervals(level) for level in LEVELS}
        metrics = {"test_log_likelihood": self.predicted.log_likelihood(self.ratings_R)}
        metrics["test_crps"] = self.predicted.crps(self.ratings_R)
        metrics["noise"] = self.predicted.noise
        metrics |= {f"test_coverage_{level}": bounds[level].coverage(self.ratings_R) for level in LEVELS}
        metrics[f"test_width_{LEVEL}"] = bounds[LEVEL].width()
        metrics[f"test_interval_score_{LEVEL}"] = bounds[LEVEL].score(self.ratings_R, LEVEL)
        metrics["test_calibration_error"] = calibration_error(intervals, self.ratings_R)
        if self.has_spread:
            metrics["test_aurc"] = area(self.errors_by_count(self.predicted.std_R))
        return {f"{name}{suffix}": value for name, value in metrics.items()}

    @property
    def has_spread(self) -> bool:
        """Whether the standard deviation differs between texts, so that some are more certain."""
        return bool((self.predicted.std_R != self.predicted.std_R[0]).any())

    def errors_by_count(self, uncertainty_R: Tensor) -> Tensor:
        return errors_by_count(uncertainty_R, (self.predicted.mean_R - self.ratings_R).square())

    def tables(self) -> dict[str, list[Row]]:
        return {
            "calibration": self.calibration(),
            "intervals": self.sharpness(),
            "groups": self.groups(),
            "selective": self.selective(),
        }

    def calibration(self) -> list[Row]:
        """The share of ratings in the intervals of each kind by level; None where texts are too few."""
        return [{"level": level} | self.coverages(level) for level in CURVE]

    def coverages(self, level: float, chosen_R: Tensor | None = None) -> dict[str, float | None]:
        """The share of ratings in the intervals of each kind, of all texts or the chosen ones."""
        shares: dict[str, float | None] = {}
        for kind, intervals in self.intervals.items():
            try:
                inside_R = intervals(level).contains(self.ratings_R).double()
            except TooFewTexts:
                shares[kind] = None
            else:
                shares[kind] = (inside_R if chosen_R is None else inside_R[chosen_R]).mean().item()
        return shares

    def sharpness(self) -> list[Row]:
        rows = []
        for kind, intervals in self.intervals.items():
            try:
                bounds = intervals(LEVEL)
            except TooFewTexts:
                continue
            rows.append(
                {
                    "intervals": kind,
                    f"width_{LEVEL}": bounds.width(),
                    f"score_{LEVEL}": bounds.score(self.ratings_R, LEVEL),
                    "calibration_error": calibration_error(intervals, self.ratings_R),
                }
            )
        return rows

    def groups(self) -> list[Row]:
        """Error and coverage by source and by length."""
        chosen = {
            source: torch.tensor([s == source for s in self.sources]) for source in sorted({*self.sources})
        }
        edges = [int(self.lengths_R.double().quantile(i / LENGTH_GROUPS)) for i in range(1, LENGTH_GROUPS)]
        low = int(self.lengths_R.min())
        for high in sorted({*edges, int(self.lengths_R.max())}):
            inside_R = (self.lengths_R >= low) & (self.lengths_R <= high)
            if inside_R.any():
                chosen[f"{low:,} to {high:,} tokens"] = inside_R
            low = high + 1
        return [
            {
                "group": name,
                "texts": int(chosen_R.sum()),
                "rmse": rmse(self.predicted.mean_R[chosen_R], self.ratings_R[chosen_R]),
            }
            | self.coverages(LEVEL, chosen_R)
            for name, chosen_R in chosen.items()
        ]

    def selective(self) -> list[Row]:
        """Returns the RMSE of the most certain texts, by their share of all texts in per cent.

        There is a column for each order of the texts: by standard deviation, by length (long texts count as
        certain), and by the error itself, the best possible order. The last row has the areas under the
        curves.
        """
        orders = {"std": self.predicted.std_R} if self.has_spread else {}
        orders |= {
            "length": -self.lengths_R.double(),
            "error": (self.predicted.mean_R - self.ratings_R).abs(),
        }
        curves = {name: self.errors_by_count(order_R) for name, order_R in orders.items()}
        rows: list[Row] = [
            {"share": share} | {name: error_at(errors_R, share) for name, errors_R in curves.items()}
            for share in SHARES
        ]
        return [*rows, {"share": "area"} | {name: area(errors_R) for name, errors_R in curves.items()}]
