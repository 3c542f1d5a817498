"""What `vdrop train` prints of a run at its start and at its end."""

import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from vdrop_cli import continuation, output, tasks
from vdrop_cli.checkpoint import settings_of_run
from vdrop_cli.errors import ConfigError
from vdrop_cli.metric_names import PARTS, metric_line
from vdrop_cli.policies import Policy
from vdrop_cli.run_files import RESULT
from vdrop_cli.settings.choices import TaskName
from vdrop_cli.settings.commands import PREDICT_SAMPLES
from vdrop_cli.settings.data_places import stored_places
from vdrop_cli.settings.train import Train
from vdrop_cli.sinks import read_result
from vdrop_cli.training import Run

NAMES_OF_RUNS = ("tags", "run_name")  # settings that cannot be changed in a finished run


def print_run(training: Run, shorter: Path | None) -> None:
    """Prints folder, model and machine, whether training resumes or continues the run in the folder
    `shorter`, and which unfinished runs of other devices, back ends or precisions lie beside a new one.
    """
    settings, folder = training.settings, training.folder
    made_with = f"{settings.device}, back end {settings.backend}, {settings.precision}"
    description = f"{settings.model.name}, dropout {settings.dropout.name}, {made_with}"
    how = f"continuing {shorter}" if shorter else "resuming"
    before = f", {how} after {training.place}" if training.step else ""
    print(f"{folder}: {description}{before}", file=sys.stderr)
    if training.step or settings.force:
        return
    for other, place in continuation.unfinished_variants(folder, settings, training.task.fingerprint):
        print(f"vdrop: {other} is this run with {place}, not finished; {place} resumes it", file=sys.stderr)


def print_start(settings: Train, training: Run) -> None:
    """Prints corpus, model and length of the training."""
    task = training.task
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    sizes = ", ".join(f"{PARTS[part]} {size}" for part, size in task.part_sizes.items())
    for line in (
        f"corpus: {task.origin}; {sizes}; vocabulary {task.predictor.vocabulary_size:,}",
        f"model: {settings.model.cell}, {parameters:,} parameters; dropout policy: "
        f"{settings.dropout.policy}, probabilities: {settings.dropout.in_words}",
        f"training: epochs: {settings.schedule.epochs}, {task.batches_an_epoch:,} steps per epoch, "
        f"{training.total_steps:,} steps in all; threads: {torch.get_num_threads()}",
    ):
        print(line, file=sys.stderr)
    max_steps = settings.schedule.max_steps
    if max_steps is not None and max_steps >= settings.schedule.epochs * task.batches_an_epoch:
        print(
            f"vdrop: schedule.max_steps={max_steps} has no effect: training has {training.total_steps} steps",
            file=sys.stderr,
        )


def print_result(result: dict[str, Any]) -> None:
    """Prints the result. It is also on disk, so nothing is lost where it cannot be shown."""
    with output.stdout_errors_deferred():
        for name, value in result.items():
            if name != "warnings":
                print(metric_line(name, value))


def print_next_commands(settings: Train, folder: Path) -> None:
    """Prints the commands that evaluate a finished run and predict with it."""
    checkpoint_setting = shlex.quote(f"checkpoint={folder}")
    # ratings: the default passes of `vdrop predict`, which needs the noise for that number
    samples = PREDICT_SAMPLES if settings.task.name is TaskName.sentiment else 100
    eval_settings = f" mc_samples={samples}" if settings.dropout.policy is not Policy.none else ""
    eval_settings += " stored_data=true" if stored_places(settings.data) else ""
    print(f"\nrun folder: {folder}", file=sys.stderr)
    print(f"next: vdrop eval {checkpoint_setting}{eval_settings}", file=sys.stderr)
    print(f"      vdrop predict {checkpoint_setting} text='…'", file=sys.stderr)


def print_if_finished(settings: Train, folder: Path, task: tasks.Task) -> bool:
    """Returns whether the run in a folder is finished; prints its result if so.

    Raises ConfigError where the finished run has other settings, as in a copied folder, or where its result
    is damaged.
    """
    if not (folder / RESULT).exists():
        return False
    result, train = read_result(folder), settings_of_run(folder)
    if train is not None and train.run_identity(task.fingerprint) != settings.run_identity(task.fingerprint):
        raise ConfigError(
            f"{folder} holds a finished run of other settings or of another seed; move it away, or start "
            "over with force=true"
        )
    print(f"{folder} is finished; force=true starts over")
    print_not_applied(settings, folder)
    tasks.warn(task)
    print_result(result)
    return True


def print_not_applied(settings: Train, folder: Path) -> None:
    """Prints which requested tags or run name a finished run does not get; those of its training remain."""
    asked = {name: value for name in NAMES_OF_RUNS if (value := getattr(settings, name))}
    train = settings_of_run(folder) if asked else None
    if train is None:
        return
    for name, value in asked.items():
        if (current := getattr(train, name)) != value:
            print(
                f"vdrop: {shown(name, value)} is not applied: the run has {shown(name, current)}",
                file=sys.stderr,
            )


def print_changed_names(settings: Train, folder: Path) -> None:
    """Prints which tags or run name of a resumed run are replaced by others, or removed."""
    train = settings_of_run(folder)
    if train is None:
        return
    for name in NAMES_OF_RUNS:
        before, now = getattr(train, name), getattr(settings, name)
        if before and before != now:
            print(
                f"vdrop: the run had {shown(name, before)}; from now on it has {shown(name, now)}",
                file=sys.stderr,
            )


def shown(name: str, value: str | list[str] | None) -> str:
    """Returns a setting as a command line writes it; `no NAME` where it is not set."""
    if not value:
        return f"no {name}"
    return f"{name}={value}" if isinstance(value, str) else f"{name}=[{','.join(value)}]"
