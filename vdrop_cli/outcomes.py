"""Outcomes of the jobs of a sweep, as files in the sweep's folder."""

import json
import os
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_origin

from vdrop_cli import files, stored
from vdrop_cli.errors import RunError
from vdrop_cli.files import Damaged

SUMMARY = "summary.json"
SIZE_LIMIT = 10_000_000  # bytes
DONE = ("done", "resumed", "skipped")


@dataclass
class Outcome:
    """How a job ended. `status`: done, resumed, skipped, failed, interrupted, lost, begun or not begun."""

    overrides: list[str]
    status: str = "begun"
    code: int = 0  # the job's exit code
    reason: str = ""
    started_over: bool = False  # whether force=true has had its effect, which a requeued job must not repeat
    folder: str = ""  # the run folder, relative to the sweep's folder; empty until it is known

    @property
    def is_done(self) -> bool:
        return self.status in DONE


TYPES: dict[str, Any] = {f.name: get_origin(f.type) or f.type for f in fields(Outcome)}


def path_of(folder: Path, number: int) -> Path:
    """Returns the path of a job's outcome in the folder of its sweep."""
    return folder / f"{number}.json"


def paths(folder: Path) -> list[Path]:
    """All files in the folder that have the name of an outcome."""
    return [path for path in folder.glob("*.json") if re.fullmatch("0|[1-9][0-9]*", path.stem)]


def from_plain(values: object) -> Outcome:
    """An outcome from a JSON value. Raises Damaged."""
    if not isinstance(values, dict) or values.keys() != TYPES.keys():
        raise Damaged("it is not an outcome")
    stored.require_types(values, TYPES)
    if not all(isinstance(override, str) for override in values["overrides"]):
        raise Damaged("overrides must be a list of texts")
    return Outcome(**values)


def parse(content: bytes) -> Outcome:
    """Raises Damaged."""
    return from_plain(stored.parse_value(content))


def parse_summary(content: bytes) -> list[Outcome]:
    """Raises Damaged."""
    values = stored.parse_value(content)
    if not isinstance(values, list):
        raise Damaged("it is not a list")
    return [from_plain(value) for value in values]


def read(path: Path) -> Outcome:
    """The outcome in a file; "not begun" if no outcome can be read there."""
    try:
        return parse(files.read(path, SIZE_LIMIT))
    except (OSError, Damaged):
        return Outcome([], "not begun")


def read_all(folder: Path) -> list[Outcome]:
    """The outcomes of a sweep: those of its summary or, until it has one, those of its jobs so far.

    Raises ConfigError.
    """
    path = folder / SUMMARY
    if not path.exists():
        return [read(one) for one in sorted(paths(folder), key=lambda one: int(one.stem))]
    with files.reading(path, "name the run folders themselves"):
        return parse_summary(files.read(path, SIZE_LIMIT))


def write(outcome: Outcome | list[Outcome], path: Path | None) -> None:
    """Writes to `path`, unless it is None. A failure to write is reported on standard error, not raised."""
    if path is not None:
        plain = asdict(outcome) if isinstance(outcome, Outcome) else [asdict(one) for one in outcome]
        try:
            files.replace(path, (json.dumps(plain, indent=1) + "\n").encode())
        except RunError as error:
            print(f"vdrop: {error}", file=sys.stderr, flush=True)


def run_folder(sweep: Path, outcome: Outcome) -> Path:
    """The run folder of a job, relative to the working directory if it lies below it."""
    path = Path(os.path.normpath(sweep.absolute() / outcome.folder))
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
