"""Checkpoints: everything that resuming, evaluation and prediction need of a run, in one file.

A checkpoint contains only tensors and plain values.
"""

import math
import os
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_origin

from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, float32, nn

from vdrop_cli import files, learned, stored
from vdrop_cli.errors import ConfigError
from vdrop_cli.files import Damaged
from vdrop_cli.learned import Learned
from vdrop_cli.run_files import CONFIG, checkpoint_name, parse_checkpoint
from vdrop_cli.settings.choices import TaskName
from vdrop_cli.settings.compose import restore
from vdrop_cli.settings.train import Model, Train

FORMAT = "vdrop checkpoint 5"
NEWEST = 2  # how many of the newest checkpoints stay on disk, besides the best one
Used = TypeVar("Used")


class Unusable(ConfigError):
    """A checkpoint is missing, damaged or unusable; a later attempt would fail, too."""


@dataclass
class TrainingState:
    """The progress of training; a checkpoint stores every field."""

    epoch: int  # finished epochs
    batch: int  # finished batches of the epoch after them, the unfinished epoch
    seconds: float  # of training and validation
    epoch_seconds: float  # the part of `seconds` that belongs to the unfinished epoch
    epoch_words: int  # words of training text read in the unfinished epoch
    best_epoch: int  # 0: no epoch is finished
    best: float  # the selection metric of the best epoch; infinite before the first
    losses: list[float] = field(repr=False)  # of the finished batches, as logged
    averaged: int  # updates whose weights are in the average
    validations: list[float] = field(repr=False)  # the selection metric of each epoch

    @classmethod
    def at_start(cls) -> "TrainingState":
        """The state before the first batch."""
        return cls(0, 0, 0.0, 0.0, 0, 0, math.inf, [], 0, [])

    def finish_epoch(self, selected: float) -> None:
        """Counts an epoch as finished, whose selection metric is `selected`."""
        self.validations.append(selected)
        self.epoch += 1
        self.batch = 0
        self.epoch_seconds = 0.0
        self.epoch_words = 0
        self.losses = []


@dataclass(kw_only=True)
class Trained:
    """What a model was trained with, and what it has learned beside its weights."""

    config: dict[str, Any]  # as `settings.fields.plain` writes it
    corpus: str  # fingerprint
    learned: dict[str, Any] = field(repr=False)  # as `learned.to_dict` writes it

    @property
    def train(self) -> Train:
        return restore(self.config)

    @property
    def knowledge(self) -> Learned:
        """Returns what prediction needs of the training text."""
        return learned.from_dict(self.learned, self.train.task.name is TaskName.sentiment)


@dataclass(kw_only=True)
class Checkpoint(TrainingState, Trained):
    """The state of a run between two steps: everything that is needed to resume it.

    Masks and the order of batches are not stored, since they are functions of seed, epoch and batch.
    """

    environment: dict[str, Any]  # versions, device, commit
    state: list[Tensor] = field(repr=False)  # carried from batch to batch; empty at the start of an epoch
    model: dict[str, Tensor] = field(repr=False)
    optimiser: dict[str, Any] = field(repr=False)
    average: dict[str, Tensor] = field(repr=False)  # of the weights; empty before the average has begun

    @property
    def progress(self) -> TrainingState:
        """A copy of the fields of `TrainingState`."""
        return TrainingState(**{f.name: copy(getattr(self, f.name)) for f in fields(TrainingState)})

    @property
    def weights(self) -> dict[str, Tensor]:
        """Returns the weights of the model that is reported: the average, where there is one."""
        return self.average or self.model


COUNTS = ("epoch", "batch", "epoch_words", "best_epoch", "averaged")
DURATIONS = ("seconds", "epoch_seconds")
TYPES: dict[str, Any] = {f.name: get_origin(f.type) or f.type for f in fields(Checkpoint)}


def require_valid(snapshot: Checkpoint) -> None:
    """Raises ValueError unless the content of a checkpoint is valid.

    This is the only place where the content is checked. The message quotes nothing from the file.
    """
    for name, kind in TYPES.items():
        require_that(type(getattr(snapshot, name)) is kind, f"its {name} is no {kind.__name__}")
    for name in COUNTS:
        require_that(0 <= getattr(snapshot, name) < 2**63, f"its {name} is out of range")
    for name in DURATIONS:
        require_that(0 <= getattr(snapshot, name) < math.inf, f"its {name} is out of range")
    has_epochs = snapshot.epoch > 0
    require_that(
        snapshot.best_epoch <= snapshot.epoch and (snapshot.best_epoch > 0) == has_epochs,
        "its best epoch is none of its epochs",
    )
    require_that(
        math.isfinite(snapshot.best) if has_epochs else snapshot.best == math.inf,
        "the metric of its best epoch is not a finite number",
    )
    require_that(
        all(type(loss) is float and math.isfinite(loss) for loss in snapshot.losses),
        "a loss is not a finite number",
    )
    require_that(
        all(type(value) is float and math.isfinite(value) for value in snapshot.validations)
        and len(snapshot.validations) == snapshot.epoch,
        "its validations are not a finite number for each epoch",
    )
    require_that(len(snapshot.losses) == snapshot.batch, "it has another number of losses than of batches")
    for what, tensors in (
        ("a carried state", snapshot.state),
        ("a weight", list(snapshot.model.values())),
        ("an average", list(snapshot.average.values())),
    ):
        require_numbers(what, tensors)
    shapes, averages = (
        {name: tensor.shape for name, tensor in tensors.items()}
        for tensors in (snapshot.model, snapshot.average)
    )
    require_that(
        (snapshot.averaged > 0) == bool(averages), "it has no average of its updates, or one of none"
    )
    require_that(not averages or averages == shapes, "the average of its weights is one of others")
    require_that(all(type(name) is str for name in snapshot.model), "the name of a weight is no text")
    for name, value in snapshot.environment.items():
        require_that(
            type(name) is str and isinstance(value, str | int | float | None),
            "its environment is not of texts and numbers",
        )
    require_restorable(snapshot)


def require_numbers(what: str, tensors: list[Any]) -> None:
    """Raises ValueError unless all are tensors of finite float32 numbers; `what` names one in the message."""
    require_that(
        all(isinstance(tensor, Tensor) and tensor.dtype is float32 for tensor in tensors),
        f"{what} is no tensor of float32",
    )
    require_that(all(bool(tensor.isfinite().all()) for tensor in tensors), f"{what} is not finite")


def require_restorable(trained: Trained) -> None:
    """Raises ValueError unless settings, and what was learned, are as vdrop writes them."""
    require_readable("its settings are not those of a training run", lambda: trained.train)
    require_readable("what it has learned of its text is not as vdrop writes it", lambda: trained.knowledge)


def require_readable(otherwise: str, read: Callable[[], object]) -> None:
    try:
        read()
    except (
        ConfigError,
        OmegaConfBaseException,
        TypeError,
        ValueError,
        OverflowError,
        AttributeError,
        AssertionError,
    ):
        raise ValueError(otherwise) from None


def require_that(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def require_large_enough(weights: dict[str, Tensor], model: Model, words: int) -> None:
    """Raises ValueError where the settings describe a larger model than the weights can fill.

    The check comes before memory is allocated for the model. `words` is the size of the vocabulary.
    """
    memory = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights.values()
    }
    inputs = (model.word_size, *model.hidden_sizes)
    recurrent = sum(3 * size * (inputs[at] + size) for at, size in enumerate(model.hidden_sizes))
    least = words * model.word_size + recurrent  # a lower bound: the embedding and the matrices of a GRU
    require_that(
        least <= sum(memory.values()) // float32.itemsize, "it has fewer weights than its settings describe"
    )


def require_fitting(weights: dict[str, Tensor], model: nn.Module) -> None:
    """Raises ValueError unless these are the weights of the model, by name and shape."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    require_that(
        {name: tensor.shape for name, tensor in weights.items()} == shapes,
        "it does not hold the weights that its settings describe",
    )


def unusable(path: Path, reason: object) -> Unusable:
    return Unusable(f"checkpoint={path} cannot be used: {reason}; name another checkpoint")


def path_of(folder: Path, epoch: int, batch: int = 0) -> Path:
    """Returns the path of a checkpoint in its run folder."""
    return folder / checkpoint_name(epoch, batch)


def all_in(folder: Path) -> list[Path]:
    """Returns the paths of all checkpoints in a run folder, the newest first."""
    progress = (parse_checkpoint(path.name) for path in folder.glob("checkpoint-*.pt"))
    return [path_of(folder, *one) for one in sorted(filter(None, progress), reverse=True)]


def save(checkpoint: Checkpoint, folder: Path, best_before: int = 0) -> None:
    """Writes a checkpoint into its run folder, then removes older checkpoints except the best.

    `best_before` is the best epoch that the previous checkpoint names. The checkpoint of that epoch stays on
    disk as long as the previous checkpoint does. Raises RunError where the file cannot be written.
    """
    path = path_of(folder, checkpoint.epoch, checkpoint.batch)
    best = [path_of(folder, epoch) for epoch in (checkpoint.best_epoch, best_before)]
    files.write_tensors(path, {"format": FORMAT, **vars(checkpoint)})
    paths = all_in(folder)
    place = paths.index(path)  # later ones could not be used, else the run would have resumed from them
    for old in paths[:place] + paths[place + NEWEST :]:
        if old not in best:
            try:
                old.unlink(missing_ok=True)
            except OSError as error:  # no reason to end the training
                print(
                    f"vdrop: {old} is no longer needed, and cannot be removed ({error.strerror})",
                    file=sys.stderr,
                )


def load(path: Path) -> Checkpoint:
    """Returns the checkpoint in a file.

    Raises Unusable where it cannot be used, ConfigError where the file cannot be read now; both say why.
    """
    try:
        content = files.read_tensors(path)
    except FileNotFoundError:
        raise Unusable(
            f"checkpoint={path} does not exist; name a checkpoint file or a run folder below outputs/train"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"checkpoint={path} cannot be read ({error.strerror}); make it readable, or remove it"
        ) from None
    except Damaged as damage:
        raise Unusable(
            f"checkpoint={path} is damaged or not a checkpoint ({damage}); take another one of the run"
        ) from None
    if content.pop("format", None) != FORMAT:
        raise Unusable(
            f"checkpoint={path} was not written by this version of vdrop (there is no “{FORMAT}” in it); "
            "train again"
        )
    try:
        snapshot = Checkpoint(**content)
        require_valid(snapshot)
    except TypeError:
        raise unusable(path, "it lacks a part, or has one too many") from None
    except ValueError as reason:
        raise unusable(path, reason) from None
    return snapshot


def attempt(path: Path, use: Callable[[Checkpoint], Used]) -> Used | None:
    """Applies `use` to the checkpoint in a file and returns the result, or None where that fails.

    It fails where the checkpoint cannot be used, or where `use` raises Unusable or ValueError; the reason is
    printed. Raises ConfigError where the file cannot be read now.
    """
    try:
        snapshot = load(path)
        require_that(
            path_of(path.parent, snapshot.epoch, snapshot.batch) == path,
            "it is of another epoch than its name says",
        )
        return use(snapshot)
    except Unusable as error:
        print(f"vdrop: {error}", file=sys.stderr)
    except ValueError as reason:
        print(f"vdrop: {unusable(path, reason)}", file=sys.stderr)
    return None


def newest(
    folder: Path, require_usable: Callable[[Checkpoint], object] = lambda snapshot: None
) -> Checkpoint | None:
    """Returns the newest checkpoint of a run that can be used; None where the run has no checkpoint yet.

    Unusable checkpoints are reported on standard error and skipped. `require_usable` raises ValueError where
    a checkpoint does not fit its purpose. Raises ConfigError where the run has checkpoints but none of them
    can be used, or where a checkpoint cannot be read now.
    """

    def use(snapshot: Checkpoint) -> Checkpoint:
        require_usable(snapshot)
        return snapshot

    paths = all_in(folder)
    for path in paths:
        if (snapshot := attempt(path, use)) is not None:
            return snapshot
    if paths:
        raise ConfigError(f"{folder} holds no checkpoint that can be used; train again with force=true")
    return None


def at_end_of_epoch(folder: Path, epoch: int, model: nn.Module) -> Checkpoint:
    """Returns the checkpoint at the end of an epoch.

    Raises Unusable, or ValueError where it is of another epoch or its weights are not those of the model.
    """
    snapshot = load(path_of(folder, epoch))
    require_that((snapshot.epoch, snapshot.batch) == (epoch, 0), "it is of another epoch than its name says")
    require_fitting(snapshot.model, model)
    return snapshot


def find(named: str) -> Path:
    """Returns the checkpoint file that the setting `checkpoint` names.

    The path of a file is returned as it is. For a run folder, the file is the checkpoint of the best epoch
    where the run reports its best epoch, else the newest checkpoint that can be used. Raises ConfigError for
    a run folder without a usable checkpoint.
    """
    path = Path(named)
    if not os.path.isdir(path):  # also False where access is denied; reading the file reports why
        return path
    require_own = partial(require_of_run, folder=path)
    last = newest(path, require_own)
    if last is None:
        raise ConfigError(
            f"checkpoint={named} is a folder without checkpoint-*.pt; name a run folder below outputs/train"
        )
    newest_path = path_of(path, last.epoch, last.batch)
    if newest_path != all_in(path)[0]:
        print(f"vdrop: {newest_path} is used instead", file=sys.stderr)
    if not (last.train.reports_best and last.best_epoch > 0):
        return newest_path
    best = path_of(path, last.best_epoch)
    if last.best_epoch != last.epoch or last.batch:
        try:
            require_own(load(best))
        except ValueError as reason:
            raise unusable(best, reason) from None
    return best


def settings_of_run(folder: Path) -> Train | None:
    """Returns the configuration in a run folder, None where there is none that can be read."""
    try:
        return restore(stored.read_yaml(folder / CONFIG))
    except (OSError, Damaged, ConfigError, OmegaConfBaseException):
        return None


def require_of_run(snapshot: Checkpoint, folder: Path) -> None:
    """Raises ValueError where a checkpoint has other settings than the configuration in its run folder."""
    train = settings_of_run(folder)
    if train is None:
        return
    if snapshot.train.run_identity(snapshot.corpus) != train.run_identity(snapshot.corpus):
        raise ValueError(f"its settings are not those of {folder / CONFIG}, so it is of another run")


def run_folder(settings: Train, fingerprint: str) -> Path:
    """Returns the folder of a run, `outputs/train/<task>-<model>-<dropout>/<hash>-s<seed>`.

    The hash covers the text and all settings that change the numbers. With debug=true, the folder is below
    `outputs/debug`, where nothing looks for finished runs.
    """
    row = f"{settings.task.name}-{settings.model.name}-{settings.dropout.name}"
    folder = Path(settings.outputs) / ("debug" if settings.debug else "train")
    return folder / row / f"{settings.identity(fingerprint)}-s{settings.seed}"
