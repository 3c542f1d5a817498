"""`vdrop compare RUN RUN …`: which settings differ, how the runs ended, and their curves in one picture."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vdrop_cli import pictures
from vdrop_cli.errors import ConfigError
from vdrop_cli.runs import Finished, evaluation, read
from vdrop_cli.settings.choices import TaskName

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST = (
    "epoch",
    "train_ppl",
    "valid_ppl",
    "valid_ppl_as_published",
    "test_ppl",
)  # of the metrics that there are; then others
LEFT_OUT = ("epochs", "seconds", "valid_ppl_batched", "warnings")


class OneLine(argparse.ArgumentParser):
    """Whose errors look like those of the other commands."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; vdrop compare --help shows how")


def main(arguments: list[str]) -> None:
    parser = OneLine(
        "vdrop compare", description="Runs side by side: settings that differ, how they ended, curves."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder, with config.yaml, log.jsonl and result.json"
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="draw the learning curves into FILE (.png, .svg or .pdf)"
    )
    try:
        options = parser.parse_args(arguments)
        runs = [run for run in (read(Path(name)) for name in options.runs) if run is not None]
        if not runs:
            raise ConfigError(
                "none of these runs is finished; give the same vdrop train command again to go on"
            )
        names = tell(runs)
        if options.picture:
            pictures.save(curves(dict(zip(names, runs, strict=True))), Path(options.picture))
            print(f"\ncurves: {options.picture}")
    except ConfigError as error:
        print(f"vdrop: {error}", file=sys.stderr)
        sys.exit(2)


def curves(runs: dict[str, Finished]) -> "Figure":
    """Of perplexity or of the error of ratings, by epoch."""
    tasks = {run.train.task.name for run in runs.values()}
    if len(tasks) > 1:
        raise ConfigError(
            "a picture is of runs of one task; compare language models and models of ratings apart"
        )
    return (
        pictures.error_curves(runs)
        if TaskName.sentiment in tasks
        else pictures.learning_curves(runs, training=True)
    )


def differing(runs: list[Finished]) -> list[str]:
    """The settings that are not the same in all runs."""
    every = list(dict.fromkeys(key for run in runs for key in run.settings))
    return [key for key in every if len({str(run.settings.get(key)) for run in runs}) > 1]


def metrics_of(run: Finished) -> dict[str, Any]:
    """Its result, what MC dropout made of it, and its speed."""
    evaluated = {
        name: value
        for path in run.evaluations
        for name, value in evaluation(path)["metrics"].items()
        if "_mc" in name
    }
    speed = run.words_per_second
    return run.result | evaluated | ({"words_per_second": round(speed)} if speed is not None else {})


def tell(runs: list[Finished]) -> list[str]:
    """Prints what differs and how the runs ended; returns a short name for each."""
    keys = differing(runs)
    naming = [key for key in keys if key in ("model.name", "dropout.name", "seed")]
    names = [
        " ".join(f"seed {run.settings[k]}" if k == "seed" else str(run.settings[k]) for k in naming)
        for run in runs
    ]
    if len(set(names)) < len(runs) or not all(names):
        names = [f"{run.folder.parent.name}/{run.folder.name}" for run in runs]
    measured = [metrics_of(run) for run in runs]
    for run, name in zip(runs, names, strict=True):
        for warning in run.result.get("warnings", []):
            print(f"vdrop: {name}: {warning}", file=sys.stderr)
    every = dict.fromkeys([*FIRST, *(name for of_run in measured for name in of_run)])
    metrics = [name for name in every if name not in LEFT_OUT and any(name in of_run for of_run in measured)]
    settings = [[key, *(str(run.settings.get(key, "–")) for run in runs)] for key in keys]
    results = [[metric, *(shown(of_run.get(metric, "–")) for of_run in measured)] for metric in metrics]
    rows = [["", *names], *settings, [""], *results]
    label, width = (
        max(len(row[0]) for row in rows) + 2,
        max(len(text) for row in rows for text in row[1:]) + 2,
    )
    for name, *texts in rows:
        print((f"{name:<{label}}" + "".join(f"{text:>{width}}" for text in texts)).rstrip())
    return names


def shown(value: object) -> str:
    return f"{value:.{2 if abs(value) >= 10 else 4}f}" if isinstance(value, float) else str(value)
