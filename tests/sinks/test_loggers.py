"""What loggers have in common: a run with a client that remembers, or fails."""

from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, settings
from tests.sinks.examples import EPOCH, RESULT, loss_metrics, step
from tests.sinks.logged import logged, timeless, train_twice
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.sinks import loggers, read_log, read_result
from vdrop_cli.sinks.loggers import Logger, require_installed
from vdrop_cli.sinks.records import Saving


@dataclass
class Memory:
    """A client that remembers what it receives, and fails when it has `capacity` records."""

    capacity: int = 10**9
    recorded: dict[str, int] = field(default_factory=dict)
    received: list[tuple[str, int, dict[str, float]]] = field(default_factory=list)
    calls: int = 0
    flushed: int = 0  # records until the last flush
    ends: list[bool] = field(default_factory=list)

    def log(self, kind: str, values: dict[str, float], position: int) -> None:
        self.calls += 1
        if len(self.received) == self.capacity:
            raise ConnectionError("no route\nto host")
        self.received.append((kind, position, values))

    def flush(self) -> None:
        self.flushed = len(self.received)

    def finish(self, failed: bool) -> None:
        self.ends.append(failed)

    def open(self, folder: Path, config: dict[str, Any], resumes: bool) -> "Memory":
        """Takes the place of a package; a run that resumes has what it received before."""
        newest = {kind: position for kind, position, _ in self.received}
        self.recorded = newest if resumes else {}
        self.received = self.received if resumes else []
        return self


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Memory:
    """A client in the place of the package wandb."""
    monkeypatch.chdir(tmp_path)
    client = Memory()
    package = type("Package", (), {"name": "wandb", "open": staticmethod(client.open)})
    monkeypatch.setitem(loggers.PACKAGES, "wandb", package)
    monkeypatch.setattr(loggers, "find_spec", lambda name: ModuleSpec(name, None, origin="here"))
    return client


def test_a_client_receives_every_nth_step_every_epoch_and_the_result(tmp_path: Path) -> None:
    client = Memory()
    with Logger("x", client.open, tmp_path, {"log_every": 3}, False, loss_metrics) as sink:
        for record in (*map(step, range(1, 7)), EPOCH, RESULT):
            sink(record)
        assert client.ends == []
    assert [(kind, position) for kind, position, _ in client.received] == [
        ("step", 3),
        ("step", 6),
        ("epoch", 1),
        ("result", 1),
    ]
    (_, _, values), *_, (_, _, result) = client.received
    assert values.keys() == {
        f"step/{name}" for name in ("loss", "grad_norm", "lr", "words_per_second", "train_ppl_dropout")
    }
    assert result == {"result/train_ppl": 5.0, "result/test_ppl": 9.0, "result/seconds": 61.0}
    assert client.ends == [False]


def test_a_client_sends_what_it_has_before_a_checkpoint_is_written(tmp_path: Path) -> None:
    """A killed run resumes after the checkpoint, and does not make the records before it again."""
    client = Memory()
    with Logger("x", client.open, tmp_path, {"log_every": 3}, False, loss_metrics) as sink:
        for record in (*map(step, range(1, 7)), EPOCH):
            sink(record)
        assert client.flushed == 0
        sink(Saving())
        assert client.flushed == 3


def test_records_that_the_logger_has_are_not_repeated(tmp_path: Path) -> None:
    client = Memory()
    for first, epochs in ((0, (1, 2)), (6, (2, 3))):
        with Logger("x", client.open, tmp_path, {"log_every": 2}, first > 0, loss_metrics) as sink:
            for epoch in epochs:
                for number in range(6 * epoch - 5, 6 * epoch + 1):
                    sink(step(number))
                sink(replace(EPOCH, epoch=epoch))
    positions = {
        kind: [at for other, at, _ in client.received if other == kind] for kind in ("step", "epoch")
    }
    assert positions == {"step": list(range(2, 19, 2)), "epoch": [1, 2, 3]}


def test_a_run_whose_process_died_is_recorded_as_in_its_log(
    memory: Memory, text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train_twice("wandb", text, monkeypatch)
    assert memory.ends == [True, False]
    for kind in ("step", "epoch", "result"):
        entries = [(position, values) for other, position, values in memory.received if other == kind]
        expected = logged(folder, kind)
        assert [position for position, _ in entries] == list(expected)
        assert [timeless(values) for _, values in entries] == list(expected.values())
    assert not list(folder.glob("events.*")), "TensorBoard is another logger"


def test_a_logger_that_fails_is_reported_once_and_the_training_ends_well(
    memory: Memory, long_text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    memory.capacity = 3
    assert train.run(settings(*TINY, *long_text, "logger=wandb", "log_every=1")) == "done"
    errors = capsys.readouterr().err
    assert errors.count("logger=wandb") == 1 and "ConnectionError: no route;" not in errors
    assert "(ConnectionError: no route)" in errors and "to host" not in errors
    assert memory.calls == 4 and memory.ends == [True], "no further call"
    (result,) = Path().rglob("result.json")
    log = read_log(result.parent / "log.jsonl")
    assert read_result(result.parent)["test_ppl"] == log[-1]["test_ppl"]
    steps = [record["step"] for record in log if record["kind"] == "step"]
    assert steps == list(range(1, steps[-1] + 1)) and len(steps) > 50


def test_a_logger_that_cannot_start_ends_the_run_before_its_first_step(
    memory: Memory, text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Memory:
        raise OSError("api_key not configured\nmore")

    package = type("Package", (), {"name": "wandb", "open": staticmethod(refuse)})
    monkeypatch.setitem(loggers.PACKAGES, "wandb", package)
    with pytest.raises(RunError, match=r"^logger=wandb cannot start: OSError: api_key not configured; "):
        train.run(settings(*TINY, *text, "logger=wandb"))
    (log,) = Path().rglob("log.jsonl")
    assert log.read_bytes() == b""
    assert train.run(settings(*TINY, *text, "logger=none")) == "done", "the same run, logged elsewhere"
    assert not list(log.parent.glob("events.*")) and read_log(log)[-1]["kind"] == "result"


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None)], ids=["missing", "a folder of that name"])
def test_a_missing_package_is_reported_before_anything_is_written(
    spec: ModuleSpec | None, text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loggers, "find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match=r"^logger=wandb is not installed; pip install 'vdrop\[wandb\]'$"):
        train.run(settings(*TINY, *text, "logger=wandb"))
    assert not list(tmp_path.iterdir())
    require_installed("tensorboard")
    require_installed("none")
