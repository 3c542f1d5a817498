"""The settings of each task."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from vdrop_cli.errors import require
from vdrop_cli.settings.choices import SplitProtocol, TaskName
from vdrop_cli.settings.fields import FLOAT32_LIMIT, POSITIVE, Limits, require_limits, setting
from vdrop_cli.settings.variants import Variants, selector

PENALTY = Limits(at_least=0, below=FLOAT32_LIMIT)
MIN_RANDOM_BPTT = 10  # steps; the shortest random chunks have a seventh of them


@dataclass
class TaskSettings:
    """What all tasks share."""

    name: TaskName = setting(MISSING, "what is learned; task=… selects it")
    batch_size: int = setting(MISSING, "sequences in a batch", "sequences", POSITIVE)

    def __post_init__(self) -> None:
        require_limits(self, "task.")


@dataclass
class LanguageModelTask(TaskSettings):
    name: TaskName = selector(TaskName.language_model, "the next word of a text; task=… selects another task")
    batch_size: int = setting(MISSING, "columns that the training text is cut into", "sequences", POSITIVE)
    bptt: int = setting(MISSING, "time steps of a chunk, through which gradients flow", "steps", POSITIVE)
    random_length: bool = setting(
        False,
        "chunks of training have random lengths about bptt, others in each epoch (Merity et al. 2018); the "
        "number of chunks stays the same, and no word is left out",
    )
    reset: float = setting(
        0.0,
        "probability that the state of a column is set to zero before a chunk (Melis et al. 2018)",
        limits=Limits(at_least=0, at_most=1),
    )
    ar: float = setting(
        0.0,
        "activation regularisation: this factor times the mean square of the masked output is added to the "
        "loss of each step (Merity et al. 2017)",
        limits=PENALTY,
    )
    tar: float = setting(
        0.0,
        "temporal activation regularisation: likewise of the differences between outputs of successive "
        "steps, not masked",
        limits=PENALTY,
    )
    augmented_loss: float = setting(
        0.0,
        "factor of the augmented loss: the divergence of the prediction from the similarity of all words to "
        "the target, both at augmented_temperature (Inan et al. 2017)",
        limits=PENALTY,
    )
    augmented_temperature: float | None = setting(
        None,
        "temperature of both distributions of the augmented loss; null: no augmented loss",
        limits=Limits(above=0, below=FLOAT32_LIMIT),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.random_length or self.bptt >= MIN_RANDOM_BPTT,
            "task.random_length",
            f"false with task.bptt below {MIN_RANDOM_BPTT}",
            "true",
        )
        require(self.tar == 0 or self.bptt > 1, "task.tar", "0 with task.bptt=1", self.tar)
        has_loss, has_temperature = self.augmented_loss > 0, self.augmented_temperature is not None
        require(
            has_loss == has_temperature,
            "task.augmented_temperature",
            f"{'a number' if has_loss else 'null'} with task.augmented_loss={self.augmented_loss:g}",
            "null" if self.augmented_temperature is None else self.augmented_temperature,
        )


@dataclass
class SentimentTask(TaskSettings):
    name: TaskName = selector(TaskName.sentiment, "the rating of a text; task=… selects another task")
    protocol: SplitProtocol = setting(
        MISSING,
        "paper: chunks are split 80/20 without a validation part, as by the authors; clean: texts are split "
        "70/10/20, and the best epoch on validation is reported, unless schedule.report_last",
    )
    chunk_words: int | None = setting(
        None,
        "longer texts are cut into chunks of this length; null: texts are read whole",
        "words",
        Limits(at_least=2),
    )
    split_seed: int = setting(
        MISSING,
        "seed of the split into parts, where the source has not all of them",
        limits=Limits(at_least=0, below=2**32),
    )
    length_pool: int = setting(
        MISSING,
        "length bucketing: this many batches are drawn together and sorted by length, so a batch has fewer "
        "steps; 1: off",
        "batches",
        POSITIVE,
    )


TASKS: Variants[TaskSettings] = Variants(
    "task", "name", {kind.name: kind for kind in (LanguageModelTask, SentimentTask)}
)
AnyTask: Any = TASKS.schema
