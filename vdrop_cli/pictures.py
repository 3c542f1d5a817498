"""Pictures of runs, readable in black and white too; their axes have names and units."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from vdrop_cli import files, ownership
from vdrop_cli.errors import ConfigError
from vdrop_cli.policies import Policy
from vdrop_cli.runs import Finished
from vdrop_cli.settings.choices import TaskName

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")
MARKS = 40  # the largest number of markers on a curve, about
MARKERS = "osD^vPX*"  # curves differ without colour, too
LONG_LABEL = 26  # characters; a legend with longer labels stands below the axes
COLOURS = {  # by policy, and whether its masks are untied
    (Policy.none, False): "0.35",
    (Policy.zaremba, False): "tab:orange",
    (Policy.naive, False): "tab:green",
    (Policy.moon, False): "tab:purple",
    (Policy.variational, False): "tab:blue",
    (Policy.variational, True): "tab:cyan",
}
BASELINES = {"test_rmse_of_mean": "predicting the mean", "test_rmse_of_ridge": "ridge regression on TF-IDF"}
BASELINE_STYLES = ("--", "-.")  # of their lines
Curves = Mapping[str, Finished | Sequence[Finished]]  # runs by label; those of a list differ only in seeds


def require_matplotlib() -> None:
    """Raises ConfigError if Matplotlib is not installed; it is an extra."""
    if find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib; pip install 'vdrop[plot]'")


def canvas(height: float = 5) -> "tuple[Figure, Axes]":
    figure, (axes,) = panels(1, height=height)
    return figure, axes


def panels(count: int, width: float = 8, height: float = 5) -> "tuple[Figure, list[Axes]]":
    """Returns a figure with `count` axes side by side; `width` and `height` of each are in inches."""
    require_matplotlib()
    from matplotlib.figure import Figure  # slow to import, so only where it is used

    figure = Figure(figsize=(count * width, height), layout="constrained")
    every = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in every:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, every


def labels(names: Sequence[str], details: Sequence[str]) -> list[str]:
    """The names; those that occur more than once are followed by their details."""
    return [
        f"{name} ({detail})" if names.count(name) > 1 else name
        for name, detail in zip(names, details, strict=True)
    ]


def save(figure: "Figure", path: Path, key: str = "picture") -> None:
    """Writes a picture where the setting `key` says.

    Raises ConfigError if its ending is unknown, if its folder cannot be made, or if it would overwrite a file
    that is no drawing; RunError if it cannot be written.
    """
    ownership.require_own(path, is_drawing, "choose another file")
    drawn = BytesIO()
    try:
        figure.savefig(drawn, format=path.suffix.removeprefix(".") or None, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the picture {path} cannot be drawn ({error}); choose another file") from None
    files.write_output(path, drawn.getbuffer(), key)


def require_writable(path: Path) -> None:
    """Raises ConfigError where `save` would, as far as that can be known before anything is drawn."""
    require_matplotlib()
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"picture must end in {', '.join(ENDINGS)}, got {path}")
    ownership.require_own(path, is_drawing, "choose another file")


def is_drawing(content: bytes) -> bool:
    """Whether a file is empty or of Matplotlib, by the mark that it leaves in PNG, SVG and PDF."""
    return not content or b"matplotlib" in content.lower()


@dataclass(frozen=True)
class Measure:
    """A metric of an epoch, and its name in the legend."""

    metric: str
    name: str


def curves(runs: Curves, title: str | None = None) -> "Figure":
    """Learning curves of perplexity or of the error of ratings. Raises ConfigError for runs of two tasks."""
    tasks = {run.train.task.name for group in runs.values() for run in runs_of(group)}
    if len(tasks) > 1:
        raise ConfigError(
            "a picture is of runs of one task; compare language models and models of ratings apart"
        )
    if TaskName.sentiment in tasks:
        return error_curves(runs, title)
    return learning_curves(runs, training=True, title=title)


def runs_of(runs: Finished | Sequence[Finished]) -> Sequence[Finished]:
    return [runs] if isinstance(runs, Finished) else runs


def epochs_figure(
    runs: Curves, solid: Measure, dotted: Measure | None, title: str | None
) -> "tuple[Figure, Axes]":
    """Draws one or two metrics by epoch: for each name, a curve of the mean over its runs.

    A band around the solid curve shows the range from the lowest to the highest run. The colour stands for
    the dropout policy, the marker for the name.
    """
    figure, axes = canvas()
    from matplotlib.ticker import MaxNLocator

    measures = [solid, *([dotted] if dotted else [])]
    has_band = False
    for (name, group), marker in zip(runs.items(), cycle(MARKERS), strict=False):
        whole = [run for run in runs_of(group) if has_curve(run, *(one.metric for one in measures))]
        if not whole:
            continue
        count = min(len(run.epochs) for run in whole)  # a mean over all seeds exists up to here
        epochs = [record["epoch"] for record in whole[0].epochs[:count]]
        style: dict[str, Any] = {
            "color": colour(whole[0]),
            "marker": marker,
            "markersize": 4,
            "markevery": max(1, count // MARKS),
        }
        for measure, line in zip(measures, ("-", ":"), strict=False):
            by_run = [[record[measure.metric] for record in run.epochs[:count]] for run in whole]
            by_number = list(zip(*by_run, strict=True))
            label = name if measure is solid else f"_{measure.name}"  # Matplotlib leaves "_…" out of legends
            fill = "full" if measure is solid else "none"
            axes.plot(epochs, [*map(fmean, by_number)], line, label=label, fillstyle=fill, **style)
            if len(whole) > 1 and measure is solid:
                has_band = True
                low, high = [*map(min, by_number)], [*map(max, by_number)]
                axes.fill_between(epochs, low, high, color=style["color"], alpha=0.2, linewidth=0)
    if dotted:
        for measure, line in zip(measures, ("-", ":"), strict=False):
            axes.plot([], [], line, color="black", label=measure.name)
    axes.set_xlabel("epoch" + ("; mean over seeds, band: lowest to highest" if has_band else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if title:
        axes.set_title(title)
    return figure, axes


def colour(run: Finished) -> str:
    dropout = run.train.dropout
    return COLOURS[dropout.policy, dropout.untied]


def add_legend(figure: "Figure", axes: "Axes") -> None:
    """A legend beside the axes, or below them if its labels are long, so that it hides no curve."""
    handles, names = axes.get_legend_handles_labels()
    longest = max(map(len, names), default=0)
    if not handles:
        return
    if longest <= LONG_LABEL:
        figure.legend(handles, names, loc="outside right upper", fontsize="small")
        return
    columns = 1 if longest > 2 * LONG_LABEL else 2
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(names) // columns))
    figure.legend(handles, names, loc="outside lower left", ncols=columns, fontsize="small")


def has_curve(run: Finished, *metrics: str) -> bool:
    """Whether the log holds the metrics from the first epoch on; prints a message if it does not."""
    if run.has_whole_log and all(metric in record for record in run.epochs for metric in metrics):
        return True
    missing = (
        ", ".join(metrics)
        if run.has_whole_log
        else f"the epochs before {run.epochs[0]['epoch']}"
        if run.epochs
        else "all epochs"
    )
    print(
        f"vdrop: {run.folder / 'log.jsonl'} lacks {missing}; the run is left out of the picture",
        file=sys.stderr,
    )
    return False


def learning_curves(runs: Curves, training: bool, title: str | None = None) -> "Figure":
    """Validation perplexity by epoch; with `training`, that of training with dropout on, too."""
    training_measure = Measure("train_ppl_dropout", "training, dropout on") if training else None
    figure, axes = epochs_figure(runs, Measure("valid_ppl_batched", "validation"), training_measure, title)
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylabel("perplexity (log scale)" if training else "validation perplexity (log scale)")
    low, high = axes.get_ylim()
    steps = (1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 4, 5, 6, 8, 9) if high < 10 * low else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.4g}")
    add_legend(figure, axes)
    return figure


def error_curves(runs: Curves, title: str | None = None) -> "Figure":
    """Test and training error of ratings by epoch, dropout off (Gal & Ghahramani 2016, figures 2 and 3), and
    baselines as lines.
    """
    figure, axes = epochs_figure(runs, Measure("test_rmse", "test"), Measure("train_rmse", "training"), title)
    axes.set_ylabel("RMSE (rating units)")
    results = [run.result for group in runs.values() for run in runs_of(group)]
    for (metric, name), style in zip(BASELINES.items(), BASELINE_STYLES, strict=True):
        values = dict.fromkeys(result[metric] for result in results if metric in result)
        for value in values:  # one, unless the runs read different data
            label = f"{name} (test)" if value == next(iter(values)) else "_"
            axes.axhline(value, color="0.5", linestyle=style, label=label)
    add_legend(figure, axes)
    return figure


def samples_figure(evaluations: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Test perplexity by the number of MC samples that are averaged, a curve per name of a row."""
    figure, axes = canvas()
    for number, ((name, rows), marker) in enumerate(zip(evaluations.items(), cycle(MARKERS), strict=False)):
        deviations = [row["deviation"] or 0.0 for row in rows]
        style: dict[str, Any] = {"color": f"C{number}", "marker": marker, "markersize": 4, "capsize": 3}
        axes.errorbar(
            [row["samples"] for row in rows], [row["ppl"] for row in rows], deviations, label=name, **style
        )
    axes.set_xscale("log")
    axes.set_xlabel("MC samples (log scale); bars: standard deviation over groups of so many samples")
    axes.set_ylabel("test perplexity")
    add_legend(figure, axes)
    return figure


class TimedPerplexity(NamedTuple):
    """A test perplexity and the hours of its training; `is_upper_bound`: the device was shared."""

    hours: float
    perplexity: float
    is_upper_bound: bool


def hours_figure(measured: Mapping[str, TimedPerplexity], published: Mapping[str, float]) -> "Figure":
    """Test perplexities against hours of training, a point per name, and published ones as lines.

    Open markers are hours that are upper bounds.
    """
    figure, axes = canvas(height=6)
    for number, ((name, point), marker) in enumerate(zip(measured.items(), cycle(MARKERS), strict=False)):
        axes.plot(
            point.hours,
            point.perplexity,
            marker,
            color=f"C{number}",
            markersize=8,
            markerfacecolor="white" if point.is_upper_bound else None,
            label=f"≤ {name}" if point.is_upper_bound else name,
        )
    for (name, value), line in zip(published.items(), cycle(("--", "-.", ":")), strict=False):
        axes.axhline(value, color="0.5", linestyle=line, label=f"published: {name}")
    axes.set_xlim(left=0)
    axes.margins(y=0.1)
    axes.set_xlabel("hours of training (≤, open: at most, beside other programs)")
    axes.set_ylabel("test perplexity")
    add_legend(figure, axes)
    return figure


def speeds(measured: Mapping[str, float], published: Mapping[str, float]) -> "Figure":
    """Words a second of training by the name of a row: measured, and published for a GPU of 2015."""
    names = list(dict.fromkeys([*measured, *published]))
    figure, axes = canvas(height=1 + 0.6 * len(names))
    bars: tuple[tuple[float, Mapping[str, float], str, dict[str, Any]], ...] = (
        (-0.2 if published else 0.0, measured, "measured", {"color": "0.35"}),
        (
            0.2,
            published,
            "published, a GPU of 2015",
            {"color": "white", "edgecolor": "black", "hatch": "///"},
        ),
    )
    bars = bars if published else bars[:1]
    for offset, values, label, look in bars:
        places = [place + offset for place, name in enumerate(names) if name in values]
        drawn = axes.barh(
            places, [values[name] for name in names if name in values], 0.38, label=label, **look
        )
        axes.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize="small")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("training speed, words a second")
    figure.legend(loc="outside upper right", ncols=2, fontsize="small")
    return figure
