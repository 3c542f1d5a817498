"""A model with the weights of a checkpoint or an export, and the task that it was trained on."""

import ctypes
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from vdrop_cli import checkpoint, files, learned, tasks
from vdrop_cli.checkpoint import Checkpoint
from vdrop_cli.device import COMPUTE_DTYPES, choose_backend, choose_precision
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.choices import Precision
from vdrop_cli.settings.commands import Eval, Predict
from vdrop_cli.settings.data import Data
from vdrop_cli.settings.fields import without_defaults
from vdrop_cli.sharing import weights
from vdrop_cli.sharing.weights import Exported
from vdrop_cli.tasks import LanguageModelling, Predictor, Task, TaskModel

Snapshot = Checkpoint | Exported
BROKEN_WEIGHTS = "its weights are not those of a model that works"


class TrainedModel(NamedTuple):
    """The model of a checkpoint, with its weights."""

    path: Path
    checkpoint: Snapshot
    predictor: Predictor
    model: TaskModel
    precision: Precision

    @property
    def digest(self) -> str:
        """Returns the SHA-256 of all that decides on predictions: the settings of model and dropout, what was
        learned of the text, and the weights. It is the same whatever file holds the model.
        """
        trained, known = self.checkpoint.train, learned.to_dict(self.checkpoint.knowledge)
        # without defaults, so that settings of later versions do not change the digest
        changed = [sorted(without_defaults(part).items()) for part in (trained.model, trained.dropout)]
        described = repr((changed, sorted(known.items())))
        digest = hashlib.sha256(described.encode(errors="backslashreplace"))
        for name, tensor in sorted(self.checkpoint.weights.items()):
            whole = tensor.contiguous()
            digest.update(f"{name} {tuple(whole.shape)}".encode(errors="backslashreplace"))
            digest.update((ctypes.c_char * whole.nbytes).from_address(whole.data_ptr()))
        return digest.hexdigest()


def find(named: str) -> Path:
    """Returns the file that the setting `checkpoint` names: a checkpoint or an export.

    In a folder with both, it is the checkpoint.
    """
    export = Path(named) / weights.FILE_NAME
    is_export = os.path.isfile(export) and not checkpoint.all_in(Path(named))
    return export if is_export else checkpoint.find(named)


def is_export(path: Path) -> bool:
    """Returns whether a file is what `vdrop export` wrote, by its name."""
    return path.suffix == weights.SUFFIX


def load(path: Path) -> Snapshot:
    """Returns the content of a checkpoint or an export. Raises ConfigError where it cannot be used."""
    return weights.load(path) if is_export(path) else checkpoint.load(path)


def checksum(path: Path) -> str:
    """Returns the checksum of a checkpoint, or of the whole content of an export, which has none in it.

    Raises ConfigError where the file has been removed since it was read.
    """
    try:
        return hashlib.sha256(files.read(path)).hexdigest() if is_export(path) else files.checksum(path)
    except FileNotFoundError:
        raise replaced(path) from None


def replaced(path: Path) -> ConfigError:
    """Returns the error for a file that has changed since it was read."""
    return ConfigError(
        f"checkpoint={path} was removed or replaced meanwhile, as by its training; give the same command "
        "again"
    )


def member_name(path: Path) -> str:
    """Returns what names a member of an ensemble: run folder and file, or the checksum of an
    export, since all exports have the same name.
    """
    resolved = path.resolve()
    return checksum(path) if is_export(path) else f"{resolved.parent.name}/{resolved.name}"


def evaluation_stem(path: Path) -> str:
    """Returns the first part of the file names of evaluations of a checkpoint or an export.

    For an export it differs from that for a run, since an export may be in a run folder.
    """
    return path.name if is_export(path) else path.stem


def task_of(path: Path, snapshot: Snapshot, data: Data, device: torch.device) -> Task:
    """Returns the task that a checkpoint was trained on, with its text as it is on disk now.

    Raises ConfigError where this is not the text that the checkpoint was trained on.
    """
    task = tasks.load(replace(snapshot.train, data=data), device)
    if task.fingerprint != snapshot.corpus:
        another = "; vdrop eval file=… evaluates another one" if isinstance(task, LanguageModelling) else ""
        raise ConfigError(
            f"checkpoint={path} was trained on another corpus than {files.printable(task.origin)}; "
            f"give it the text that it was trained on{another}"
        )
    return task


def member_paths(first: Path, named: list[str]) -> list[Path]:
    """Returns the checkpoints that are averaged, or the only one. Raises ConfigError where one is there
    twice.
    """
    paths = [first, *map(find, named)]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("members must be other checkpoints, each once, got one twice")
    return paths


def other_corpus(path: Path, first: Path) -> ConfigError:
    """Returns the error for a member that was trained on another corpus than the first checkpoint."""
    return ConfigError(
        f"members: {path} was trained on another corpus than {first}, or another split of it; average models "
        "of the same words"
    )


def no_dropout(path: Path, samples: int, choices: str) -> ConfigError:
    """Returns the error for MC samples of a model without dropout; `choices` are the other values."""
    return ConfigError(f"mc_samples must be {choices}, {path} was trained without dropout, got {samples}")


def build(
    path: Path, snapshot: Snapshot, predictor: Predictor, settings: Eval | Predict, device: torch.device
) -> TrainedModel:
    """Returns the model of a checkpoint. Raises ConfigError unless its weights fit its settings."""
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
    return TrainedModel(path, snapshot, predictor, model.to(device), precision)


def add_member(members: dict[str, Path], one: TrainedModel) -> None:
    """Adds a model to the members of an ensemble, by its digest. Raises ConfigError where the same model is
    there from another file.
    """
    digest = one.digest
    if digest in members:
        raise ConfigError(
            f"members: {one.path} is the same model as {members[digest]}; average models of other runs"
        )
    members[digest] = one.path
