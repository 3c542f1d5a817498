"""How `vdrop bench` measures: each case has a process of its own, with its own allocator and peak of memory.

The processes take turns: one works while the others wait. So if the speed of the machine changes, it changes
for all of them. Each case is started several times.
"""

import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import median
from types import TracebackType
from typing import Any, Self

import torch

from vdrop_cli.bench.cases import ALTERNATIVES, Case, train_settings
from vdrop_cli.bench.report import Measurement, Rates, measurement, product_size
from vdrop_cli.bench.steps import build
from vdrop_cli.device import configure_process, peak_megabytes, synchronize
from vdrop_cli.errors import ConfigError
from vdrop_cli.kernels.products import multiplies_bf16
from vdrop_cli.settings.commands import Bench
from vdrop_cli.settings.train import Train


@dataclass(frozen=True)
class Timing:
    """How long each phase takes, in seconds."""

    warm_up: float = 2.0  # until memory and code are ready
    before_turn: float = 0.4  # untimed steps, until clock and caches are as in a training
    turn: float = 0.4
    rates: float = 2.0  # of products of each precision at the start
    rates_between: float = 0.5  # and after each start
    end: float = 2.0  # of a process, at most, where the bench ends early

    WARM_UP_TURNS = 3  # at least


TIMING = Timing()


def serve(
    pipe: Connection, case: Case, train: Train, mc_passes: int, configured: bool, before_turn: float
) -> None:
    """The main function of a case's process.

    It sends a message when the step is ready. Then it receives numbers of steps. For each number it runs so
    many steps, and sends the seconds that they took and the peak of memory. The number 0 ends it.
    """
    device = torch.device(train.device)
    torch.manual_seed(1)
    if configured:
        configure_process(device)
    step = build(case, train, mc_passes)
    pipe.send(None)
    while (steps := pipe.recv()) > 0:
        start = time.perf_counter()
        while time.perf_counter() - start < before_turn:
            step()
            synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        pipe.send((time.perf_counter() - start, peak_megabytes(device)))


class Worker:
    """A case in its own process.

    With `configured` the process has this project's allocator settings and library of fp32 products.
    """

    def __init__(self, case: Case, train: Train, mc_passes: int, configured: bool, timing: Timing) -> None:
        self.case = case
        self.timing = timing
        self.steps = 1
        self.peak = 0.0
        context = get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        arguments = (child_pipe, case, train, mc_passes, configured, timing.before_turn)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        child_pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.pipe.send(0)
            self.process.join()
        else:
            with suppress(OSError):  # it has ended
                self.pipe.send(0)
            self.process.join(self.timing.end)  # so that it can remove its files
            self.process.terminate()

    def ask(self, steps: int | None = None) -> Any:
        """The answer to a turn of so many steps; without a number, the message that the step is ready."""
        try:
            if steps is not None:
                self.pipe.send(steps)
            return self.pipe.recv()
        except (EOFError, BrokenPipeError):
            raise ConfigError(
                f"{self.case} could not run, see above; leave it out of sizes, parts, precisions or cells"
            ) from None

    def turn(self) -> float:
        """Seconds per step."""
        seconds, self.peak = self.ask(self.steps)
        return float(seconds / self.steps)

    def warm_up(self) -> None:
        """Takes turns until memory and code are ready, and chooses the number of steps in a turn."""
        start, seconds = time.perf_counter(), [self.turn() for _ in range(self.timing.WARM_UP_TURNS)]
        while time.perf_counter() - start < self.timing.warm_up:
            seconds.append(self.turn())
        self.steps = max(1, round(self.timing.turn / min(seconds)))


def measure_rates(device: torch.device, seconds: float) -> Rates:
    """The best rates of many products of each precision, with the library that the cells use. Where the CPU
    does not multiply bf16, that of bf16 is that of fp32.
    """
    size = product_size(device)

    def best(dtype: torch.dtype) -> float:
        a, b = (torch.rand(size, size).to(device, dtype) for _ in range(2))
        fastest, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            synchronize(device)
            start = time.perf_counter()
            a @ b
            synchronize(device)
            fastest = min(fastest, time.perf_counter() - start)
        return 2 * size**3 / fastest

    fp32 = best(torch.float32)
    has_bf16 = device.type != "cpu" or multiplies_bf16()
    return Rates(fp32, best(torch.bfloat16) if has_bf16 else fp32)


def is_configured(case: Case, settings: Bench) -> bool:
    """Whether the process of a case has this project's allocator settings and library of fp32 products."""
    is_own = case.cell not in ALTERNATIVES
    return settings.configure_alternatives or (is_own and not settings.as_imported)


def measure(group: list[Case], settings: Bench, rates: Rates) -> tuple[list[Measurement], Rates]:
    """Measures a group of cases in turns; the best rates so far are measured in between, too."""
    seconds: dict[Case, list[float]] = {case: [] for case in group}
    peaks = dict.fromkeys(group, 0.0)
    device = torch.device(settings.device)
    timing = TIMING
    for _ in range(settings.starts):
        with ExitStack() as stack:
            workers = []
            for case in group:
                train = train_settings(case, settings)
                worker = Worker(case, train, settings.mc_passes, is_configured(case, settings), timing)
                workers.append(stack.enter_context(worker))
            for worker in workers:
                worker.ask()  # all are ready before the first is timed
            for worker in workers:
                worker.warm_up()
            for _ in range(settings.turns):
                for worker in workers:
                    seconds[worker.case].append(worker.turn())
            rates = rates.or_faster(measure_rates(device, timing.rates_between))
        peaks |= {worker.case: max(worker.peak, peaks[worker.case]) for worker in workers}
    for case in group:
        print(f"{case}: {median(seconds[case]) * 1e3:.1f} ms", file=sys.stderr, flush=True)
    return [measurement(case, settings, seconds[case], peaks[case]) for case in group], rates
