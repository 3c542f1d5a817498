"""The picture of an evaluation: whether it can be written, and that of a language model."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdrop_cli import assessment_picture, pictures
from vdrop_cli.assessment import Assessment
from vdrop_cli.evaluation_report import evaluated_part
from vdrop_cli.metric_names import TEXTS
from vdrop_cli.next_word import BINS
from vdrop_cli.settings.commands import Eval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = Mapping[str, Any]  # what `vdrop eval` writes


def require_writable(settings: Eval) -> None:
    """Raises ConfigError where the picture that the settings ask for could not be written."""
    if settings.picture is not None:
        pictures.require_writable(Path(settings.picture))


def write(results: Results, assessment: Assessment | None, settings: Eval) -> None:
    """Writes the picture that the settings ask for. Ratings have an assessment."""
    if settings.picture is None:
        return
    figure = (
        language_model(results)
        if assessment is None
        else assessment_picture.draw(assessment, settings.interval)
    )
    pictures.save(figure, Path(settings.picture))


def language_model(results: Results) -> "Figure":
    """Perplexity by number of passes, and a reliability diagram, as far as the results have them."""
    tables = results.get("tables", {})
    reliability = {
        name: tables[table]
        for table, name in (
            ("reliability", "standard approximation"),
            ("reliability_mc", "MC samples averaged"),
        )
        if table in tables
    }
    figure, every = pictures.panels(("mc" in results) + bool(reliability), width=6)
    panels = iter(every)
    if "mc" in results:
        part = evaluated_part(results)
        draw_passes(
            next(panels), results["mc"], results["metrics"][f"{part}_ppl"], f"{TEXTS[part]} perplexity"
        )
    if reliability:
        draw_reliability(next(panels), reliability)
    return figure


def draw_passes(axes: "Axes", rows: list[dict[str, Any]], standard: float, label: str) -> None:
    """Draws the perplexity by the number of passes; a line shows the standard approximation.

    `label` names the perplexity on its axis.
    """
    axes.errorbar(
        [row["samples"] for row in rows],
        [row["ppl"] for row in rows],
        [row["deviation"] or 0.0 for row in rows],
        color="tab:blue",
        marker="o",
        markersize=4,
        capsize=3,
        label="MC samples averaged",
    )
    axes.axhline(standard, color="black", linestyle="--", label="standard approximation")
    axes.set_xscale("log")
    counts = [row["samples"] for row in rows]
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("MC samples (log scale)\nbars: standard deviation over groups of so many samples")
    axes.set_ylabel(label)
    axes.legend(fontsize="small")


def draw_reliability(axes: "Axes", tables: Mapping[str, list[dict[str, Any]]]) -> None:
    """Draws accuracy by confidence, a curve for each of `tables`, which are by name.

    Bars show the share of tokens in each bin of the last table.
    """
    rows = list(tables.values())[-1]
    total = sum(row["tokens"] for row in rows)
    axes.bar(
        [(math.ceil(row["confidence"] * BINS) - 0.5) / BINS for row in rows],
        [row["tokens"] / total for row in rows],
        1 / BINS,
        color="0.85",
        edgecolor="0.7",
        label="share of tokens",
    )
    axes.plot([0, 1], [0, 1], ":", color="black", label="calibrated")
    looks = (("black", "s", "--"), ("tab:blue", "o", "-"))
    for (name, points), (color, marker, line) in zip(tables.items(), looks, strict=False):
        confidence = [row["confidence"] for row in points]
        accuracy = [row["accuracy"] for row in points]
        axes.plot(confidence, accuracy, line, color=color, marker=marker, markersize=4, label=name)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("probability of the most probable word, mean of each bin")
    axes.set_ylabel("share of tokens for which that word is right")
    axes.legend(fontsize="small")
