"""Log records, and who listens to them: a JSON log, TensorBoard, and the person at the terminal."""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from tqdm import tqdm

from vdrop_cli import files
from vdrop_cli.config import ConfigError


@dataclass(frozen=True)
class Start:
    """How a run, or a part of it after an interruption, began."""

    kind: ClassVar[str] = "start"
    config: dict[str, Any]
    corpus: str
    epoch: int  # epochs already done
    step: int  # and steps, the whole run's
    environment: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One update; `step` counts from 1 over all epochs."""

    kind: ClassVar[str] = "step"
    epoch: int
    step: int
    loss: float  # nats a token, or squared error in squared deviations of the ratings; dropout on
    grad_norm: float  # before clipping, of what is descended
    lr: float
    words_per_second: float


@dataclass(frozen=True)
class Epoch:
    """An epoch and the validation after it."""

    kind: ClassVar[str] = "epoch"
    epoch: int
    step: int
    train_loss: float  # mean over the epoch's steps, dropout on
    metrics: dict[str, float]  # train_loss as a metric, then those of the validation; written down beside the rest
    lr: float
    words_per_second: float
    seconds: float  # training and validation


@dataclass(frozen=True)
class Result:
    """How a run ended well; the metrics are those of `epoch`."""

    kind: ClassVar[str] = "result"
    epoch: int
    epochs: int  # trained
    metrics: dict[str, float]  # dropout off; written down beside the rest
    seconds: float  # all epochs


@dataclass(frozen=True)
class Failure:
    """How a run ended badly."""

    kind: ClassVar[str] = "error"
    error: str
    epoch: int
    step: int


@dataclass(frozen=True)
class Saving:
    """A checkpoint is about to be written: what was told before has to be on disk by then."""

    kind: ClassVar[str] = "saving"


Record = Start | Step | Epoch | Result | Failure | Saving
Measures = Callable[[float], dict[str, float]]


def flattened(record: Record) -> dict[str, Any]:
    """As it is written down."""
    told = asdict(record)
    metrics: dict[str, Any] = told.pop("metrics", {})
    return told | metrics


class Sink(Protocol):
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
    def __call__(self, record: Record) -> None: ...


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that was cut off is left out."""
    whole = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
    records = []
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
            record["kind"]
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{path}: line {number} is not a log record; take the line out, or start over with force=true") from None
        records.append(record)
    return records


def read_result(folder: Path) -> dict[str, Any]:
    """What a finished run came to."""
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text(errors="replace"))
        if {f.name for f in fields(Result)} - {"metrics"} <= result.keys():
            return dict(result)
    except (ValueError, AttributeError):
        pass
    raise ConfigError(f"{path} is damaged; delete it and give the same vdrop train command again to have it made anew")


class JsonLines:
    """`log.jsonl`: every record a line, of the steps one in `every`. After an interruption it goes on after `epochs` and `step`."""

    def __init__(self, folder: Path, every: int, epochs: int, step: int) -> None:
        self.path, self.every = folder / "log.jsonl", every
        done = {"start": ("step", step - 1), "step": ("step", step), "epoch": ("epoch", epochs)}  # what is made again is taken out
        lines = [line for line in read_log(self.path) if line["kind"] in done]
        kept = [line for line in lines if line.get(done[line["kind"]][0], 0) <= done[line["kind"]][1]] if step > 0 else []
        files.replace(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def __enter__(self) -> Self:
        try:
            self.file = self.path.open("a")
        except OSError as error:
            raise files.failed(self.path, error) from None
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # told before, when it was written
            self.file.close()

    def __call__(self, record: Record) -> None:
        if isinstance(record, Step) and record.step % self.every != 0:
            return
        try:
            if isinstance(record, Saving):
                os.fsync(self.file.fileno())
            else:
                self.file.write(json.dumps({"kind": record.kind, **flattened(record)}) + "\n")
                self.file.flush()
        except OSError as error:
            raise files.failed(self.path, error) from None


class TensorBoard:
    """Scalars of one step in `every` and of every epoch, and the settings beside the final metrics, in the run's own folder.

    `measures` gives what a loss is as metrics.
    """

    def __init__(self, folder: Path, config: dict[str, Any], every: int, step: int, measures: Measures) -> None:
        self.folder, self.config, self.every, self.step, self.measures = folder, config, every, step, measures

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter

        self.hook, threading.excepthook = threading.excepthook, self.quiet
        try:
            self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        except OSError as error:
            raise files.failed(self.folder, error) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.writer.close()
        except OSError as failure:
            if kind is None:  # else that error has been told, or a worse one
                raise files.failed(self.folder, failure) from None
        finally:
            threading.excepthook = self.hook

    def quiet(self, failure: threading.ExceptHookArgs) -> None:
        """Its writer is a thread, whose errors with the disk come up again at the next record."""
        if not isinstance(failure.exc_value, OSError):
            self.hook(failure)

    def __call__(self, record: Record) -> None:
        try:
            self.write(record)
        except OSError as error:
            raise files.failed(self.folder, error) from None

    def write(self, record: Record) -> None:
        if isinstance(record, Step) and record.step % self.every != 0:
            return
        if isinstance(record, Step | Epoch):
            values = flattened(record) | (self.measures(record.loss) if isinstance(record, Step) else {})
            for name, value in values.items():
                if name not in ("epoch", "step"):
                    self.writer.add_scalar(f"{record.kind}/{name}", value, record.step)
        if isinstance(record, Saving):
            self.writer.flush()
        if isinstance(record, Result):
            from torch.utils.tensorboard.summary import hparams

            metrics = {f"result/{name}": value for name, value in flattened(record).items() if isinstance(value, float)}
            for summary in hparams(flat(self.config), metrics):  # type: ignore[no-untyped-call]
                self.writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, record.epoch)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"layers": 2}}` as `{"model.layers": 2}`; what is unset is left out."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            out[prefix + key] = value
    return out


def spoken(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())


SECONDS_BETWEEN_LINES = 30  # where there is no terminal


class Progress:
    """A bar with the loss as metrics, words a second and the time left; plain lines where there is no terminal."""

    def __init__(self, steps: int, epochs: int, step: int, measures: Measures, terminal: bool | None = None) -> None:
        self.steps, self.epochs, self.first, self.measures = steps, epochs, step, measures
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self.spoke = self.began = time.monotonic()

    def __enter__(self) -> Self:
        self.bar = tqdm(total=self.steps, initial=self.first, unit="step", disable=not self.terminal, dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def say(self, line: str) -> None:
        """A line above the bar, or by itself."""
        if self.terminal:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def __call__(self, record: Record) -> None:
        if isinstance(record, Step):
            self.bar.update()
            told = f"{spoken(self.measures(record.loss))}, {record.words_per_second:,.0f} words/s"
            self.bar.set_postfix_str(told, refresh=False)
            now = time.monotonic()
            if not self.terminal and now - self.spoke >= SECONDS_BETWEEN_LINES:
                self.spoke = now
                left = (now - self.began) / (record.step - self.first) * (self.steps - record.step)
                self.say(f"epoch {record.epoch} step {record.step}/{self.steps}: {told}, {duration(left)} left")
        elif isinstance(record, Epoch):
            speed = f"lr {record.lr:.4g}, {record.words_per_second:,.0f} words/s, {duration(record.seconds)}"
            self.say(f"epoch {record.epoch}/{self.epochs}: {spoken(record.metrics)}, {speed}")


@contextmanager
def counting(total: int, first: int, unit: str) -> Iterator[Callable[[int], object]]:
    """A bar for something that is only counted, from `first` on, or plain lines; the function it gives is told how much more was done."""
    with tqdm(total=total, initial=first, unit=unit, unit_scale=True, disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
        if not bar.disable:
            yield bar.update
            return
        began = spoke = time.monotonic()
        done = first

        def count(more: int) -> None:
            nonlocal done, spoke
            done += more
            now = time.monotonic()
            if now - spoke >= SECONDS_BETWEEN_LINES:
                spoke = now
                left = duration((now - began) / (done - first) * (total - done))
                print(f"{done:,} of {total:,} {unit}s, {left} left", file=sys.stderr, flush=True)

        yield count


def ppl(loss: float) -> float:
    """Perplexity of a loss in nats a token; infinite rather than an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
