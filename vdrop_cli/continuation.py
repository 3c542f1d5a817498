"""A run that continues a shorter run: one with the same settings but fewer epochs, in a folder beside it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from vdrop_cli import checkpoint, files, ownership, sinks, stored
from vdrop_cli.checkpoint import Checkpoint
from vdrop_cli.errors import ConfigError
from vdrop_cli.files import Damaged
from vdrop_cli.lock import is_locked
from vdrop_cli.run_files import CONFIG, LOG, SHARED_DEVICE, parse_checkpoint
from vdrop_cli.settings.choices import Backend, Precision
from vdrop_cli.settings.fields import plain
from vdrop_cli.settings.train import Train
from vdrop_cli.tasks import Task


@dataclass(frozen=True)
class Beginning:
    """A shorter run up to the end of one of its epochs.

    The checkpoints are changed to what the longer run would have written.
    """

    folder: Path
    newest: Checkpoint
    best: Checkpoint | None  # of the best epoch, if it is reported and is not that of `newest`
    log: bytes | None  # None: it was lost
    events: dict[str, bytes]  # TensorBoard's files, by name
    shared_device: bytes | None  # content of the file SHARED_DEVICE; None without it


def ends_of_epochs(folder: Path, settings: Train, fingerprint: str) -> list[tuple[int, Path]]:
    """Returns the checkpoints at the end of an epoch of all shorter runs beside a run folder.

    Each has the number of its epoch in front; the latest epoch comes first.
    """
    shorter = [
        other
        for other in folder.parent.glob(f"*-s{settings.seed}")
        if is_shorter(other, settings, fingerprint)
    ]
    ends = [
        (progress[0], path)
        for other in shorter
        for path in checkpoint.all_in(other)
        if (progress := parse_checkpoint(path.name)) is not None and progress[1] == 0
    ]
    return sorted(ends, reverse=True)


def is_shorter(folder: Path, settings: Train, fingerprint: str) -> bool:
    """Whether the run in a folder has these settings, except for fewer epochs.

    The name of the folder decides: it has the hash of all settings that change the numbers. No run is shorter
    where the learning rate depends on the number of epochs.
    """
    if settings.schedule.falls_to_the_end:
        return False
    try:
        epochs = stored.read_yaml(folder / CONFIG)["schedule"]["epochs"]
    except (OSError, Damaged, KeyError, TypeError):  # no run folder, or one whose settings cannot be read
        return False
    if not (isinstance(epochs, int) and 1 <= epochs < settings.schedule.epochs):
        return False
    try:
        shorter = with_epochs(settings, epochs)
    except ConfigError:  # settings that are not valid with fewer epochs: an average may begin later
        return False
    return folder.name == checkpoint.run_folder(shorter, fingerprint).name


def unfinished_variants(folder: Path, settings: Train, fingerprint: str) -> Iterator[tuple[Path, str]]:
    """Yields the unfinished runs beside a run folder that differ only in device, back end or precision.

    Each comes with the settings that resume it, such as "device=cpu precision=fp32".
    """
    for other in sorted(folder.parent.glob(f"*-s{settings.seed}")):
        has_ended = any((other / name).exists() for name in ownership.OUTCOMES)
        is_trained_now = is_locked(other / ownership.LOCK)
        if other == folder or has_ended or is_trained_now or not checkpoint.all_in(other):
            continue
        with suppress(OSError, Damaged, KeyError, TypeError, ConfigError):
            config = stored.read_yaml(other / CONFIG)
            backend, precision = Backend[config["backend"]], Precision[config["precision"]]
            same = replace(settings, device=config["device"], backend=backend, precision=precision)
            if other.name == checkpoint.run_folder(same, fingerprint).name:
                names = ("device", "backend", "precision")
                changed = [name for name in names if getattr(same, name) != getattr(settings, name)]
                yield other, " ".join(f"{name}={getattr(same, name)}" for name in changed)


def with_epochs(settings: Train, epochs: int) -> Train:
    return replace(settings, schedule=replace(settings.schedule, epochs=epochs))


def find(
    folder: Path,
    settings: Train,
    task: Task,
    model: nn.Module,
    require_usable: Callable[[Checkpoint], object],
) -> Beginning | None:
    """Returns the beginning of a run from the latest usable checkpoint of a shorter run, None without one.

    Only checkpoints at the end of an epoch count. Unusable ones are reported on standard error.
    `require_usable` raises ValueError where a checkpoint does not fit the longer run. Raises ConfigError
    where a file cannot be read now.
    """

    def use(snapshot: Checkpoint, shorter: Path) -> Beginning:
        newest, best = lengthened(snapshot, settings, task.fingerprint), None
        require_usable(newest)
        if settings.reports_best and snapshot.best_epoch < snapshot.epoch:
            best = lengthened(
                checkpoint.at_end_of_epoch(shorter, snapshot.best_epoch, model), settings, task.fingerprint
            )
        step = settings.schedule.steps_after(snapshot.epoch, task.batches_an_epoch)
        return Beginning(
            shorter,
            newest,
            best,
            log_until(shorter, snapshot.epoch, step),
            events_until(shorter, snapshot.epoch, step),
            shared_device(shorter),
        )

    ends = ends_of_epochs(folder, settings, task.fingerprint)
    for _, path in ends:
        if (beginning := checkpoint.attempt(path, partial(use, shorter=path.parent))) is not None:
            return beginning
    if ends:
        print(
            f"vdrop: {folder} begins from nothing: no checkpoint of a shorter run beside it can be used",
            file=sys.stderr,
        )
    return None


def lengthened(snapshot: Checkpoint, settings: Train, fingerprint: str) -> Checkpoint:
    """Returns a checkpoint of a shorter run as the longer run would have written it.

    Raises ValueError where the two runs differ in more than their number of epochs.
    """
    longer = with_epochs(snapshot.train, settings.schedule.epochs)
    same = longer.run_identity(snapshot.corpus) == settings.run_identity(fingerprint)
    is_reached = snapshot.epoch <= snapshot.train.schedule.epochs < settings.schedule.epochs
    checkpoint.require_that(
        same and is_reached, "it is of other settings than those that its folder is named by"
    )
    return replace(snapshot, config=plain(longer))


def shared_device(folder: Path) -> bytes | None:
    """Returns the content of a run's file SHARED_DEVICE, None without this file.

    Raises ConfigError where it cannot be read now, ValueError where it is not a regular file.
    """
    try:
        return files.read(folder / SHARED_DEVICE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise files.read_error(folder / SHARED_DEVICE, error) from None
    except Damaged as damage:
        raise ValueError(f"{folder / SHARED_DEVICE} cannot be read ({damage})") from None


def log_until(folder: Path, epochs: int, step: int) -> bytes | None:
    """Returns the log of a run until a step, None where it has none.

    Raises ValueError where the log is damaged, ConfigError where it cannot be read now.
    """
    path = folder / LOG
    try:
        return sinks.log_until(path, epochs, step)
    except Damaged as damage:
        raise ValueError(f"{path} is not the log of its run ({damage})") from None


def events_until(folder: Path, epochs: int, step: int) -> dict[str, bytes]:
    """Returns the TensorBoard events of a run until a step, by file; unreadable files are left out."""
    logs = {}
    for path in ownership.events_in(folder):
        with suppress(OSError, Damaged):
            logs[path.name] = sinks.events_until(files.read(path), epochs, step)
    return logs


def copy(beginning: Beginning, folder: Path) -> None:
    """Copies the beginning into the folder of the longer run, which has no checkpoint yet.

    Where copying is interrupted, at whatever point, the longer run still trains to the same result.

    Raises RunError where something cannot be written.
    """
    for path in ownership.events_in(folder):  # of a run that was killed before its first checkpoint
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise files.file_error(path, error) from None
    for name, content in beginning.events.items():
        files.replace(folder / name, content)
    if beginning.log is not None:
        files.replace(folder / LOG, beginning.log)
    if beginning.shared_device is not None:
        files.replace(folder / SHARED_DEVICE, beginning.shared_device)
    for snapshot in (beginning.best, beginning.newest):
        if snapshot is not None:
            checkpoint.save(snapshot, folder)
