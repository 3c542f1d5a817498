"""Training that a number of steps ends."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, TINY_SENTIMENT, settings
from vdrop_cli import interruption
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError
from vdrop_cli.interruption import Interrupted
from vdrop_cli.settings.train import Train
from vdrop_cli.sinks import read_log


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(config: Train) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trains; returns the records of steps and epochs without times, and the result."""
    train.run(config)
    return read(Path(config.outputs))


def read(outputs: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    (path,) = outputs.rglob("result.json")
    dropped = ("seconds", "words_per_second", "chain")
    records = [
        {name: value for name, value in record.items() if name not in dropped}
        for record in read_log(path.parent / "log.jsonl")
        if record["kind"] in ("step", "epoch")
    ]
    result = {name: value for name, value in json.loads(path.read_text()).items() if name not in dropped}
    return records, result


@pytest.mark.parametrize("task", ["language_model", "sentiment"])
def test_max_steps_ends_the_training_within_an_epoch(task: str, text: list[str], rated: list[str]) -> None:
    """Its steps are the first ones of the whole training; the epoch is validated and reported."""
    chosen = [*TINY, *text] if task == "language_model" else [*TINY_SENTIMENT, *rated]
    overrides = [*chosen, "schedule.epochs=3", "log_every=1"]
    whole, whole_result = run(settings(*overrides, "outputs=whole"))
    steps = next(record["step"] for record in whole if record["kind"] == "epoch")
    limit = steps + steps // 2
    short, result = run(settings(*overrides, f"schedule.max_steps={limit}", "outputs=short"))
    assert short[:-1] == whole[: len(short) - 1]
    assert short[-1]["kind"] == "epoch" and (short[-1]["epoch"], short[-1]["step"]) == (2, limit)
    assert (result["epochs"], result["stopped_after_steps"]) == (2, limit)
    assert "stopped_after_steps" not in whole_result


def test_max_steps_beyond_the_last_epoch_changes_no_number(text: list[str]) -> None:
    whole = run(settings(*TINY, *text, "outputs=whole"))
    assert run(settings(*TINY, *text, "schedule.max_steps=100000", "outputs=limited")) == whole


@pytest.mark.parametrize("stop", ["middle", "last"])
def test_a_run_with_max_steps_resumes(stop: str, text: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*TINY, *text, "schedule.epochs=3", "schedule.max_steps=30", "log_every=1"]
    whole = run(settings(*overrides, "outputs=whole"))
    assert whole[1]["stopped_after_steps"] == 30
    config = settings(*overrides, "outputs=stopped")
    checks = iter(range(1000))
    with monkeypatch.context() as stopping:
        last = {"middle": 12, "last": 29}[stop]
        check = interruption.check

        def stop_at_step() -> None:
            if next(checks) == last:
                stopping.setattr(interruption, "received", [signal.SIGTERM])
            check()

        stopping.setattr(interruption, "check", stop_at_step)
        with pytest.raises(Interrupted):
            train.run(config)
    assert train.run(config) == "resumed"
    assert read(Path("stopped")) == whole
    assert train.run(config) == "skipped"


def test_a_longer_run_with_the_same_max_steps_continues_the_shorter_one(
    text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*TINY, *text, "schedule.max_steps=30", "log_every=1"]
    whole = run(settings(*overrides, "schedule.epochs=40", "outputs=whole"))
    train.run(settings(*overrides, "schedule.epochs=20"))
    epochs = whole[1]["epochs"]
    assert epochs < 20, "the shorter run has all steps, too"
    capsys.readouterr()
    train.run(settings(*overrides, "schedule.epochs=40"))
    assert f"after step 30 of epoch {epochs}" in capsys.readouterr().err
    path = next(
        path.parent for path in Path("outputs").rglob("config.yaml") if "epochs: 40" in path.read_text()
    )
    assert json.loads((path / "result.json").read_text())["test_ppl"] == whole[1]["test_ppl"]


def test_the_identity_of_a_run_without_max_steps_stays(text: list[str]) -> None:
    without = settings(*TINY, *text)
    assert settings(*TINY, *text, "schedule.max_steps=null").identity("f") == without.identity("f")
    assert settings(*TINY, *text, "schedule.max_steps=9").identity("f") != without.identity("f")


@pytest.mark.parametrize("steps", ["0", "-1", "2147483648"])
def test_max_steps_has_limits(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"^schedule\.max_steps must be "):
        settings(f"schedule.max_steps={steps}")


def test_a_start_cannot_be_judged_after_the_last_step() -> None:
    with pytest.raises(ConfigError, match=r"^stuck\.steps must be at most schedule\.max_steps=100, or null"):
        settings("stuck.steps=200", "schedule.max_steps=100")
