"""Progress for the person at the terminal: bars, or plain lines if standard error is not a terminal."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Self

from tqdm import tqdm

from vdrop_cli.sinks.records import Epoch, Evaluating, LossMetrics, Record, Result, Step

# if standard error is not a terminal
SECONDS_BEFORE_FIRST_LINE = 20
SECONDS_BETWEEN_LINES = 30
SECONDS_BEFORE_PHASE = 5  # of work that has no bar, before a line says that it runs


class Progress:
    """A bar with the training metrics, words per second and the remaining time; a line per epoch."""

    def __init__(
        self, steps: int, epochs: int, step: int, loss_metrics: LossMetrics, terminal: bool | None = None
    ) -> None:
        self.steps = steps
        self.epochs = epochs
        self.first = step
        self.loss_metrics = loss_metrics
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self.began = time.monotonic()
        self.next_line = self.began + SECONDS_BEFORE_FIRST_LINE
        self.evaluating = ExitStack()

    def __enter__(self) -> Self:
        self.bar = tqdm(
            total=self.steps, initial=self.first, unit="step", disable=not self.terminal, dynamic_ncols=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.evaluating.close()
        self.bar.close()

    def print(self, line: str) -> None:
        """Prints a line, above the bar if one is shown."""
        if self.terminal:
            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def __call__(self, record: Record) -> None:
        if isinstance(record, Step):
            self.show_step(record)
        elif isinstance(record, Epoch):
            took = tqdm.format_interval(record.seconds)
            speed = f"lr {record.lr:.4g}, {record.words_per_second:,.0f} words/s, {took}"
            metrics = format_metrics(record.metrics)
            self.print(f"epoch {record.epoch}/{self.epochs}: {metrics}, {speed}")
        elif isinstance(record, Evaluating):
            self.bar.close()
            self.evaluating.enter_context(phase("evaluating"))
        elif isinstance(record, Result):
            self.evaluating.close()

    def show_step(self, record: Step) -> None:
        """Advances the bar; without a terminal, prints a line now and then."""
        state = f"{format_metrics(self.loss_metrics(record.loss))}, {record.words_per_second:,.0f} words/s"
        self.bar.set_postfix_str(state, refresh=False)
        self.bar.update()
        if record.step == self.steps:
            self.bar.close()  # validation and evaluation are not part of its time
        now = time.monotonic()
        if not self.terminal and now >= self.next_line:
            self.next_line = now + SECONDS_BETWEEN_LINES
            left = (now - self.began) / (record.step - self.first) * (self.steps - record.step)
            place = f"epoch {record.epoch} step {record.step}/{self.steps}"
            self.print(f"{place}: {state}, about {time_in_words(left)} left")


@contextmanager
def phase(name: str) -> Iterator[None]:
    """If the work within takes long, prints a line that says so, and at the end one with its time."""
    began, is_announced = time.monotonic(), threading.Event()

    def announce() -> None:
        is_announced.set()
        with suppress(OSError, ValueError):  # standard error is closed
            print(f"{name} …", file=sys.stderr, flush=True)

    timer = threading.Timer(SECONDS_BEFORE_PHASE, announce)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
    if is_announced.is_set():
        print(f"{name} took {time_in_words(time.monotonic() - began)}", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(total: int, first: int, unit: str) -> Iterator[Callable[[int], object]]:
    """A bar from `first` to `total`, or plain lines; it yields the function that advances it."""
    with tqdm(
        total=total,
        initial=first,
        unit=unit,
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    ) as bar:
        if not bar.disable:
            yield bar.update
            return
        began = time.monotonic()
        next_line = began + SECONDS_BEFORE_FIRST_LINE
        done = first

        def advance(more: int) -> None:
            nonlocal done, next_line
            done += more
            now = time.monotonic()
            if now >= next_line:
                next_line = now + SECONDS_BETWEEN_LINES
                left = time_in_words((now - began) / (done - first) * (total - done))
                print(f"{done:,} of {total:,} {unit}s, about {left} left", file=sys.stderr, flush=True)

        yield advance


def format_metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())


def time_in_words(seconds: float) -> str:
    """A time such as 6 h 15 min, 12 min or 40 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{rest} s"
