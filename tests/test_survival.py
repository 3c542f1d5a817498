"""Real processes that are killed at any moment, and resume to the results of an undisturbed run."""

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY
from tests.processes import ForkServer, is_alive
from vdrop_cli import checkpoint
from vdrop_cli.sinks import read_log

TRAIN = [*TINY, "model.hidden_size=64", "dropout=variational_untied", "log_every=1"]
AT_ANY_TIME, AFTER_SAVING, WHILE_WRITING = range(3)
EVERY_MOMENT = [AT_ANY_TIME, AFTER_SAVING, WHILE_WRITING]
DISTURBANCES = [  # the signal, the moments at which processes get it, and the amount of work
    (signal.SIGKILL, EVERY_MOMENT, 1),
    (signal.SIGTERM, [AFTER_SAVING], 1),
    pytest.param(signal.SIGKILL, EVERY_MOMENT * 4, 8, marks=pytest.mark.long),
    pytest.param(signal.SIGTERM, EVERY_MOMENT * 4, 8, marks=pytest.mark.long),
]
EPOCHS, SAMPLES = 5, 200  # for an amount of work of 1


def least(moments: list[int]) -> int:
    """How many of the disturbed processes had something to save, at least."""
    return max(1, (len(moments) - 2) // 2)


def saved(folder: Path) -> set[tuple[str, int]]:
    """The files to resume from, with their times."""
    files = set()
    for path in [*folder.rglob("*.pt"), *folder.rglob("*.partial")]:
        with suppress(FileNotFoundError):
            files.add((path.name, path.stat().st_mtime_ns))
    return files


def wait_until_it_writes(folder: Path, pid: int) -> None:
    while is_alive(pid) and not [*folder.rglob("*.pt.*.tmp"), *folder.rglob("*.partial.*.tmp")]:
        pass


def disturb(
    fork_server: ForkServer,
    folder: Path,
    arguments: list[str],
    number: signal.Signals,
    moments: list[int],
    ended: Callable[[], None],
) -> list[int]:
    """Runs a command until it was killed at each of the moments, then to its end; returns the exit codes.

    Where it comes to its end before it is killed, `ended` checks and removes its results, so it restarts.
    """
    source = random.Random(int(number))
    codes = list[int]()
    ends = 0
    while len(codes) < len(moments):
        moment, before = moments[len(codes)], saved(folder)
        process = fork_server.start(folder, *arguments)
        while moment != AT_ANY_TIME and is_alive(process.pid) and saved(folder) == before:
            time.sleep(0.001)
        time.sleep(source.uniform(0, 0.6 if moment == AT_ANY_TIME else 0.06))
        if moment == WHILE_WRITING:
            wait_until_it_writes(folder, process.pid)
        process.send_signal(number)
        if code := process.wait():
            codes.append(code)
        else:
            ended()
            ends += 1
            assert ends < 12, "too quick to be killed"
    assert fork_server.start(folder, *arguments).wait() == 0
    return codes


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """The chain is of the times, too."""
    return {
        name: value
        for name, value in record.items()
        if name not in ("seconds", "words_per_second", "mc_seconds", "chain")
    }


def training_result(folder: Path) -> tuple[Any, ...]:
    """All that a run comes to but how long it took: result, every step and epoch of its log, and the
    weights.
    """
    (result,) = folder.rglob("result.json")
    log = [timeless(record) for record in read_log(result.parent / "log.jsonl") if record["kind"] != "start"]
    last = checkpoint.load(checkpoint.all_in(result.parent)[0])
    weights = {name: tensor.numpy().tobytes() for name, tensor in last.model.items()}
    names = sorted(
        path.name
        for path in result.parent.iterdir()
        if not path.name.startswith(("events", f"checkpoint-{last.epoch - 1:04}"))
    )
    return timeless(json.loads(result.read_text())), log, weights, names


@pytest.fixture(scope="module")
def undisturbed(
    fork_server: ForkServer, text: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """Trains for a number of epochs undisturbed, once each, and returns the folder."""

    @cache
    def train(epochs: int) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        ran = fork_server.run(folder, "train", *TRAIN, *text, f"schedule.epochs={epochs}")
        assert ran.returncode == 0, ran.stderr
        return folder

    return train


@pytest.mark.parametrize(("number", "moments", "work"), DISTURBANCES)
def test_a_training_killed_at_many_moments_comes_to_the_same(
    number: signal.Signals,
    moments: list[int],
    work: int,
    fork_server: ForkServer,
    undisturbed: Callable[[int], Path],
    text: list[str],
    tmp_path: Path,
) -> None:
    expected = training_result(undisturbed(EPOCHS * work))
    command = ["train", *TRAIN, *text, f"schedule.epochs={EPOCHS * work}", "checkpoint.minutes=0.0005"]

    def ended() -> None:
        assert training_result(tmp_path) == expected
        shutil.rmtree(tmp_path / "outputs")

    codes = disturb(fork_server, tmp_path, command, number, moments, ended)
    assert training_result(tmp_path) == expected
    starts = [
        record["step"] for record in read_log(next(tmp_path.rglob("log.jsonl"))) if record["kind"] == "start"
    ]
    assert starts == sorted(starts)
    printed = (tmp_path / "out").read_text()
    assert len(set(re.findall(r"resuming after step (\d+) of epoch \d+", printed))) >= max(
        1, len(moments) // 3
    ), "it resumed at many places"
    if number is signal.SIGTERM:
        assert set(codes) <= {143, -15} and codes.count(143) >= least(moments), (
            "asked to stop before it listens, a process just ends"
        )
        assert "resume with: vdrop train" in printed
    else:
        assert set(codes) == {-9}
    assert "Traceback" not in printed and "is damaged" not in printed


@pytest.mark.parametrize(("number", "moments", "work"), DISTURBANCES)
def test_an_evaluation_killed_at_many_moments_comes_to_the_same(
    number: signal.Signals,
    moments: list[int],
    work: int,
    fork_server: ForkServer,
    undisturbed: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    (trained,) = undisturbed(EPOCHS).rglob(f"checkpoint-{EPOCHS:04}.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / trained.name).write_bytes(trained.read_bytes())
    arguments = [
        "eval",
        f"checkpoint=run/{trained.name}",
        "stored_data=true",
        f"mc_samples={SAMPLES * work}",
        "mc_batch=20",
        "save_minutes=0.0005",
        "device=cpu",
    ]
    target = tmp_path / "run" / f"eval-{EPOCHS:04}-mc{SAMPLES * work}-s1.json"
    assert fork_server.run(tmp_path, *arguments).returncode == 0
    expected = json.loads(target.read_text())
    target.unlink()

    def ended() -> None:
        assert timeless(json.loads(target.read_text())) == timeless(expected)
        target.unlink()

    disturb(fork_server, tmp_path, arguments, number, moments, ended)
    assert timeless(json.loads(target.read_text())) == timeless(expected)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [trained.name, target.name]
    assert (tmp_path / "out").read_text().count("resuming after") >= least(moments)
    assert torch.isfinite(torch.tensor([row["ppl"] for row in expected["mc"]])).all()
