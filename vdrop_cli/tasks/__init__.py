"""Tasks define batches, loss and metrics. Training and the commands use a task only through `Task`."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from vdrop_cli import corpora
from vdrop_cli.corpora.rated import MIN_TEXTS, Rated
from vdrop_cli.dropout import ModelMasks
from vdrop_cli.layers import State
from vdrop_cli.learned import Learned
from vdrop_cli.mc_passes import McPasses, PassOptions
from vdrop_cli.measured import Measured
from vdrop_cli.policies import Dropout
from vdrop_cli.random_streams import Stream
from vdrop_cli.settings.commands import Eval
from vdrop_cli.settings.data import RatedData, TextData
from vdrop_cli.settings.task import LanguageModelTask, SentimentTask
from vdrop_cli.settings.train import Model, Train
from vdrop_cli.tasks.language_model import LanguageModelling
from vdrop_cli.tasks.objective import Objective
from vdrop_cli.tasks.other_text import OtherText
from vdrop_cli.tasks.predictors import (
    Predictor,
    RatingPredictor,
    UnknownWord,
    WordPredictor,
    is_unknown_untrained,
    predictor_of,
)
from vdrop_cli.tasks.sentiment import Sentiment

__all__ = [
    "EvaluationTask",
    "LanguageModelling",
    "OtherText",
    "Predictor",
    "RatingPredictor",
    "Sentiment",
    "Task",
    "UnknownWord",
    "WordPredictor",
    "is_unknown_untrained",
    "load",
    "predictor_of",
    "warn",
]

Batch = Any  # of a type that each task has; its field `number` counts the batches of an epoch from 0
TaskModel = Any  # of a type that each task has: a `torch.nn.Module` with `layers`


class EvaluationTask(Protocol):
    """The part of a task that evaluates a trained model.

    Names of metrics are `<part>_<measure>`. Tensors are on `device`.
    """

    word_dropout: bool  # whether the authors drop words in MC passes
    device: torch.device

    @property
    def predictor(self) -> Predictor:
        """Returns the object that encodes other texts for the model, and that makes the model."""

    @property
    def fingerprint(self) -> str:
        """Returns a digest of the text and of everything else that determines the ids that the model reads.

        If the task can be trained, a checkpoint is used only with a text that has the fingerprint in the
        checkpoint.
        """

    @property
    def origin(self) -> str:
        """Returns where the text is from, for messages."""

    @property
    def warnings(self) -> list[str]:
        """Returns what is wrong with the text and changes what its metrics mean, a line each. It is printed
        before training, and written into every result.
        """

    def evaluate(self, model: TaskModel) -> Measured:
        """Returns all that the standard approximation gives of one model."""

    def require_evaluable(self, settings: Eval, path: Path) -> None:
        """Raises ConfigError where the settings ask for what this task or its text does not have. `path` is
        the checkpoint. Called before anything is measured.
        """

    def measure_standard(self, models: Iterable[TaskModel], settings: Eval) -> Measured:
        """Evaluates one model, or with `members` the average of several, by the standard approximation.

        `models` is consumed one at a time. Raises NoTemperature if the settings ask for the best temperature
        and there is none.
        """

    def measure_calibration(self, model: TaskModel, settings: Eval) -> Measured:
        """Returns the measures that calibration=true adds to the standard approximation. They are empty
        without calibration=true, and for ratings, which always have such measures.
        """

    def passes(self, models: list[TaskModel], options: PassOptions) -> McPasses:
        """Returns passes of MC dropout that have not begun, of one model or of several together. Raises
        ConfigError where a factor on dropout probabilities is too large.
        """


class Task(EvaluationTask, Protocol):
    """A task that models are trained on: batches, loss and metrics. A new task satisfies this protocol, and
    `load` returns it.
    """

    selection_metric: str  # of `validate`; its lowest value marks the best epoch

    @property
    def can_be_captured(self) -> bool:
        """Returns whether `loss` can be a CUDA graph: its shapes stay the same, and it never waits for the
        GPU.
        """

    @property
    def part_sizes(self) -> dict[str, str]:
        """Returns the size of each part of the text, in words for a person."""

    @property
    def batches_an_epoch(self) -> int:
        """Returns the number of batches that `batches` yields."""

    def batches(self, order: Stream) -> Iterator[Batch]:
        """Yields the batches of one epoch of training, as a function of `order`. Called at the start of each
        epoch, and again where training resumes within one.
        """

    def words(self, batch: Batch) -> int:
        """Returns the number of words that a batch has, for the speed and for `reported_loss`."""

    def model(
        self, model: Model, dropout: Dropout, backend: str, compute_dtype: torch.dtype | None
    ) -> TaskModel:
        """Returns a model for this text on the CPU, whose weights are not initialised."""

    def learned(self, measured: dict[str, float] | None) -> Learned:
        """Returns what prediction needs beside the weights, for a checkpoint. `measured` are the metrics of
        `validate` with these weights, None where they have not been validated.
        """

    def zero_state(self, model: TaskModel) -> State:
        """Returns the state with which an epoch begins; `()` where batches carry none."""

    def masks(self, model: TaskModel, batch: Batch, stream: Stream) -> ModelMasks:
        """Returns the masks of a batch of training, on the CPU, as a function of `stream`. Threads call it in
        advance.
        """

    def loss(self, model: TaskModel, batch: Batch, state: State, masks: ModelMasks) -> Objective:
        """Returns the losses of a batch, and the state for the next batch. Called once in each training
        step.
        """

    def reported_loss(self, loss: float, words: int) -> float:
        """Returns the loss of a batch of so many words in the unit in which it is logged."""

    def train_metrics(self, loss: float) -> dict[str, float]:
        """Returns the metrics of an epoch's training; `loss` is the mean of `reported_loss` over it."""

    def validate(self, model: TaskModel) -> dict[str, float]:
        """Returns the metrics after an epoch, `selection_metric` among them, without dropout."""

    def epoch_metrics(self, loss: float, measured: dict[str, float]) -> dict[str, float]:
        """Returns the metrics of an epoch's training (see `train_metrics`) and of its validation, in the
        order in which they are shown.
        """

    def result(self, model: TaskModel, best_epoch: int, best: float) -> dict[str, float]:
        """Returns the metrics of a finished run. `model` has the weights of the reported epoch, `best` is the
        selection metric of the best epoch.
        """


def warn(task: EvaluationTask) -> None:
    """Prints the warnings about a text to standard error, a line each."""
    for warning in task.warnings:
        print(f"vdrop: {warning}", file=sys.stderr)


DEBUG_STEPS = 2


def shortened(rated: Rated, task: SentimentTask) -> Rated:
    """Returns a small part of rated texts, for debugging. Each text is at most one chunk long. The texts are
    just enough for two batches of the training part, which is 70 % or 80 % of them, and at least MIN_TEXTS.
    """
    words = None if task.chunk_words is None else task.chunk_words - 1  # a start token precedes them
    return rated.shortened(max(MIN_TEXTS, task.batch_size * 5 // 2), task.batch_size, words)


def load(settings: Train, device: torch.device) -> Task:
    """Returns the task of a training run, and reads its text."""
    task, data = settings.task, settings.data
    if isinstance(task, SentimentTask) and isinstance(data, RatedData):
        rated = corpora.load_rated(data)
        return Sentiment(task, data, shortened(rated, task) if settings.debug else rated, device)
    assert isinstance(task, LanguageModelTask) and isinstance(data, TextData)  # `Train` refuses others
    corpus = corpora.load_text(data)
    if settings.debug:
        corpus = corpus.shortened((DEBUG_STEPS * task.bptt + 1) * task.batch_size)
    return LanguageModelling(task, corpus, device, settings.reads_as_published)
