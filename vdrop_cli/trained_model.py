"""A model with the weights of a checkpoint, and the task that it was trained on."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from vdrop_cli import checkpoint, files, tasks
from vdrop_cli.checkpoint import Checkpoint
from vdrop_cli.device import COMPUTE_DTYPES, choose_backend, choose_precision
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.choices import Precision
from vdrop_cli.settings.commands import Eval, Predict
from vdrop_cli.settings.data import Data
from vdrop_cli.tasks import Predictor, Task, TaskModel


class Built(NamedTuple):
    """A checkpoint's model, with its weights."""

    path: Path
    checkpoint: Checkpoint
    predictor: Predictor
    model: TaskModel
    precision: Precision


def task_of(path: Path, snapshot: Checkpoint, data: Data, device: torch.device) -> Task:
    """The task that a checkpoint was trained on, with its text as it is now."""
    task = tasks.load(replace(snapshot.train, data=data), device)
    if task.fingerprint != snapshot.corpus:
        raise ConfigError(
            f"checkpoint={path} was trained on another corpus than {files.printable(task.origin)}; "
            "give it the text that it was trained on"
        )
    return task


def member_paths(first: Path, named: list[str]) -> list[Path]:
    """The checkpoints that are averaged, or the only one. Raises ConfigError where one is there twice."""
    paths = [first, *map(checkpoint.find, named)]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("members must be other checkpoints, each once, got one twice")
    return paths


def build(
    path: Path, snapshot: Checkpoint, predictor: Predictor, settings: Eval | Predict, device: torch.device
) -> Built:
    """The model of a checkpoint. Raises ConfigError where its weights are not those of its settings."""
    trained = snapshot.train
    backend = choose_backend(settings.backend, device).name
    precision = choose_precision(settings.precision or trained.precision, device)
    try:
        checkpoint.require_large_enough(snapshot.weights, trained.model, predictor.vocabulary_size)
        model = predictor.model(
            trained.model, trained.dropout.to_policy(), backend, COMPUTE_DTYPES[precision]
        )
        checkpoint.require_fitting(snapshot.weights, model)
    except ValueError as reason:
        raise checkpoint.unusable(path, reason) from None
    model.load_state_dict(snapshot.weights)
    return Built(path, snapshot, predictor, model.to(device), precision)
