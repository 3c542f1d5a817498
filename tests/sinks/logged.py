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

# An epoch has 53 checks: after its 36 steps, before the 16 chunks of its validation, and at its end. So the
# process dies after step 18 of the second epoch.
CHECKS_BEFORE_DEATH = 70


class Death(Exception):
    """The process ends without a checkpoint."""


def train_twice(logger: str, text: list[str], monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    """Trains until the process dies in the second epoch, resumes from the checkpoint before, and returns the
    run folder.
    """
    command = [*TINY, *text, f"logger={logger}", "schedule.epochs=2", "log_every=10", "tags=[a,b]", *more]
    checks = iter(range(CHECKS_BEFORE_DEATH))

    def die() -> None:
        if next(checks, None) is None:
            raise Death

    with monkeypatch.context() as patch:
        patch.setattr(interruption, "check", die)
        with pytest.raises(Death):
            train.run(settings(*command))
    (newest,) = Path().rglob("checkpoint-*.pt")
    last = {kind: records_of(newest.parent, kind)[-1]["step"] for kind in ("step", "epoch")}
    assert newest.name == "checkpoint-0001.pt" and last["step"] > last["epoch"] + 10, "steps are made twice"
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
