"""A run at Weights & Biases."""

import os
from pathlib import Path
from typing import Any

import wandb

from vdrop_cli.errors import ConfigError
from vdrop_cli.sinks.loggers import PROJECT

UPLOAD_SECONDS = 300  # of waiting at the end; what is not uploaded then stays on disk


class WandbRun:
    """A run whose id is the name of its run folder.

    A training that does not resume from a checkpoint replaces an earlier run with this id. wandb reads its
    own environment variables: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR, …
    """

    def __init__(self, folder: Path, config: dict[str, Any], resumes: bool) -> None:
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=folder.name,
            name=config["run_name"] or f"{folder.parent.name} {folder.name}",
            config=config,
            tags=config["tags"],
            resume="allow" if resumes else None,
            settings=wandb.Settings(
                console="off",  # standard output and error stay vdrop's
                finish_timeout=finish_seconds(),
            ),
        )
        for kind, tags in (("step", "step/*"), ("epoch", "per_epoch/*")):
            self.run.define_metric(kind)
            self.run.define_metric(tags, step_metric=kind)
        self.recorded = {kind: int(self.run.summary.get(kind) or 0) for kind in ("step", "epoch")}

    def log(self, kind: str, values: dict[str, float], position: int) -> None:
        if kind == "result":
            self.run.summary.update(values)
        else:
            self.run.log(values | {kind: position})

    def flush(self) -> None:
        """Does nothing: wandb sends numbers in a thread of its own."""

    def finish(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def finish_seconds() -> float:
    """Returns how long to wait for uploads at the end.

    Raises ConfigError if WANDB_FINISH_TIMEOUT is no number.
    """
    value = os.environ.get("WANDB_FINISH_TIMEOUT", str(UPLOAD_SECONDS))
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"WANDB_FINISH_TIMEOUT must be seconds, got {value}; correct or unset it") from None
