"""Tasks by name: what a batch, a loss and a metric are. Training and its commands know of a task what `Task`
says.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch

from vdrop_cli import corpora
from vdrop_cli.corpora.rated import MIN_TEXTS, Rated
from vdrop_cli.dropout import ModelMasks
from vdrop_cli.layers import State
from vdrop_cli.learned import Learned
from vdrop_cli.measured import Measured
from vdrop_cli.policies import Dropout
from vdrop_cli.random_streams import Stream
from vdrop_cli.settings.data import PennTreebank, RatedData, TextData
from vdrop_cli.settings.task import LanguageModelTask, SentimentTask
from vdrop_cli.settings.train import Model, Train
from vdrop_cli.tasks.language_model import LanguageModelling
from vdrop_cli.tasks.objective import Objective
from vdrop_cli.tasks.predictors import Predictor, RatingPredictor, UnknownWord, WordPredictor, predictor_of
from vdrop_cli.tasks.sentiment import Sentiment

__all__ = [
    "LanguageModelling",
    "Predictor",
    "RatingPredictor",
    "Sentiment",
    "Task",
    "UnknownWord",
    "WordPredictor",
    "load",
    "predictor_of",
    "warn",
]

Batch = Any  # a task's own; its field `number` counts the batches of an epoch from 0
TaskModel = Any  # likewise, a `torch.nn.Module` with `layers`


class Passes(Protocol):
    """MC dropout that can be stopped, and resumes from what `state_dict` returns."""

    samples: int

    @property
    def words(self) -> int:
        """Read so far, over all passes."""

    @property
    def total(self) -> int:
        """To be read."""

    def run(self) -> Iterator[int]:
        """Reads to the end; yields how many more words it has read."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Raises ValueError, and changes nothing, where it is not a state of such passes."""

    def results(self) -> Measured:
        """Metrics, and tables. The table `mc` has the first metric by number of passes: `samples`, the
        measure, `deviation`, `groups`.
        """


class Task(Protocol):
    """Metrics are named `<part>_<measure>`; `selection_metric` is the one whose lowest value marks the best
    epoch.
    """

    selection_metric: str
    word_dropout: bool  # whether the authors keep it on in MC passes
    device: torch.device

    @property
    def predictor(self) -> Predictor:
        """For texts from elsewhere."""

    @property
    def fingerprint(self) -> str:
        """A digest of the text and of the part that the vocabulary leaves of it."""

    @property
    def origin(self) -> str:
        """Of the text, for a person."""

    @property
    def can_be_captured(self) -> bool:
        """Whether `loss` can be a CUDA graph: its shapes stay the same, and it never waits for the GPU."""

    @property
    def part_sizes(self) -> dict[str, str]:
        """The size of each part of the text, for a person."""

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the text, a line each, that changes what its metrics mean; every result has
        them.
        """

    @property
    def batches_an_epoch(self) -> int: ...

    def batches(self, order: Stream) -> Iterator[Batch]:
        """Of one epoch of training, a function of the stream."""

    def words(self, batch: Batch) -> int: ...

    def model(
        self, model: Model, dropout: Dropout, backend: str, compute_dtype: torch.dtype | None
    ) -> TaskModel:
        """One that is yet to be initialised."""

    def learned(self, measured: dict[str, float] | None) -> Learned:
        """What prediction needs beside the weights; `measured` is what `validate` gave of them, None where it
        has not.
        """

    def zero_state(self, model: TaskModel) -> State:
        """With which an epoch begins; nothing where no state is carried from batch to batch."""

    def masks(self, model: TaskModel, batch: Batch, stream: Stream) -> ModelMasks:
        """Of a batch, on the CPU, as a function of the stream."""

    def loss(self, model: TaskModel, batch: Batch, state: State, masks: ModelMasks) -> Objective:
        """What is descended and reported, and the state for the next batch."""

    def reported_loss(self, loss: float, words: int) -> float:
        """The loss of a batch of so many words on the scale on which it is written down."""

    def train_metrics(self, loss: float) -> dict[str, float]:
        """From the mean of such losses over an epoch."""

    def validate(self, model: TaskModel) -> dict[str, float]:
        """After every epoch."""

    def epoch_metrics(self, loss: float, measured: dict[str, float]) -> dict[str, float]:
        """Those of an epoch's training and validation, in the order in which they are shown."""

    def result(self, model: TaskModel, best_epoch: int, best: float) -> dict[str, float]:
        """The metrics of the reported epoch; `best` is the selection metric of the best epoch."""

    def evaluate(self, model: TaskModel) -> Measured:
        """Everything the standard approximation gives."""

    def passes(self, model: TaskModel, samples: int, together: int, seed: int, word_dropout: bool) -> Passes:
        """MC dropout; up to `together` passes may share a batch."""

    def ensemble(self, models: Iterable[TaskModel]) -> Measured:
        """Of several models together."""


def warn(task: Task) -> None:
    """Prints what is wrong with its text."""
    for warning in task.warnings:
        print(f"vdrop: {warning}", file=sys.stderr)


DEBUG_STEPS = 2


def shortened(rated: Rated, task: SentimentTask) -> Rated:
    """Texts of one chunk each, of which the training part, 70 % or 80 %, has two batches."""
    words = None if task.chunk_words is None else task.chunk_words - 1  # a start token precedes them
    return rated.shortened(max(MIN_TEXTS, task.batch_size * 5 // 2), task.batch_size, words)


def load(settings: Train, device: torch.device) -> Task:
    """The task of a training run, with its text."""
    task, data = settings.task, settings.data
    if isinstance(task, SentimentTask) and isinstance(data, RatedData):
        rated = corpora.load_rated(data)
        return Sentiment(task, data, shortened(rated, task) if settings.debug else rated, device)
    assert isinstance(task, LanguageModelTask) and isinstance(data, TextData)  # `Train` refuses others
    corpus = corpora.load_text(data)
    if settings.debug:
        corpus = corpus.shortened((DEBUG_STEPS * task.bptt + 1) * task.batch_size)
    return LanguageModelling(task, corpus, device, isinstance(data, PennTreebank))
