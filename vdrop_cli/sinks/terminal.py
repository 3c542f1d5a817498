"""Progress for the person at the terminal: bars, or plain lines if standard error is not a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from tqdm import tqdm

from vdrop_cli.sinks.records import Epoch, LossMetrics, Record, Step

SECONDS_BETWEEN_LINES = 30  # if standard error is not a terminal


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
        self.last_line = self.began = time.monotonic()

    def __enter__(self) -> Self:
        self.bar = tqdm(
            total=self.steps, initial=self.first, unit="step", disable=not self.terminal, dynamic_ncols=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def print(self, line: str) -> None:
        """Prints a line, above the bar if one is shown."""
        if self.terminal:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def __call__(self, record: Record) -> None:
        if isinstance(record, Step):
            self.bar.update()
            state = (
                f"{format_metrics(self.loss_metrics(record.loss))}, {record.words_per_second:,.0f} words/s"
            )
            self.bar.set_postfix_str(state, refresh=False)
            now = time.monotonic()
            if not self.terminal and now - self.last_line >= SECONDS_BETWEEN_LINES:
                self.last_line = now
                left = (now - self.began) / (record.step - self.first) * (self.steps - record.step)
                self.print(
                    f"epoch {record.epoch} step {record.step}/{self.steps}: {state}, {duration(left)} left"
                )
        elif isinstance(record, Epoch):
            speed = f"lr {record.lr:.4g}, {record.words_per_second:,.0f} words/s, {duration(record.seconds)}"
            metrics = format_metrics(record.metrics)
            self.print(f"epoch {record.epoch}/{self.epochs}: {metrics}, {speed}")


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
        began = last_line = time.monotonic()
        done = first

        def advance(more: int) -> None:
            nonlocal done, last_line
            done += more
            now = time.monotonic()
            if now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                left = duration((now - began) / (done - first) * (total - done))
                print(f"{done:,} of {total:,} {unit}s, {left} left", file=sys.stderr, flush=True)

        yield advance


def format_metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())


def duration(seconds: float) -> str:
    """Minutes and seconds as `1:05`, with hours as `2:01:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
