"""Masks drawn ahead: the same numbers, a batch ahead for each thread; threads that end whatever happens."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, TINY_SENTIMENT, settings
from vdrop_cli import checkpoint, interruption, prefetch, tasks, training
from vdrop_cli.dropout import ModelMasks
from vdrop_cli.interruption import Interrupted
from vdrop_cli.kernels import Masks
from vdrop_cli.policies import Dropout, Policy
from vdrop_cli.sinks import Start, Step

CPU = torch.device("cpu")


def numbered(number: int) -> ModelMasks:
    return ModelMasks([Masks(x=torch.full((1, 1, 1, 1), float(number)))])


def drawing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("masks")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    until = time.monotonic() + 10
    while drawing_threads() and time.monotonic() < until:
        time.sleep(0.01)
    assert not drawing_threads()


def test_it_is_worthwhile_on_a_gpu_where_masks_are_many() -> None:
    """New at every step, or on weights."""
    dropouts = {policy: settings(f"dropout={policy}").dropout.to_policy() for policy in Policy}
    ahead = {
        policy
        for policy, dropout in dropouts.items()
        if prefetch.is_worthwhile(dropout, torch.device("cuda:1"))
    }
    assert ahead == {Policy.zaremba, Policy.naive}
    assert prefetch.is_worthwhile(Dropout("variational", p_weight=0.5), torch.device("cuda"))
    assert not any(prefetch.is_worthwhile(dropout, CPU) for dropout in dropouts.values()), (
        "the thread would take a core"
    )


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("batches", [0, 1, 2, 5])
def test_every_batch_comes_once_with_its_own_masks(batches: int, ahead: int) -> None:
    def draw(number: int) -> ModelMasks:
        time.sleep(0.01 * (number % 2 == 0))  # later ones are ready first
        return numbered(number)

    pairs = list(prefetch.draw_ahead(range(batches), draw, CPU, ahead))
    assert [(batch, float(masks.layers[0].x)) for batch, masks in pairs] == [
        (n, float(n)) for n in range(batches)
    ]


def test_two_threads_draw_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=10)

    def draw(number: int) -> ModelMasks:
        both.wait()
        return numbered(number)

    assert len(list(prefetch.draw_ahead(range(4), draw, CPU, 2))) == 4


def test_threads_leave_a_core_to_the_one_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (2, 1), (4, 3), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        assert prefetch.threads() == expected


def test_the_next_batch_is_drawn_by_another_thread_and_no_further_one() -> None:
    """That of batch 1 while batch 0 is worked on; batch 2 waits."""
    drawn, threads = {number: threading.Event() for number in range(4)}, set()

    def draw(number: int) -> ModelMasks:
        threads.add(threading.current_thread())
        drawn[number].set()
        return numbered(number)

    pairs = prefetch.draw_ahead(range(4), draw, CPU, 1)
    assert next(pairs)[0] == 0
    assert drawn[1].wait(10) and not drawn[2].is_set()
    assert next(pairs)[0] == 1 and drawn[2].wait(10) and not drawn[3].is_set()
    assert len(threads) == 1 and threading.current_thread() not in threads
    pairs.close()
    assert not drawn[3].is_set()


@pytest.mark.parametrize(("device", "expected"), [("cuda", 1), ("cuda:0", 0)])
def test_threads_draw_for_the_device_of_the_one_that_asks(
    device: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch has it, the current device is a thread's own, the first in a new one, and is set by index
    alone.
    """
    current, chosen = threading.local(), set()

    def set_device(device: torch.device) -> None:
        if device.index is None:
            raise ValueError(
                f"Expected a torch.device with a specified index or an integer, but got:{device}"
            )
        current.index = device.index

    def draw(number: int) -> ModelMasks:
        chosen.add(getattr(current, "index", 0))
        return numbered(number)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    current.index = 1
    assert len(list(prefetch.draw_ahead(range(3), draw, torch.device(device), 2))) == 3
    assert chosen == {expected}


def test_what_drawing_raises_comes_with_its_batch() -> None:
    def draw(number: int) -> ModelMasks:
        if number == 1:
            raise MemoryError("no room for the masks of batch 1")
        return numbered(number)

    pairs = prefetch.draw_ahead(range(3), draw, CPU, 2)
    assert next(pairs)[0] == 0
    with pytest.raises(MemoryError, match="batch 1"):
        next(pairs)
    assert list(pairs) == []


def test_what_the_batches_raise_is_passed_on() -> None:
    def batches() -> Iterator[int]:
        yield 0
        raise OSError("the text is gone")

    with pytest.raises(OSError, match="the text is gone"):
        list(prefetch.draw_ahead(batches(), numbered, CPU, 2))


def start(*overrides: str) -> training.Run:
    config = settings(*overrides)
    task = tasks.load(config, CPU)
    folder = checkpoint.run_folder(config, task.fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    return training.Run(config, task, folder)


def timeless_records(run: training.Run) -> Iterator[dict[str, Any]]:
    for record in training.records(run):
        if not isinstance(record, Start):
            yield {
                name: value
                for name, value in vars(record).items()
                if name not in ("seconds", "words_per_second")
            }


@pytest.mark.parametrize(("task", "policy"), [("language_model", "naive_word"), ("sentiment", "zaremba")])
def test_training_gives_the_same_numbers_bit_for_bit_and_resumes(
    task: str, policy: str, text: list[str], rated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the thread; with it; and with it, stopped in the middle of an epoch and resumed."""
    monkeypatch.chdir(tmp_path)
    task_overrides = [*TINY, *text] if task == "language_model" else [*TINY_SENTIMENT, *rated]
    overrides = [*task_overrides, f"dropout={policy}", "schedule.epochs=2"]
    alone = list(timeless_records(start(*overrides)))
    monkeypatch.setattr(prefetch, "is_worthwhile", lambda dropout, device: True)
    assert list(timeless_records(start(*overrides, "outputs=ahead"))) == alone
    parts, stop = [], 3 * sum("loss" in record for record in alone) // 4
    with pytest.raises(Interrupted):
        for record in training.records(start(*overrides, "outputs=stopped")):
            if isinstance(record, Step):
                parts.append(record.loss)
                if record.step == stop:
                    monkeypatch.setattr(interruption, "received", [signal.SIGTERM])
    monkeypatch.setattr(interruption, "received", [])
    parts += [
        record["loss"]
        for record in timeless_records(start(*overrides, "outputs=stopped"))
        if "loss" in record
    ]
    assert parts == [record["loss"] for record in alone if "loss" in record]


def test_a_training_that_fails_leaves_no_thread(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prefetch, "is_worthwhile", lambda dropout, device: True)
    with pytest.raises(training.Diverged):
        list(training.records(start(*TINY, *text, "dropout=naive", "schedule.lr=1e30", "schedule.clip=null")))
