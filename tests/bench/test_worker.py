"""A case in a process of its own; `tests/commands/test_bench.py` measures with such processes."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import settings
from vdrop_cli.bench import worker
from vdrop_cli.bench.cases import Case
from vdrop_cli.bench.worker import Timing, Worker, serve
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.choices import BenchCell, BenchPart, BenchSize, Precision

QUICK = Timing(warm_up=0, before_turn=0, turn=0.001, rates=0.01, rates_between=0.01)
CASE = Case(BenchSize.small, BenchPart.layer, BenchCell.variational, Precision.fp32)


class LostProcess:
    """A process that ends before it answers."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> None:
        self.pipe = args[0]

    def start(self) -> None:
        self.pipe.close()

    def join(self, timeout: float) -> None: ...

    def terminate(self) -> None: ...


def test_a_case_that_cannot_run_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(Pipe=Pipe, Process=LostProcess)
    monkeypatch.setattr(worker, "get_context", lambda method: context)
    with (
        pytest.raises(ConfigError, match="small layer variational fp32"),
        Worker(CASE, settings("device=cpu"), 1, False, QUICK) as process,
    ):
        process.ask()


class Script:
    """A pipe whose other end asks for turns of some numbers of steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.answers = list(steps), list[Any]()

    def recv(self) -> int:
        return self.steps.pop(0)

    def send(self, answer: Any) -> None:
        self.answers.append(answer)


@pytest.mark.parametrize("before_turn", [0.0, 0.02])
def test_a_turn_has_as_many_steps_as_it_is_asked_for_and_untimed_ones_before(
    before_turn: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int]()
    monkeypatch.setattr(worker, "build", lambda case, train, mc_passes: lambda: calls.append(1))
    pipe = Script(3, 5, 0)
    connection: Connection[Any, Any] = pipe  # type: ignore[assignment]
    serve(connection, CASE, replace(settings(), device="cpu"), 1, False, before_turn)
    ready, *turns = pipe.answers
    assert ready is None and len(turns) == 2
    assert all(seconds >= 0 and peak > 50 for seconds, peak in turns)
    assert (len(calls) == 8) == (before_turn == 0)


def test_a_turn_gives_the_time_of_one_step_and_has_as_many_as_fill_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = SimpleNamespace(Pipe=Pipe, Process=LostProcess)
    monkeypatch.setattr(worker, "get_context", lambda method: context)
    monkeypatch.setattr(Worker, "ask", lambda process, steps: (0.02 * steps, 60.0))
    process = Worker(CASE, settings("device=cpu"), 1, False, replace(QUICK, turn=0.4))
    process.warm_up()
    assert (process.steps, process.turn(), process.peak) == (20, pytest.approx(0.02), 60.0)


def test_a_rate_is_of_a_multiplication_and_an_addition_for_each_pair_of_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that shows one second more at every look."""
    monkeypatch.setattr(worker, "product_size", lambda device: 64)
    monkeypatch.setattr(worker.time, "perf_counter", map(float, count()).__next__)
    assert worker.measure_rates(torch.device("cpu"), 9.0).fp32 == 2 * 64**3


def test_a_processor_without_bf16_has_the_rate_of_fp32_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "product_size", lambda device: 64)
    for has_bf16 in (True, False):
        monkeypatch.setattr(worker, "multiplies_bf16", lambda has_bf16=has_bf16: has_bf16)
        rates = worker.measure_rates(torch.device("cpu"), 0.01)
        assert (rates.bf16 == rates.fp32) == (not has_bf16)


@pytest.mark.parametrize(
    ("overrides", "own", "alternative"),
    [([], True, False), (["configure_alternatives=true"], True, True), (["as_imported=true"], False, False)],
)
def test_whose_process_has_the_settings_of_the_commands(
    overrides: list[str], own: bool, alternative: bool
) -> None:
    chosen = settings(*overrides, command="bench")
    assert worker.is_configured(CASE, chosen) == own
    assert worker.is_configured(replace(CASE, cell=BenchCell.torch_lstm), chosen) == alternative


def test_the_two_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^as_imported must be false with configure_alternatives=true"):
        settings("as_imported=true", "configure_alternatives=true", command="bench")
