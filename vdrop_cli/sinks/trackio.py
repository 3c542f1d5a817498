"""A run at Trackio."""

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import trackio
from trackio.sqlite_storage import SQLiteStorage

from vdrop_cli.sinks.loggers import PROJECT
from vdrop_cli.sinks.records import TAGS


class TrackioRun:
    """A run with the name of its run folder.

    A training that does not resume from a checkpoint makes a new run of this name. The horizontal axis of
    `per_epoch/…` and `result/…` counts epochs. Trackio reads its own environment variables: TRACKIO_DIR,
    TRACKIO_SPACE_ID, …
    """

    def __init__(self, folder: Path, config: dict[str, Any], resumes: bool) -> None:
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        with redirect_stdout(sys.stderr):
            self.run = trackio.init(
                project=project,
                name=f"{folder.parent.name}-{folder.name}",
                group=config["run_name"],
                config=config,
                resume="allow" if resumes else "never",
                embed=False,
            )
        rows = SQLiteStorage.get_logs(project, self.run.name, run_id=self.run.id)  # none of a remote run
        self.recorded = {
            kind: max((row["step"] for row in rows if has_tag(row, TAGS[kind])), default=0)
            for kind in ("step", "epoch")
        }

    def log(self, kind: str, values: dict[str, float], position: int) -> None:
        self.run.log(values, step=position)

    def flush(self) -> None:
        """Does nothing: Trackio sends numbers in a thread of its own."""

    def finish(self, failed: bool) -> None:
        with redirect_stdout(sys.stderr):
            trackio.finish()


def has_tag(row: dict[str, Any], tag: str) -> bool:
    return any(name.startswith(tag) for name in row)
