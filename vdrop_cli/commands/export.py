"""`vdrop export`: the weights of a checkpoint as a safetensors file, for other programs."""

import json
from pathlib import Path

from vdrop_cli import checkpoint, files
from vdrop_cli.config import ConfigError, Export


def run(settings: Export) -> None:
    try:
        from safetensors.torch import save
    except ImportError:
        raise ConfigError("vdrop export needs safetensors; pip install 'vdrop[export]'") from None
    assert settings.checkpoint is not None
    path = checkpoint.find(settings.checkpoint)
    found = checkpoint.load(path)
    target = path.with_suffix(".safetensors") if settings.file is None else Path(settings.file)
    if not target.name or target.is_dir() or not target.parent.is_dir():
        raise ConfigError(f"file must name a file in a folder that is there, got {settings.file!r}")
    if target.exists() and target.samefile(path):
        raise ConfigError(f"file must be another one than the checkpoint, got {settings.file}")
    told = {"config": json.dumps(found.config), "corpus": found.corpus, "epoch": str(found.epoch), "batch": str(found.batch)}
    files.replace(target, save(found.model, told))
    print(f"{target}: {sum(tensor.numel() for tensor in found.model.values()):,} weights after epoch {found.epoch}")
