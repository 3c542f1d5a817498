"""Real processes that are killed at any moment, and go on to what they would have come to undisturbed."""

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY
from tests.processes import ForkServer, is_alive
from vdrop_cli import checkpoint
from vdrop_cli.sinks import read_log

KILLS = 12
LONG = [*TINY, "model.hidden_size=64", "dropout=variational_untied", "schedule.epochs=40", "log_every=1"]


def saved(folder: Path) -> set[tuple[str, int]]:
    """What there is to go on from, and since when."""
    found = set()
    for path in [*folder.rglob("*.pt"), *folder.rglob("*.partial")]:
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def wait_until_it_writes(folder: Path, pid: int) -> None:
    while is_alive(pid) and not [*folder.rglob("*.pt.*.tmp"), *folder.rglob("*.partial.*.tmp")]:
        pass


def disturb(
    fork_server: ForkServer,
    folder: Path,
    arguments: list[str],
    number: signal.Signals,
    ended: Callable[[], None],
) -> list[int]:
    """Runs a command again and again until it was killed so often, then to its end: of three processes, one
    is killed at any moment, one some time after it has saved something, and one, after that, at the instant
    of writing.

    Where it comes to its end before, `ended` looks at what it came to, and takes it away, so that it begins
    anew.
    """
    source, codes, ends = random.Random(int(number)), list[int](), 0
    while len(codes) < KILLS:
        before = saved(folder)
        process = fork_server.start(folder, *arguments)
        while len(codes) % 3 > 0 and is_alive(process.pid) and saved(folder) == before:
            time.sleep(0.001)
        time.sleep(source.uniform(0, 0.06 if len(codes) % 3 else 0.6))
        if len(codes) % 3 == 2:
            wait_until_it_writes(folder, process.pid)
        process.send_signal(number)
        if code := process.wait():
            codes.append(code)
        else:
            ended()
            ends += 1
            assert ends < KILLS, "too quick to be killed"
    assert fork_server.run(folder, *arguments).returncode == 0
    return codes


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """The chain is of the times, too."""
    return {
        name: value
        for name, value in record.items()
        if name not in ("seconds", "words_per_second", "mc_seconds", "chain")
    }


def of_training(folder: Path) -> tuple[Any, ...]:
    """All that a run comes to but how long it took: result, every step and epoch of its log, and the
    weights.
    """
    (result,) = folder.rglob("result.json")
    log = [timeless(record) for record in read_log(result.parent / "log.jsonl") if record["kind"] != "start"]
    last = checkpoint.load(checkpoint.all_in(result.parent)[0])
    weights = {name: tensor.numpy().tobytes() for name, tensor in last.model.items()}
    kept = sorted(
        path.name
        for path in result.parent.iterdir()
        if not path.name.startswith(("events", "checkpoint-0039"))
    )
    return timeless(json.loads(result.read_text())), log, weights, kept


@pytest.fixture(scope="module")
def undisturbed(fork_server: ForkServer, text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert fork_server.run(folder, "train", *LONG, *text).returncode == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_training_killed_at_many_moments_comes_to_the_same(
    number: signal.Signals, fork_server: ForkServer, undisturbed: Path, text: list[str], tmp_path: Path
) -> None:
    def ended() -> None:
        assert of_training(tmp_path) == of_training(undisturbed)
        shutil.rmtree(tmp_path / "outputs")

    codes = disturb(
        fork_server, tmp_path, ["train", *LONG, *text, "checkpoint.minutes=0.0005"], number, ended
    )
    assert of_training(tmp_path) == of_training(undisturbed)
    starts = [
        record["step"] for record in read_log(next(tmp_path.rglob("log.jsonl"))) if record["kind"] == "start"
    ]
    assert starts == sorted(starts)
    told = (tmp_path / "out").read_text()
    assert len(set(re.findall(r"resuming after step (\d+) of epoch \d+", told))) > 3, (
        "it resumed at many places"
    )
    if number is signal.SIGTERM:
        assert set(codes) <= {143, -15} and codes.count(143) > 4, (
            "asked to stop before it listens, a process just ends"
        )
        assert "resume with: vdrop train" in told
    else:
        assert set(codes) == {-9}
    assert "Traceback" not in told and "is damaged" not in told


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_evaluation_killed_at_many_moments_comes_to_the_same(
    number: signal.Signals, fork_server: ForkServer, undisturbed: Path, text: list[str], tmp_path: Path
) -> None:
    (trained,) = undisturbed.rglob("checkpoint-0040.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / trained.name).write_bytes(trained.read_bytes())
    arguments = [
        "eval",
        f"checkpoint=run/{trained.name}",
        "stored_data=true",
        "mc_samples=1500",
        "mc_batch=20",
        "save_minutes=0.0005",
        "device=cpu",
    ]
    target = tmp_path / "run" / "eval-0040-mc1500-s1.json"
    assert fork_server.run(tmp_path, *arguments).returncode == 0
    expected = json.loads(target.read_text())
    target.unlink()

    def ended() -> None:
        assert timeless(json.loads(target.read_text())) == timeless(expected)
        target.unlink()

    disturb(fork_server, tmp_path, arguments, number, ended)
    assert timeless(json.loads(target.read_text())) == timeless(expected)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [trained.name, target.name]
    assert (tmp_path / "out").read_text().count("resuming after") > 4
    assert torch.isfinite(torch.tensor([row["ppl"] for row in expected["mc"]])).all()
