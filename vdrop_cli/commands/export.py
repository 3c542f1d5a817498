"""`vdrop export`: a checkpoint's weights, and what prediction needs beside them, as a safetensors file for
other programs.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from vdrop_cli import checkpoint, files, ownership, stored
from vdrop_cli.checkpoint import Checkpoint
from vdrop_cli.errors import ConfigError
from vdrop_cli.files import Damaged
from vdrop_cli.model import LanguageModel, Regressor
from vdrop_cli.settings.choices import TaskName
from vdrop_cli.settings.commands import Export
from vdrop_cli.tasks import predictor_of

LENGTH = 8  # bytes that say how long the header is, which comes next: names, shapes and settings as JSON
HEADER_LIMIT = 100_000_000  # bytes of it; safetensors reads no longer ones


def start_size(path: Path) -> int:
    """How many bytes of a safetensors file hold its header; of any other, or where none can be read, so many
    as to tell that.
    """
    try:
        size = int.from_bytes(files.read_start(path, LENGTH), "little")
    except (OSError, Damaged):
        size = 0
    return LENGTH + (size if size <= HEADER_LIMIT else 0)


def parse_start(start: bytes) -> dict[str, Any]:
    """The settings, and what else this command writes, from the start of a file that it has made. Raises
    Damaged.
    """
    header = stored.parse_json(start[LENGTH : LENGTH + int.from_bytes(start[:LENGTH], "little")])
    stored.require(header, {"__metadata__": dict})
    metadata_of_file: dict[str, Any] = header["__metadata__"]
    stored.require(metadata_of_file, {"config": str, "epoch": str})
    return metadata_of_file


def is_export(start: bytes) -> bool:
    """Whether a file starts as those that this command makes, or is empty."""
    return not start or stored.readable_by(parse_start)(start)


def run(settings: Export) -> None:
    try:
        from safetensors.torch import save
    except ImportError:
        raise ConfigError("vdrop export needs safetensors; pip install 'vdrop[export]'") from None
    assert settings.checkpoint is not None
    path = checkpoint.find(settings.checkpoint)
    snapshot = checkpoint.load(path)
    target = path.with_suffix(".safetensors") if settings.file is None else Path(settings.file)
    if not target.name or target.is_dir() or not target.parent.is_dir():
        raise ConfigError(f"file must name a file in a folder that is there, got {settings.file!r}")
    if target.exists() and target.samefile(path):
        raise ConfigError(f"file must be another one than the checkpoint, got {settings.file}")
    require_whole(path, snapshot)
    ownership.require_own(target, is_export, "choose another file=", start_size(target))
    # each weight with memory of its own, in order: safetensors takes no others
    weights = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in snapshot.model.items()
    }
    files.replace(Path(os.path.realpath(target)), save(weights, metadata(snapshot)))
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"{target}: {count:,} weights after epoch {snapshot.epoch}")


def require_whole(path: Path, snapshot: Checkpoint) -> None:
    """Raises ConfigError unless the weights are those that the settings, and the vocabulary where it is
    there, describe.
    """
    trained = snapshot.train
    knowledge = snapshot.knowledge
    embedding = snapshot.model.get("embedding")
    try:
        checkpoint.require(embedding is not None and embedding.dim() == 2, "it has no embedding")
        assert embedding is not None
        words = (
            predictor_of(knowledge, torch.device("cpu")).vocabulary_size
            if knowledge is not None
            else len(embedding)
        )
        checkpoint.require_large_enough(snapshot.model, trained.model, words)
        kind = Regressor if trained.task.name is TaskName.sentiment else LanguageModel
        checkpoint.require_fitting(
            snapshot.model, kind(trained.model, trained.dropout.for_layers(), words, "fused")
        )
    except ValueError as reason:
        raise checkpoint.unusable(path, reason) from None


def metadata(snapshot: Checkpoint) -> dict[str, str]:
    """JSON of the settings, and of each field of what the model has learned of its text
    (`vdrop_cli.learned`).
    """
    learned = {name: as_json(value) for name, value in snapshot.learned.items()}
    return learned | {
        "config": as_json(snapshot.config),
        "corpus": snapshot.corpus,
        "epoch": str(snapshot.epoch),
        "batch": str(snapshot.batch),
    }


def as_json(value: object) -> str:
    """Characters as they are, but for halves of some, which UTF-8 has not."""
    return re.sub(
        r"[\ud800-\udfff]", lambda half: rf"\u{ord(half[0]):04x}", json.dumps(value, ensure_ascii=False)
    )
