"""A run on disk: its folder, and everything it needs to go on as one file. Tensors and plain values only."""

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from vdrop_cli.config import ConfigError, Precision, Train, restore

FORMAT = "vdrop checkpoint 1"
KEPT = 2  # newest checkpoints, beside the best one


PARTS = {"config": dict, "corpus": str, "epoch": int, "seconds": float, "best_epoch": int, "best_ppl": float, "model": dict}


@dataclass
class Checkpoint:
    """What a run is at the end of an epoch; masks and order are functions of seed and epoch, so nothing else is needed."""

    config: dict[str, Any]  # as `config.plain` writes it
    corpus: str  # fingerprint
    epoch: int  # the last one finished, counted from 1
    seconds: float  # of training and validation so far
    best_epoch: int
    best_ppl: float  # valid_ppl_batched of that epoch
    model: dict[str, Tensor] = field(repr=False)

    @property
    def train(self) -> Train:
        return restore(self.config)


def path_of(folder: Path, epoch: int) -> Path:
    return folder / f"checkpoint-{epoch:04}.pt"


def all_in(folder: Path) -> list[Path]:
    """Newest first."""
    epochs = [int(found[1]) for path in folder.glob("checkpoint-*.pt") if (found := re.fullmatch(r"checkpoint-(\d{4,})\.pt", path.name))]
    return [path_of(folder, epoch) for epoch in sorted(epochs, reverse=True)]


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Written beside and renamed into place, so that a file of this name is always whole; older ones but the best are removed."""
    path = path_of(folder, checkpoint.epoch)
    beside = path.with_suffix(".tmp")
    with beside.open("wb") as file:
        torch.save({"format": FORMAT, **vars(checkpoint)}, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    best = path_of(folder, checkpoint.best_epoch)
    for old in all_in(folder)[KEPT:]:
        if old != best:
            old.unlink()


def load(path: Path) -> Checkpoint:
    """A checkpoint from its file; one that cannot be used is an error that says why."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"checkpoint={path} is not there; name a checkpoint file or a run folder below outputs/train") from None
    except Exception as error:  # whatever the reader of a damaged file stumbles over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"checkpoint={path} is damaged or not a checkpoint ({reason[:120]}); take another one of the run") from None
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise ConfigError(f"checkpoint={path} was not written by this version of vdrop (no «{FORMAT}» in it); train again")
    try:
        found = Checkpoint(**{name: kind(held[name]) for name, kind in PARTS.items()})
        found.config.setdefault("precision", Precision.fp32.name)  # there was no other before it was a setting
        if all(isinstance(tensor, Tensor) for tensor in found.model.values()) and found.train:
            return found
    except (KeyError, TypeError, ValueError, ConfigError, OmegaConfBaseException):
        pass
    raise ConfigError(f"checkpoint={path} lacks a part, or holds something else in its place; take another one of the run")


def newest(folder: Path) -> Checkpoint | None:
    """The newest one of a run that can be used; damaged ones are reported and passed over."""
    for path in all_in(folder):
        try:
            return load(path)
        except ConfigError as error:
            print(f"vdrop: {error}; trying the one before", file=sys.stderr)
    return None


def find(named: str) -> Path:
    """The file that the setting `checkpoint` means: itself, or of a run folder the one that its result is reported from."""
    path = Path(named)
    if not path.is_dir():
        return path
    files = all_in(path)
    if not files:
        raise ConfigError(f"checkpoint={named} is a folder without checkpoint-*.pt; name a run folder below outputs/train")
    last = load(files[0])
    return path_of(path, reported_epoch(last))


def reported_epoch(last: Checkpoint) -> int:
    """Early stopping reports the best epoch on validation, otherwise it is the last one, as in the paper."""
    return last.best_epoch if last.train.schedule.patience is not None else last.epoch


def run_folder(settings: Train, fingerprint: str) -> Path:
    """`outputs/train/<task>-<model>-<dropout>/<what changes the numbers>-s<seed>`"""
    row = f"{settings.task.name}-{settings.model.name}-{settings.dropout.name}"
    return Path(settings.outputs) / "train" / row / f"{settings.identity(fingerprint)}-s{settings.seed}"
