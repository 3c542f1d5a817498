"""A run on disk: its folder, and everything it needs to go on as one file. Tensors and plain values only."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from vdrop_cli import files
from vdrop_cli.config import ConfigError, Train, restore
from vdrop_cli.files import Damaged

FORMAT = "vdrop checkpoint 3"
KEPT = 2  # newest checkpoints, beside the best one


class Unusable(ConfigError):
    """There is nothing that could serve as a checkpoint, now or later."""


@dataclass
class Checkpoint:
    """What a run is between two steps; masks and order are functions of seed, epoch and batch, so nothing else is needed."""

    config: dict[str, Any]  # as `config.plain` writes it
    corpus: str  # fingerprint
    environment: dict[str, Any]  # versions, device, commit
    epoch: int  # the last one finished, counted from 1
    batch: int  # how many batches of the epoch after that are done
    seconds: float  # of training and validation so far
    epoch_seconds: float  # of these, those that belong to the epoch that is not finished
    epoch_words: int  # of training text read in it
    best_epoch: int
    best: float  # the metric by which it is that
    losses: list[float] = field(repr=False)  # of the batches done, as they are written down
    state: list[Tensor] = field(repr=False)  # carried from batch to batch; nothing at the start of an epoch
    model: dict[str, Tensor] = field(repr=False)
    optimiser: dict[str, Any] = field(repr=False)

    @property
    def train(self) -> Train:
        return restore(self.config)

    @property
    def holds_what_it_should(self) -> bool:
        plain = {
            "config": dict,
            "corpus": str,
            "environment": dict,
            "epoch": int,
            "batch": int,
            "epoch_words": int,
            "seconds": float,
            "epoch_seconds": float,
        }
        plain |= {"best_epoch": int, "best": float, "losses": list, "state": list, "model": dict, "optimiser": dict}
        tensors = [*self.state, *self.model.values()] if isinstance(self.state, list) and isinstance(self.model, dict) else [None]
        return (
            all(isinstance(getattr(self, name), kind) for name, kind in plain.items())
            and all(isinstance(tensor, Tensor) for tensor in tensors)
            and all(isinstance(loss, float) for loss in self.losses)
            and bool(self.train)
        )


def path_of(folder: Path, epoch: int, batch: int = 0) -> Path:
    """`checkpoint-0003.pt` for the end of the third epoch, `checkpoint-0003-00812.pt` for 812 batches later."""
    return folder / f"checkpoint-{epoch:04}{f'-{batch:05}' if batch else ''}.pt"


def all_in(folder: Path) -> list[Path]:
    """Newest first."""
    names = (re.fullmatch(r"checkpoint-(\d{4,})(?:-(\d{5,}))?\.pt", path.name) for path in folder.glob("checkpoint-*.pt"))
    places = sorted(((int(found[1]), int(found[2] or 0)) for found in names if found), reverse=True)
    return [path_of(folder, *place) for place in places]


def save(checkpoint: Checkpoint, folder: Path, best_before: int = 0) -> None:
    """Older ones but the best are removed when it is there. Raises RunError where it cannot be written.

    `best_before` is the best epoch that the checkpoint before this one names, which stays as long as that one does.
    """
    path = path_of(folder, checkpoint.epoch, checkpoint.batch)
    best = [path_of(folder, epoch) for epoch in (checkpoint.best_epoch, best_before)]
    files.write_tensors(path, {"format": FORMAT, **vars(checkpoint)})
    there = all_in(folder)
    now = there.index(path)  # later ones could not be used, else the run would have gone on from them
    for old in there[:now] + there[now + KEPT :]:
        if old not in best:
            try:
                old.unlink(missing_ok=True)
            except OSError as error:  # no reason to end the training
                print(f"vdrop: {old} is no longer needed, and cannot be removed ({error.strerror})", file=sys.stderr)


def load(path: Path) -> Checkpoint:
    """A checkpoint from its file; one that cannot be used is an error that says why."""
    try:
        held = files.read_tensors(path)
    except FileNotFoundError:
        what = "is not a file" if path.exists() else "is not there"
        raise Unusable(f"checkpoint={path} {what}; name a checkpoint file or a run folder below outputs/train") from None
    except OSError as error:
        raise ConfigError(f"checkpoint={path} cannot be read ({error.strerror}); see to it that it can, or remove it") from None
    except Damaged as damage:
        raise Unusable(f"checkpoint={path} is damaged or not a checkpoint ({damage}); take another one of the run") from None
    if held.pop("format", None) != FORMAT:
        raise Unusable(f"checkpoint={path} was not written by this version of vdrop (no «{FORMAT}» in it); train again")
    try:
        found = Checkpoint(**held)
        if found.holds_what_it_should:
            return found
    except (TypeError, ValueError, ConfigError, OmegaConfBaseException):
        pass
    raise Unusable(f"checkpoint={path} lacks a part, or holds something else in its place; take another one of the run")


def newest(folder: Path) -> Checkpoint | None:
    """The newest one of a run that can be used, None where there is none yet; damaged ones are reported and passed over.

    Raises ConfigError where all are damaged, or one cannot be read now.
    """
    there = all_in(folder)
    for path in there:
        try:
            return load(path)
        except Unusable as error:
            print(f"vdrop: {error}", file=sys.stderr)
    if there:
        raise ConfigError(f"{folder} holds no checkpoint that can be used; train again with force=true")
    return None


def find(named: str) -> Path:
    """The file that the setting `checkpoint` means: itself, or of a run folder the one that its result is reported from."""
    path = Path(named)
    if not path.is_dir():
        return path
    last = newest(path)
    if last is None:
        raise ConfigError(f"checkpoint={named} is a folder without checkpoint-*.pt; name a run folder below outputs/train")
    best = last.train.reports_best and last.best_epoch > 0
    return path_of(path, last.best_epoch) if best else path_of(path, last.epoch, last.batch)


def run_folder(settings: Train, fingerprint: str) -> Path:
    """`outputs/train/<task>-<model>-<dropout>/<what changes the numbers>-s<seed>`"""
    row = f"{settings.task.name}-{settings.model.name}-{settings.dropout.name}"
    return Path(settings.outputs) / "train" / row / f"{settings.identity(fingerprint)}-s{settings.seed}"
