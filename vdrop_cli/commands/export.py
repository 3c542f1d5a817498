"""`vdrop export`: a checkpoint as a safetensors file, or as a folder to share."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from vdrop_cli import checkpoint, files, ownership, trained_model
from vdrop_cli.checkpoint import Checkpoint
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.commands import Export
from vdrop_cli.sharing import folder, hub, weights


def run(settings: Export) -> None:
    weights.require_installed()
    if settings.push is not None:
        hub.require_token()
    assert settings.checkpoint is not None
    path = trained_model.find(settings.checkpoint)
    if trained_model.is_export(path):
        raise ConfigError(f"checkpoint={path} is an export already; name a checkpoint file or a run folder")
    snapshot = checkpoint.load(path)
    weights.require_whole(path, snapshot)
    if settings.folder is not None:
        export_folder(path, snapshot, Path(settings.folder), settings)
    elif settings.push is not None:
        with TemporaryDirectory() as temporary:
            export_folder(path, snapshot, Path(temporary), settings)
    else:
        export_file(path, snapshot, settings.file)


def export_file(path: Path, snapshot: Checkpoint, file: str | None) -> None:
    """Writes a safetensors file; None: beside the checkpoint."""
    target = path.with_suffix(weights.SUFFIX) if file is None else Path(file)
    if not target.name or os.path.isdir(target):
        raise ConfigError(f"file must name a file, not a folder, got {file!r}")
    if os.path.exists(target) and target.samefile(path):
        raise ConfigError(f"file must be another one than the checkpoint, got {file}")
    if target.suffix != weights.SUFFIX:
        raise ConfigError(f"file must end with {weights.SUFFIX}, by which vdrop reads it back, got {file}")
    ownership.require_own(target, weights.is_export, "choose another file=", weights.start_size(target))
    files.write_output(target, weights.encode(snapshot), "file")
    print(f"{target}: {describe(snapshot)}")


def export_folder(path: Path, snapshot: Checkpoint, target: Path, settings: Export) -> None:
    """Writes a folder, and uploads it if `push` is set."""
    folder.write(path, snapshot, target)
    if settings.folder is not None:
        print(f"{target}: {describe(snapshot)}, model card, vocabulary and settings")
    if settings.push is not None:
        message = f"vdrop export, epoch {snapshot.epoch}"
        print(hub.push(target, settings.push, settings.private, message))


def describe(snapshot: Checkpoint) -> str:
    count = sum(tensor.numel() for tensor in snapshot.weights.values())
    return f"{count:,} weights after epoch {snapshot.epoch}"
