"""A run whose process dies between two checkpoints and is repeated, and the numbers of its log as loggers
name them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, settings
from vdrop_cli import interruption
from vdrop_cli.commands import train
from vdrop_cli.perplexity import ppl
from vdrop_cli.sinks import read_log
from vdrop_cli.sinks.records import TAGS

STEPS_BEFORE_DEATH = 120  # in the second of two epochs, of 96 steps each


class Death(Exception):
    """The process ends without a checkpoint."""


def train_twice(logger: str, text: list[str], monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    """Trains until the process dies in the second epoch, resumes from the checkpoint before, and returns the
    run folder.
    """
    command = [*TINY, *text, f"logger={logger}", "schedule.epochs=2", "log_every=10", "tags=[a,b]", *more]
    steps = iter(range(STEPS_BEFORE_DEATH))

    def die() -> None:
        if next(steps, None) is None:
            raise Death

    with monkeypatch.context() as patch:
        patch.setattr(interruption, "check", die)
        with pytest.raises(Death):
            train.run(settings(*command))
    assert train.run(settings(*command)) == "resumed"
    (result,) = Path().rglob("result.json")
    return result.parent


def logged(folder: Path, kind: str) -> dict[int, dict[str, float]]:
    """The numbers of a kind of record in log.jsonl, by step or epoch, without times and speeds: those of a
    step that was made twice differ.
    """
    position = "step" if kind == "step" else "epoch"
    return {record[position]: timeless(dict(numbers(record))) for record in records_of(folder, kind)}


def timeless(values: dict[str, float]) -> dict[str, float]:
    """Numbers without times and speeds."""
    return {name: value for name, value in values.items() if "second" not in name}


def records_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_log(folder / "log.jsonl") if record["kind"] == kind]


def numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    tag = TAGS[record["kind"]]
    for name, value in record.items():
        if isinstance(value, float):
            yield f"{tag}{name}", value
    if record["kind"] == "step":
        yield f"{tag}train_ppl_dropout", ppl(record["loss"])


def config(folder: Path) -> dict[str, Any]:
    """The settings of a run as its log has them."""
    settings_logged: dict[str, Any] = records_of(folder, "start")[0]["config"]
    return settings_logged
