"""`vdrop compare RUN RUN …`: which settings differ, how the runs ended, and their curves in one picture."""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from omegaconf import OmegaConf

from vdrop_cli.config import ConfigError
from vdrop_cli.sinks import flat, read_log, read_result

METRICS = ("epoch", "train_ppl", "valid_ppl", "test_ppl")
MARKERS = "osD^vPX*"  # runs can be told apart without colour


class Finished(NamedTuple):
    """A run folder, or a record of one."""

    folder: Path
    settings: dict[str, Any]
    epochs: list[dict[str, Any]]
    result: dict[str, Any]


class OneLine(argparse.ArgumentParser):
    """Whose errors look like those of the other commands."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; vdrop compare --help shows how")


def main(arguments: list[str]) -> None:
    parser = OneLine("vdrop compare", description="Runs side by side: settings that differ, perplexities, curves.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, with config.yaml, log.jsonl and result.json")
    parser.add_argument("--picture", metavar="FILE", help="draw the learning curves into FILE (.png, .svg or .pdf)")
    try:
        options = parser.parse_args(arguments)
        runs = [run for run in (read(Path(name)) for name in options.runs) if run is not None]
        if not runs:
            raise ConfigError("none of these runs is finished; give the same vdrop train command again to go on")
        names = tell(runs)
        if options.picture:
            draw(runs, names, Path(options.picture))
            print(f"\ncurves: {options.picture}")
    except ConfigError as error:
        print(f"vdrop: {error}", file=sys.stderr)
        sys.exit(2)


def read(folder: Path) -> Finished | None:
    """A run that has a result; one that has none yet is passed over, and said so."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not a run folder, it has no config.yaml; name folders below outputs/train")
    if not (folder / "result.json").is_file():
        print(f"vdrop: {folder} is not finished, left out", file=sys.stderr)
        return None
    settings: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    epochs = [record for record in read_log(folder / "log.jsonl") if record["kind"] == "epoch"]
    return Finished(folder, flat(settings), epochs, read_result(folder))


def differing(runs: list[Finished]) -> list[str]:
    """The settings that are not the same in all runs."""
    every = list(dict.fromkeys(key for run in runs for key in run.settings))
    return [key for key in every if len({str(run.settings.get(key)) for run in runs}) > 1]


def tell(runs: list[Finished]) -> list[str]:
    """Prints what differs and how the runs ended; returns a short name for each."""
    keys = differing(runs)
    naming = [key for key in keys if key in ("model.name", "dropout.name", "seed")]
    names = [" ".join(f"seed {run.settings[k]}" if k == "seed" else str(run.settings[k]) for k in naming) for run in runs]
    if len(set(names)) < len(runs):
        names = [f"{run.folder.parent.name}/{run.folder.name}" for run in runs]
    width = max(12, *(len(name) + 2 for name in names))
    label = max(20, *(len(key) + 2 for key in [*METRICS, *keys]))
    print(" " * label + "".join(f"{name:>{width}}" for name in names))
    for key in keys:
        print(f"{key:<{label}}" + "".join(f"{run.settings.get(key, '–')!s:>{width}}" for run in runs))
    print()
    for metric in METRICS:
        values = (run.result[metric] for run in runs)
        print(f"{metric:<{label}}" + "".join(f"{v:>{width}.2f}" if isinstance(v, float) else f"{v:>{width}}" for v in values))
    return names


def draw(runs: list[Finished], names: list[str], path: Path) -> None:
    """Training and validation perplexity by epoch, one marker a run."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ConfigError("--picture needs matplotlib; pip install 'vdrop[plot]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        epochs = [record["epoch"] for record in run.epochs]
        style: dict[str, Any] = {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
        axes.plot(epochs, [record["valid_ppl_batched"] for record in run.epochs], "-", label=f"{name}: validation", **style)
        train = [record["train_ppl"] for record in run.epochs]
        axes.plot(epochs, train, ":", label=f"{name}: training, dropout on", fillstyle="none", **style)
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("perplexity (log scale)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path} cannot be written ({error}); choose another file") from None
