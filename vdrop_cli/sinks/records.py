"""Records of a training run, and the interface of the sinks that receive them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self


@dataclass(frozen=True)
class Start:
    """A run starts, or resumes after an interruption."""

    kind: ClassVar[str] = "start"
    config: dict[str, Any]
    corpus: str  # fingerprint
    epoch: int  # finished epochs
    step: int  # finished steps, over all epochs
    environment: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One update; `step` counts from 1 over all epochs."""

    kind: ClassVar[str] = "step"
    epoch: int
    step: int
    loss: float  # nats per token, or squared error of standardised ratings; dropout on
    grad_norm: float  # of what is minimised, penalties included, before clipping
    lr: float
    words_per_second: float


@dataclass(frozen=True)
class Epoch:
    """An epoch and the validation after it."""

    kind: ClassVar[str] = "epoch"
    epoch: int
    step: int
    train_loss: float  # mean over the epoch's steps, dropout on
    metrics: dict[str, float]  # train_loss as a metric, then the validation metrics; written as fields
    lr: float
    words_per_second: float
    seconds: float  # training and validation


@dataclass(frozen=True)
class Result:
    """The end of a finished run; the metrics belong to `epoch`."""

    kind: ClassVar[str] = "result"
    epoch: int
    epochs: int  # trained
    metrics: dict[str, float]  # dropout off; written as fields
    seconds: float  # all epochs
    # not written where they are empty or None
    warnings: list[str] = field(default_factory=list)  # about the text
    stopped_after_steps: int | None = None  # where schedule.max_steps ended the training


@dataclass(frozen=True)
class Failure:
    """The end of a failed run."""

    kind: ClassVar[str] = "error"
    error: str
    epoch: int
    step: int


@dataclass(frozen=True)
class Saving:
    """A checkpoint is about to be written: all earlier records must reach the disk first."""

    kind: ClassVar[str] = "saving"


@dataclass(frozen=True)
class Evaluating:
    """Training has ended; the model that is reported is about to be evaluated."""

    kind: ClassVar[str] = "evaluating"


OPTIONAL = ("warnings", "stopped_after_steps")  # fields of a result
Record = Start | Step | Epoch | Result | Failure | Saving | Evaluating
LossMetrics = Callable[[float], dict[str, float]]  # a training loss as metrics


class Sink(Protocol):
    """A receiver of records. It is entered before the first record and left after the last."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def __call__(self, record: Record) -> None: ...


def to_dict(record: Record) -> dict[str, Any]:
    """The fields of a record, its metrics among them, as they are written."""
    values = asdict(record)
    metrics: dict[str, Any] = values.pop("metrics", {})
    if isinstance(record, Result):
        values = {name: value for name, value in values.items() if name not in OPTIONAL or value}
    return values | metrics


TAGS = {"step": "step/", "epoch": "per_epoch/", "result": "result/"}  # by kind of record


def tagged_scalars(record: Step | Epoch | Result, loss_metrics: LossMetrics) -> dict[str, float]:
    """The numbers of a record by the names that loggers show: `step/loss`, `per_epoch/valid_ppl_batched`."""
    values = to_dict(record) | (loss_metrics(record.loss) if isinstance(record, Step) else {})
    return {f"{TAGS[record.kind]}{name}": value for name, value in values.items() if isinstance(value, float)}


def position_of(record: Step | Epoch | Result) -> int:
    """The step, or the epoch that an epoch or result belongs to."""
    return record.step if isinstance(record, Step) else record.epoch
