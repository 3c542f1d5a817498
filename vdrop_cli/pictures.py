"""Pictures of runs, to be read in black and white too: axes named, units given."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdrop_cli import files, ownership
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.runs import Finished

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = 40  # on a curve, at most about so many
MARKERS = "osD^vPX*"  # what is drawn can be told apart without colour


def require_matplotlib() -> None:
    """Raises ConfigError where it is not there; it is an extra."""
    if find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib; pip install 'vdrop[plot]'")


def canvas(width: float = 8, height: float = 5) -> "tuple[Figure, Axes]":
    require_matplotlib()
    from matplotlib.figure import Figure  # slow to import, so only where it is used

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def labels(names: Sequence[str], details: Sequence[str]) -> list[str]:
    """The names, those that are there more than once with what tells them apart."""
    return [
        f"{name} ({detail})" if names.count(name) > 1 else name
        for name, detail in zip(names, details, strict=True)
    ]


def save(figure: "Figure", path: Path) -> None:
    """Raises ConfigError where it cannot be written, its ending is none that can be drawn, or a file is there
    that is no drawing.
    """
    ownership.require_own(path, is_drawing, "choose another file")
    drawn = BytesIO()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(drawn, format=path.suffix.removeprefix(".") or None, dpi=150)
        files.replace(Path(os.path.realpath(path)), drawn.getbuffer())
    except (OSError, ValueError, RunError) as error:
        raise ConfigError(f"the picture {path} cannot be written ({error}); choose another file") from None


def is_drawing(content: bytes) -> bool:
    """Whether Matplotlib made a file, going by what it writes into PNG, SVG and PDF; or it is empty."""
    return not content or b"matplotlib" in content.lower()


def by_epoch(
    runs: Mapping[str, Finished], solid: tuple[str, str], dotted: tuple[str, str] | None
) -> "tuple[Figure, Axes]":
    """One or two metrics of every run, each with what it is called; one marker a run, by its name."""
    figure, axes = canvas()
    from matplotlib.ticker import MaxNLocator

    whole = {name: run for name, run in runs.items() if has_curve(run, solid[0], *(dotted or ())[:1])}
    for number, ((name, run), marker) in enumerate(zip(whole.items(), cycle(MARKERS), strict=False)):
        epochs = [record["epoch"] for record in run.epochs]
        style: dict[str, Any] = {
            "color": f"C{number}",
            "marker": marker,
            "markersize": 4,
            "markevery": max(1, len(epochs) // MARKS),
        }
        metric, told = solid
        axes.plot(
            epochs,
            [record[metric] for record in run.epochs],
            "-",
            label=f"{name}: {told}" if dotted else name,
            **style,
        )
        if dotted:
            metric, told = dotted
            axes.plot(
                epochs,
                [record[metric] for record in run.epochs],
                ":",
                label=f"{name}: {told}",
                fillstyle="none",
                **style,
            )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if whole:
        axes.legend(fontsize="small")
    return figure, axes


def has_curve(run: Finished, *metrics: str) -> bool:
    """Whether its log holds them from the first epoch on; says so where it does not."""
    if run.has_whole_log and all(metric in record for record in run.epochs for metric in metrics):
        return True
    lacks = (
        ", ".join(metrics)
        if run.has_whole_log
        else f"the epochs before {run.epochs[0]['epoch']}"
        if run.epochs
        else "all epochs"
    )
    print(
        f"vdrop: {run.folder / 'log.jsonl'} lacks {lacks}; the run is left out of the picture",
        file=sys.stderr,
    )
    return False


def learning_curves(runs: Mapping[str, Finished], training: bool) -> "Figure":
    """Validation perplexity by epoch; and that of training, with dropout on."""
    figure, axes = by_epoch(
        runs,
        ("valid_ppl_batched", "validation"),
        ("train_ppl_dropout", "training, dropout on") if training else None,
    )
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylabel("perplexity (log scale)" if training else "validation perplexity, in batches (log scale)")
    low, high = axes.get_ylim()
    steps = (1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 4, 5, 6, 8, 9) if high < 10 * low else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.0f}")
    return figure


def error_curves(runs: Mapping[str, Finished]) -> "Figure":
    """Test and training error of ratings by epoch, dropout off (Gal & Ghahramani 2016, figures 2 and 3)."""
    figure, axes = by_epoch(runs, ("test_rmse", "test"), ("train_rmse", "training"))
    axes.set_ylabel("root of the mean squared error (rating units)")
    return figure


def by_samples(evaluations: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Test perplexity by the number of MC passes that are averaged, by the name of the row."""
    figure, axes = canvas()
    for number, ((name, rows), marker) in enumerate(zip(evaluations.items(), cycle(MARKERS), strict=False)):
        spread = [row["deviation"] or 0.0 for row in rows]
        style: dict[str, Any] = {"color": f"C{number}", "marker": marker, "markersize": 4, "capsize": 3}
        axes.errorbar(
            [row["samples"] for row in rows], [row["ppl"] for row in rows], spread, label=name, **style
        )
    axes.set_xscale("log")
    axes.set_xlabel("MC samples (log scale); bars: standard deviation over groups of so many samples")
    axes.set_ylabel("test perplexity")
    axes.legend(fontsize="small")
    return figure


def speeds(measured: Mapping[str, float], published: Mapping[str, float], devices: Iterable[str]) -> "Figure":
    """Words a second of training, by the name of the row: measured, and published for a GPU of 2015."""
    names = list(dict.fromkeys([*measured, *published]))
    figure, axes = canvas(height=1 + 0.6 * len(names))
    bars: tuple[tuple[float, Mapping[str, float], str, dict[str, Any]], ...] = (
        (-0.2 if published else 0.0, measured, f"measured, {', '.join(devices)}", {"color": "0.35"}),
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
