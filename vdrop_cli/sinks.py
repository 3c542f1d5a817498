"""Log records, and who listens to them: a JSON log, TensorBoard, and the person at the terminal."""

import hashlib
import json
import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from io import BytesIO
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar, Protocol, Self, get_origin

from tqdm import tqdm

from vdrop_cli import files, stored
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.files import Damaged


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
    metrics: dict[
        str, float
    ]  # train_loss as a metric, then those of the validation; written down beside the rest
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
    warnings: list[str] = field(default_factory=list)  # of the task; not written down where there are none


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
    if isinstance(record, Result) and not record.warnings:
        del told["warnings"]
    return told | metrics


class Sink(Protocol):
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def __call__(self, record: Record) -> None: ...


FIELDS: dict[str, dict[str, Any]] = {  # of a record as it is written down, but for its metrics and warnings
    kind.kind: {
        f.name: get_origin(f.type) or f.type for f in fields(kind) if f.name not in ("metrics", "warnings")
    }
    for kind in (Start, Step, Epoch, Result, Failure)
}
LINE_LIMIT = 2**20  # bytes of a record; the largest, a start, has some kilobytes


def parse_record(line: bytes) -> dict[str, Any]:
    """A line of a log. Raises Damaged where it is not a record."""
    record = stored.parse_json(line, infinite=True)
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise Damaged("it has no kind")
    older = {"step"} - record.keys() if kind == "start" else set()  # starts had no step once
    stored.require(record, {name: of for name, of in FIELDS[kind].items() if name not in older})
    if kind in ("epoch", "result"):
        require_texts(record.get("warnings", []))
        for name in record.keys() - FIELDS[kind].keys() - {"kind", "chain", "warnings"}:
            if record[name] not in (None, math.inf) and not stored.is_finite(record[name]):
                raise Damaged(f"{name} must be a number")
    return record


def require_texts(warnings: object) -> None:
    """Raises Damaged."""
    if not (isinstance(warnings, list) and all(isinstance(warning, str) for warning in warnings)):
        raise Damaged("its warnings must be a list of texts")


def chain(record: dict[str, Any], before: str) -> str:
    """Sixteen hex digits of an epoch's record and of all before it, so that none can be changed unnoticed;
    `before` are the last one's.
    """
    content = json.dumps({name: value for name, value in record.items() if name != "chain"}, sort_keys=True)
    return hashlib.sha256(f"{before}{content}".encode()).hexdigest()[:16]


class Order:
    """Checks that records follow each other as a run writes them: epochs and steps in order, none missing,
    none changed.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None  # the last one; None before the first record
        self.chain = ""  # of the last epoch
        self.step = 0  # the last one
        self.every: int | None = None  # steps between two records, where it is known
        self.is_second = False  # whether a step was seen from which `every` can be told by the next one

    def __call__(self, record: dict[str, Any]) -> None:
        """Raises Damaged."""
        getattr(self, f"on_{record['kind']}", lambda record: None)(record)

    def on_start(self, record: dict[str, Any]) -> None:
        step = record.get("step", self.step)
        if self.epoch is None:
            self.step = step
        elif record["epoch"] != self.epoch:
            raise Damaged(f"it resumes after epoch {record['epoch']}, but follows epoch {self.epoch}")
        self.reach(step)
        self.epoch, self.step, self.is_second = record["epoch"], step, False
        every = record["config"].get("log_every")
        self.every = every if isinstance(every, int) and every >= 1 else None

    def on_step(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if self.every is None and self.is_second:
            self.every = max(1, step - self.step)
        if self.every is not None and step != (self.step // self.every + 1) * self.every:
            raise Damaged(f"step {step} follows step {self.step}")
        if step <= self.step:
            raise Damaged(f"step {step} follows step {self.step}")
        self.step, self.is_second = step, True

    def on_epoch(self, record: dict[str, Any]) -> None:
        epoch = record["epoch"]
        if epoch != (self.epoch or 0) + 1:
            raise Damaged(f"epoch {epoch} follows epoch {self.epoch or 0}")
        self.reach(record["step"])
        written = record.get("chain")
        if written != chain(record, self.chain) and (written is not None or self.chain):
            raise Damaged(f"epoch {epoch}, or one before it, is not as it was written")
        self.epoch, self.chain = epoch, written or ""

    def reach(self, step: int) -> None:
        """All steps up to this one are there."""
        if step < self.step:
            raise Damaged(f"step {step} follows step {self.step}")
        if self.every is not None and step // self.every > self.step // self.every:
            raise Damaged(f"steps after step {self.step} are missing")


ADVICE = (  # for a log that is damaged; the checkpoints and the result are not
    "put it back as it was; or move it away, delete result.json, and give the same vdrop train command "
    "again, which begins a new log"
)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log, none where it is not there; a last line that was cut off is left out. Raises
    ConfigError.
    """
    try:
        with files.open_regular(path) as file:
            return list(records_of(file))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise files.unreadable(path, error) from None
    except Damaged as damage:
        raise ConfigError(f"{path} is damaged ({damage}); {ADVICE}") from None


def records_of(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The records of a log that is open. Raises Damaged."""
    order = Order()
    for number, line in enumerate(whole_lines(file), 1):
        try:
            record = parse_record(line)
        except Damaged as damage:
            raise Damaged(f"line {number} is not a log record: {damage}") from None
        order(record)
        if record["kind"] == "epoch" and "train_ppl" in record:  # as versions until November 2026 named it
            record["train_ppl_dropout"] = record.pop("train_ppl")
        yield record


def whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines from where the file stands on; one that was cut off is left out. Raises Damaged where one is
    too long.
    """
    while (line := file.readline(LINE_LIMIT)).endswith(b"\n"):
        yield line
    if len(line) == LINE_LIMIT:
        raise Damaged(f"it has a line of more than {LINE_LIMIT:,} bytes")


def lines_from_end(file: IO[bytes], block: int = 2**16) -> Iterator[tuple[int, bytes]]:
    """The lines with the places where they begin, the last one first; it reads no more than is asked for."""
    place, rest = file.seek(0, os.SEEK_END), b""
    while place > 0:
        size = min(block, place)
        place -= size
        file.seek(place)
        rest = file.read(size) + rest
        if len(rest) > LINE_LIMIT + block:
            raise Damaged(f"it has a line of more than {LINE_LIMIT:,} bytes")
        first = 0 if place == 0 else rest.find(b"\n") + 1  # what is before it may be the end of a line
        if place > 0 and first == 0:
            continue
        end = len(rest)
        while end > first:
            begin = max(rest.rfind(b"\n", first, end - 1) + 1, first)
            yield place + begin, rest[begin:end]
            end = begin
        rest = rest[:first]


def read_result(folder: Path) -> dict[str, Any]:
    """What a finished run came to. Raises ConfigError."""
    path = folder / "result.json"
    try:
        result = stored.read_json(path)
        require_texts(result.get("warnings", []))
        stored.require(result, dict.fromkeys(result.keys() - {"warnings"}, float) | FIELDS["result"])
        if not 1 <= result["epoch"] <= result["epochs"]:
            raise Damaged(f"epoch {result['epoch']} of {result['epochs']}")
    except OSError as error:
        raise files.unreadable(path, error) from None
    except Damaged as damage:
        again = "delete it and give the same vdrop train command again to have it made anew"
        raise ConfigError(f"{path} is damaged ({damage}); {again}") from None
    return result


EPOCH_MARK = b'{"kind": "epoch"'


def end_of(file: IO[bytes], epochs: int, step: int) -> tuple[int, str]:
    """The place in a log up to which it belongs to a run that resumes after `epochs` and `step`, and the
    chain there.

    It reads the lines since the epoch before the last one. Raises Damaged where the log is not what the run
    has written until then.
    """
    order, place, last = Order(), 0, None
    for begin, line in lines_from_end(file):
        if line.startswith(EPOCH_MARK) and line.endswith(b"\n"):
            record = parse_record(line)
            if last is not None:
                order.epoch, order.step, order.chain, place = (
                    record["epoch"],
                    record["step"],
                    record.get("chain", ""),
                    begin + len(line),
                )
                break
            if record["epoch"] <= epochs:
                last = record["epoch"]
    file.seek(place)
    end, is_first = place, place == 0
    for line in whole_lines(file):
        record = parse_record(line)
        if is_first and record["kind"] != "start":
            raise Damaged("its beginning is missing")
        is_first = False
        limit = {"start": step - 1, "step": step, "epoch": epochs}.get(record["kind"], -1)
        if record.get("epoch" if record["kind"] == "epoch" else "step", 0) > limit:
            break
        order(record)
        end += len(line)
    if order.epoch != epochs:
        raise Damaged(
            "it is empty"
            if order.epoch is None
            else f"its last epoch is {order.epoch}, that of the checkpoint is {epochs}"
        )
    order.reach(step)
    return end, order.chain


def log_until(path: Path, epochs: int, step: int) -> bytes | None:
    """A log up to the place where a run resumes after `epochs` and `step`; None where it is not there.

    Raises Damaged where it is not what the run has written until then; ConfigError where it cannot be read
    now.
    """
    try:
        with files.open_regular(path) as file:
            end, _ = end_of(file, epochs, step)
            file.seek(0)
            content = file.read(end)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise files.unreadable(path, error) from None
    for _ in records_of(BytesIO(content)):
        pass
    return content


class JsonLines:
    """`log.jsonl`: every record a line, of the steps one in `every`. A run that resumes after `epochs` and
    `step` appends to it.
    """

    def __init__(self, folder: Path, every: int, epochs: int, step: int) -> None:
        self.path, self.every, self.chain = folder / "log.jsonl", every, ""
        if step > 0:
            self.resume(epochs, step)
        else:
            files.replace(self.path, b"")

    def resume(self, epochs: int, step: int) -> None:
        """Takes out what is made again: the records after the checkpoint. Raises ConfigError where the log is
        damaged.
        """
        try:
            with files.open_regular(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_APPEND, "ab+") as file:
                end, self.chain = end_of(file, epochs, step)
                file.truncate(end)
        except FileNotFoundError:
            print(
                f"vdrop: {self.path} is missing; a new log begins after epoch {epochs}, step {step}",
                file=sys.stderr,
            )
            files.replace(self.path, b"")
        except OSError as error:
            raise files.failed(self.path, error) from None
        except Damaged as damage:
            raise ConfigError(
                f"{self.path} is not the log of this run up to its checkpoint ({damage}); put it back as it "
                "was, or move it away: "
                "the run then resumes with a new log"
            ) from None

    def __enter__(self) -> Self:
        self.open()
        return self

    def open(self) -> None:
        try:
            self.file = files.open_regular(
                self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_APPEND, "ab+"
            )
        except OSError as error:
            raise files.failed(self.path, error) from None
        except Damaged as damage:
            raise RunError(f"{self.path} cannot be written ({damage}); move it away") from None
        self.size = self.file.seek(0, os.SEEK_END)

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # told before, when it was written
            self.file.close()

    def __call__(self, record: Record) -> None:
        if isinstance(record, Step) and record.step % self.every != 0:
            return
        try:
            if isinstance(record, Saving | Result):
                self.put_back()
            if isinstance(record, Saving):
                os.fsync(self.file.fileno())
            else:
                line = json.dumps(self.as_written(record)).encode() + b"\n"
                self.file.write(line)
                self.file.flush()
                self.size += len(line)
        except OSError as error:
            raise files.failed(self.path, error) from None

    def as_written(self, record: Record) -> dict[str, Any]:
        """A metric that is infinite is null, as JSON has no such number; an epoch has a chain."""
        metrics = record.metrics if isinstance(record, Epoch | Result) else {}
        written = {"kind": record.kind, **flattened(record)}
        written |= {name: None for name, value in metrics.items() if not math.isfinite(value)}
        if isinstance(record, Epoch):
            self.chain = written["chain"] = chain(written, self.chain)
        return written

    def put_back(self) -> None:
        """A log that somebody removed or replaced while the run wrote to it is there again, whole: its file
        is still open.
        """
        size = os.fstat(self.file.fileno()).st_size
        if self.is_in_place():
            if size != self.size:
                print(
                    f"vdrop: {self.path} was changed while the run wrote to it; what was taken out is lost",
                    file=sys.stderr,
                )
                self.size = size
            return
        what = "removed"
        if os.path.lexists(self.path):
            names = (self.path.with_name(f"{self.path.name}.replaced-{number}") for number in count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            self.path.rename(aside)
            what = f"replaced (by what is now {aside.name})"
        content = mmap.mmap(self.file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        files.replace(self.path, memoryview(content))
        print(f"vdrop: {self.path} was {what} while the run wrote to it; it is put back", file=sys.stderr)
        self.file.close()
        self.open()

    def is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False


class TensorBoard:
    """Scalars of one step in `every` and of every epoch, and the settings beside the final metrics, in the
    run's own folder.

    `measures` gives what a loss is as metrics.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], every: int, step: int, measures: Measures
    ) -> None:
        self.folder, self.config, self.every, self.step, self.measures = folder, config, every, step, measures

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter

        self.hook, threading.excepthook = threading.excepthook, self.quiet
        try:
            self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        except OSError as error:
            raise files.failed(self.folder, error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

            metrics = {
                f"result/{name}": value
                for name, value in flattened(record).items()
                if isinstance(value, float)
            }
            for summary in hparams(flat(self.config), metrics):  # type: ignore[no-untyped-call]
                self.writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, record.epoch)


def events_until(content: bytes, step: int) -> bytes:
    """Of TensorBoard's events those of steps and epochs up to this step, without the result and the settings
    beside it.

    A record is the event's length in 8 bytes, a checksum in 4, the event, and a checksum in 4. All from a
    damaged one on is left out.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    records, begin = list[bytes](), 0
    while (end := begin + 16 + int.from_bytes(content[begin : begin + 8], "little")) <= len(content):
        try:
            event = Event.FromString(content[begin + 12 : end - 4])
        except DecodeError:
            break
        if event.step <= step and all(
            value.tag.startswith((f"{Step.kind}/", f"{Epoch.kind}/")) for value in event.summary.value
        ):
            records.append(content[begin:end])
        begin = end
    return b"".join(records)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"layers": 2}}` as `{"model.layers": 2}`, lists as text; unset settings are left out."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            out |= {prefix + key: ", ".join(map(str, value))} if value else {}
        elif value is not None:
            out[prefix + key] = value
    return out


def spoken(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())


SECONDS_BETWEEN_LINES = 30  # where there is no terminal


class Progress:
    """A bar with the loss as metrics, words a second and the time left; plain lines where there is no
    terminal.
    """

    def __init__(
        self, steps: int, epochs: int, step: int, measures: Measures, terminal: bool | None = None
    ) -> None:
        self.steps, self.epochs, self.first, self.measures = steps, epochs, step, measures
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self.spoke = self.began = time.monotonic()

    def __enter__(self) -> Self:
        self.bar = tqdm(
            total=self.steps, initial=self.first, unit="step", disable=not self.terminal, dynamic_ncols=True
        )
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
                self.say(
                    f"epoch {record.epoch} step {record.step}/{self.steps}: {told}, {duration(left)} left"
                )
        elif isinstance(record, Epoch):
            speed = f"lr {record.lr:.4g}, {record.words_per_second:,.0f} words/s, {duration(record.seconds)}"
            self.say(f"epoch {record.epoch}/{self.epochs}: {spoken(record.metrics)}, {speed}")


@contextmanager
def counting(total: int, first: int, unit: str) -> Iterator[Callable[[int], object]]:
    """A bar for something that is only counted, from `first` on, or plain lines; the function it gives is
    told how much more was done.
    """
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
