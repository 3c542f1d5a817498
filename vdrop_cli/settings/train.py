"""The settings of `vdrop train`. No torch here: help and errors are quick."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any

from omegaconf import MISSING

from vdrop_cli.errors import ConfigError, require
from vdrop_cli.policies import BETWEEN, PLACES, RESAMPLABLE, Cell, Dropout, Policy, Tie, WordMask
from vdrop_cli.settings.choices import (
    Backend,
    LoggerName,
    LrShape,
    OptimizerName,
    Precision,
    Size,
    SplitProtocol,
)
from vdrop_cli.settings.data import CORPORA, RATED, Data, PennTreebank
from vdrop_cli.settings.fields import (
    FLOAT32_LIMIT,
    POSITIVE,
    SEED_LIMIT,
    FolderName,
    FolderPath,
    Limits,
    plain,
    require_limits,
    setting,
    without_defaults,
)
from vdrop_cli.settings.task import TASKS, LanguageModelTask, SentimentTask, TaskSettings
from vdrop_cli.settings.variants import group_field

PROBABILITY = Limits(at_least=0, below=1)
SEED = Limits(at_least=0, below=SEED_LIMIT)
MC_SAMPLES = Limits(at_least=0, at_most=10**6)
DEVICE_HELP = "auto (CUDA if available), cpu, cuda, cuda:1, …"


@dataclass
class Model:
    name: str = setting(MISSING, "name of the model in the run folder's name", limits=FolderName())
    size: Size | None = setting(
        None,
        "the published settings that ${by_size:…} in conf/ selects; null: a model without published sizes",
    )
    cell: Cell = setting(MISSING, "the recurrent cell")
    hidden_size: int = setting(
        MISSING, "size of each layer; with lower_sizes of the last one", "units", POSITIVE
    )
    layers: int = setting(MISSING, "number of layers", limits=Limits(at_least=1, at_most=1000))
    lower_sizes: list[int] = setting(
        [],
        "sizes of all layers but the last, from the first on, where they are not hidden_size; empty: "
        "hidden_size",
        "units",
        POSITIVE,
    )
    residual: bool = setting(
        False, "the input of each layer but the first is added to its output (its states stay as they are)"
    )
    init: float = setting(
        MISSING,
        "every parameter starts uniform in [-init, init]",
        limits=Limits(above=0, below=FLOAT32_LIMIT),
    )
    forget_bias: float = setting(
        0.0,
        "LSTM: added to the bias of the forget gates at the start",
        limits=Limits(above=-math.inf, below=math.inf),
    )
    reset_after: bool = setting(
        False, "GRU: the reset gate acts after the recurrent product, as in torch and cuDNN"
    )
    embedding_size: int | None = setting(
        None, "size of a word's vector; null: hidden_size", "units", POSITIVE
    )
    tie_embeddings: bool = setting(
        False,
        "language_model: the word vectors are the weights of the head, too (Press & Wolf 2017); the output "
        "is projected to embedding_size where hidden_size is another",
    )
    embedding_std: float | None = setting(
        None,
        "word vectors start normal with this standard deviation; null: uniform like the other parameters",
        limits=Limits(above=0, below=FLOAT32_LIMIT),
    )

    def __post_init__(self) -> None:
        require_limits(self, "model.")
        require(
            self.forget_bias == 0 or self.cell is Cell.lstm,
            "model.forget_bias",
            "0 for a GRU, which has no forget gate",
            self.forget_bias,
        )
        rule = f"empty, or {self.layers - 1} sizes," if self.layers > 1 else "empty"
        require(
            len(self.lower_sizes) in (0, self.layers - 1),
            "model.lower_sizes",
            f"{rule} with model.layers={self.layers}",
            self.lower_sizes,
        )
        if self.lower_sizes == [self.hidden_size] * (self.layers - 1):
            self.lower_sizes = []  # for the identity
        require(
            not (self.residual and self.lower_sizes),
            "model.residual",
            f"false where the sizes of the layers differ, as with model.lower_sizes={self.lower_sizes}",
            "true",
        )
        require(
            not self.residual or self.layers > 1,
            "model.residual",
            f"false with model.layers={self.layers}",
            "true",
        )
        require(
            not self.reset_after or self.cell is Cell.gru,
            "model.reset_after",
            "false for an LSTM, which has no reset gate",
            "true",
        )

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """The size of each layer."""
        return (
            (*self.lower_sizes, self.hidden_size) if self.lower_sizes else (self.hidden_size,) * self.layers
        )

    @property
    def word_size(self) -> int:
        """The size of a word's vector."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def has_projection(self) -> bool:
        """Whether the output is projected to the size of the word vectors, which are the head's weights."""
        return self.tie_embeddings and self.word_size != self.hidden_size


@dataclass
class DropoutSettings:
    name: str = setting(MISSING, "name of the dropout in the run folder's name", limits=FolderName())
    policy: Policy = setting(MISSING, "what is dropped, and for how long a mask is held")
    untied: bool = setting(
        False, "variational: a mask for each gate instead of one for all (naive is always untied)"
    )
    p_word: float = setting(0.0, "probability of dropping a word of the vocabulary", limits=PROBABILITY)
    p_x: float = setting(0.0, "probability of dropping a unit of each layer's input", limits=PROBABILITY)
    p_between: float | None = setting(
        None,
        "probability of dropping a unit of the input of all layers but the first; null: p_x",
        limits=PROBABILITY,
    )
    p_h: float = setting(
        0.0,
        "probability of dropping a unit of the previous hidden state in the recurrent product",
        "",
        PROBABILITY,
    )
    p_c: float = setting(0.0, "probability of dropping a unit of the cell state", limits=PROBABILITY)
    p_out: float = setting(0.0, "probability of dropping a unit of the last layer's output", "", PROBABILITY)
    p_head: float = setting(
        0.0,
        "probability of dropping a unit of the projected output, where it enters the head; for tied word "
        "vectors that are not as large as the last layer",
        limits=PROBABILITY,
    )
    p_weight: float = setting(
        0.0,
        "probability of dropping an element of the recurrent weights; sequences of a batch share the mask",
        limits=PROBABILITY,
    )
    word_mask: WordMask = setting(
        WordMask.type,
        "type: a dropped word is dropped wherever it occurs in the sequence; token: each occurrence "
        "by itself, as in the authors' code until 2017-01",
    )
    new_each_step: list[str] = setting(
        [],
        "variational: places whose masks are new at every step instead of held, of "
        f"{', '.join(RESAMPLABLE)}; p_x is the first layer's input alone; for words see word_mask",
    )
    one_state_mask: bool = setting(
        False,
        "variational: the mask of p_h is also on the hidden state where it enters the next layer, and where "
        "it is the output (Inan et al. 2017); p_x is then that of the first layer's input, p_between is null "
        "and p_out is 0",
    )

    def __post_init__(self) -> None:
        require_limits(self, "dropout.")
        tied = self.policy is not Policy.variational
        require(
            not (self.untied and tied), "dropout.untied", f"false with dropout.policy={self.policy}", "true"
        )
        require(
            not (self.untied and self.one_state_mask),
            "dropout.untied",
            "false with dropout.one_state_mask=true",
            "true",
        )
        places = (self.p_x, self.p_h, self.p_between or 0)
        require(
            not self.untied or any(places),
            "dropout.untied",
            "false where no place with gates drops: dropout.p_x, dropout.p_h or dropout.p_between above 0",
            "true",
        )
        self.new_each_step = list(self.to_policy().new_each_step)  # in one order, for the identity
        for place in self.new_each_step:
            p = getattr(self, place)
            p = self.p_x if place == BETWEEN and p is None else p
            require(p > 0, "dropout.new_each_step", f"without {place}, where nothing is dropped", place)

    @property
    def in_words(self) -> str:
        """The probabilities above 0, such as `p_x 0.35, p_h 0.2`; or `none`."""
        named = [(name, getattr(self, name)) for name in (*PLACES[:2], BETWEEN, *PLACES[2:])]
        named = [(name, p) for name, p in named if p or (name == BETWEEN and p is not None)]
        note = dict.fromkeys(self.new_each_step, " new at every step")
        if self.one_state_mask:
            note["p_h"] = " on the state, wherever it enters, and on the output"
        return ", ".join(f"{name} {p:g}{note.get(name, '')}" for name, p in named) or "none"

    def to_policy(self) -> Dropout:
        """The policy of the whole model, as `model.Encoder` takes it."""
        probabilities = {name: getattr(self, name) for name in PLACES}
        try:
            return Dropout(
                self.policy,
                tie=Tie.none if self.untied else None,
                word_mask=self.word_mask,
                p_between=self.p_between,
                new_each_step=self.new_each_step,
                one_state_mask=self.one_state_mask,
                **probabilities,
            )
        except ValueError as error:
            message = re.sub(r"\b(policy|p_word|p_h|one_state_mask)=", r"dropout.\1=", str(error))
            message = message.replace("True", "true").replace("False", "false")
            raise ConfigError(f"dropout.{message}") from None


# Adam's steps are about as large as the learning rate. At 1, the rate published for SGD, it diverges.
HIGHEST_RATE_OF_ADAM = 0.1


@dataclass
class Schedule:
    epochs: int = setting(MISSING, "passes over the training part", "epochs", POSITIVE)
    optimiser: OptimizerName = setting(OptimizerName.sgd, "the optimiser")
    lr: float = setting(
        MISSING,
        "learning rate; sgd: on the scale of a loss summed over the time steps of a chunk",
        limits=Limits(above=0, below=FLOAT32_LIMIT),
    )
    decay: float = setting(
        MISSING,
        "the learning rate is divided by it at the end of every epoch after max_epoch; plateau: at each "
        "fall; 1 with cosine and linear",
        limits=Limits(at_least=1, below=math.inf),
    )
    max_epoch: int = setting(
        MISSING,
        "step: the learning rate falls at the end of every epoch after this one, for the first time at the "
        "end of the next; cosine and linear: the last epoch at the full rate; plateau: epochs without gain "
        "count from here on",
        "epochs",
        Limits(at_least=0),
    )
    clip: float | None = setting(
        MISSING,
        "largest global norm of the gradient, on the scale of the summed loss; null: no clipping",
        limits=Limits(above=0),
    )
    weight_decay: float = setting(
        0.0,
        "sgd: w ← (1 - weight_decay)·w after each step, not multiplied by lr; adam: weight_decay·w is "
        "added to the gradient; adamw: w ← (1 - lr·weight_decay)·w before each step",
        limits=PROBABILITY,
    )
    patience: int | None = setting(
        None,
        "stop after this many epochs without a better validation, and report the best epoch; null: train for "
        "all epochs",
        "epochs",
        POSITIVE,
    )
    max_steps: int | None = setting(
        None,
        "stop after this many training steps, even within an epoch, which is then validated; null: train for "
        "all epochs",
        "steps",
        POSITIVE,
    )
    report_last: bool = setting(
        False,
        "ratings, clean protocol: report the last epoch instead of the best on validation; intervals that "
        "are calibrated on the validation part then have their guarantee",
    )
    beta1: float = setting(0.9, "adam, adamw: decay of the mean of gradients", limits=PROBABILITY)
    beta2: float = setting(0.999, "adam, adamw: decay of the mean of squared gradients", limits=PROBABILITY)
    lr_shape: LrShape = setting(LrShape.step, "how the learning rate falls")
    warmup: int = setting(
        0, "the learning rate rises from 0 during so many steps", "steps", Limits(at_least=0)
    )
    plateau_epochs: int = setting(
        1, "plateau: the rate falls after so many epochs without a better validation", "epochs", POSITIVE
    )
    plateau_gain: float = setting(
        0.0,
        "plateau: a validation counts as better if it is below the best by more than this share of it",
        limits=Limits(at_least=0, below=1),
    )
    lr_end: float = setting(
        0.0, "cosine, linear: learning rate of the last step, as a share of lr", limits=Limits(0, None, 1)
    )
    average_decay: float | None = setting(
        None,
        "the average of the weights over updates is the model that is validated and reported; 1: their plain "
        "mean, below 1: an exponential one; null: the weights themselves",
        limits=Limits(above=0, at_most=1),
    )
    average_from: int | None = setting(
        None,
        "the average begins after so many epochs; null: when validation stops getting better",
        "epochs",
        Limits(at_least=0),
    )
    average_trigger: int = setting(
        5,
        "average_from=null: the average begins once validation is worse than the best validation from more "
        "than so many epochs ago",
        "epochs",
        POSITIVE,
    )

    def __post_init__(self) -> None:
        require_limits(self, "schedule.")
        for name in ("beta1", "beta2"):
            self.require_unused(name, self.optimiser is not OptimizerName.sgd, f"optimiser={self.optimiser}")
        require(
            self.optimiser is OptimizerName.sgd or self.lr <= HIGHEST_RATE_OF_ADAM,
            "schedule.lr",
            f"at most {HIGHEST_RATE_OF_ADAM} with schedule.optimiser={self.optimiser}, for example 0.001",
            self.lr,
        )
        shape = f"lr_shape={self.lr_shape}"
        for name in ("plateau_epochs", "plateau_gain"):
            self.require_unused(name, self.lr_shape is LrShape.plateau, shape)
        self.require_unused("lr_end", self.falls_to_the_end, shape)
        averages = self.average_decay is not None
        self.require_unused("average_from", averages, "average_decay=null")
        self.require_unused(
            "average_trigger",
            self.average_is_triggered,
            f"average_from={self.average_from}" if averages else "average_decay=null",
        )
        require(
            not self.average_is_triggered or self.epochs > 3,
            "schedule.epochs",
            "at least 4 with schedule.average_decay, or schedule.average_from a number",
            self.epochs,
        )
        require(
            not averages or self.average_from is not None or self.epochs > self.average_trigger + 2,
            "schedule.average_trigger",
            f"below {self.epochs - 2}, so that an average can begin within schedule.epochs={self.epochs}",
            self.average_trigger,
        )
        require(
            self.average_from is None or self.average_from < self.epochs,
            "schedule.average_from",
            f"below schedule.epochs={self.epochs}, or null",
            self.average_from,
        )
        require(
            self.lr_shape is not LrShape.plateau or self.decay > 1,
            "schedule.decay",
            f"above 1 with schedule.{shape}",
            self.decay,
        )
        require(
            not self.falls_to_the_end or self.decay == 1,
            "schedule.decay",
            f"1 with schedule.{shape}, whose end is schedule.lr_end",
            self.decay,
        )
        require(
            not self.falls_to_the_end or self.max_epoch < self.epochs,
            "schedule.max_epoch",
            f"below schedule.epochs={self.epochs} with schedule.{shape}",
            self.max_epoch,
        )

    def require_unused(self, name: str, is_used: bool, by: str) -> None:
        """Raises ConfigError if the setting `name` is not used and is not at its default.

        `by` is the other setting that leaves it without effect, for the message.
        """
        default = next(f.default for f in fields(self) if f.name == name)
        value = getattr(self, name)
        shown = "null" if default is None else default
        require(is_used or value == default, f"schedule.{name}", f"{shown} with schedule.{by}", value)

    @property
    def average_is_triggered(self) -> bool:
        """Whether validation decides on when the average of the weights begins."""
        return self.average_decay is not None and self.average_from is None

    @property
    def falls_to_the_end(self) -> bool:
        """Whether the learning rate depends on the length of the training."""
        return self.lr_shape in (LrShape.cosine, LrShape.linear)

    def steps_after(self, epochs: int, steps_per_epoch: int) -> int:
        """Training steps of so many epochs, the last of which `max_steps` may have shortened."""
        steps = epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def max_grad_norm(self) -> float:
        return math.inf if self.clip is None else self.clip


@dataclass
class Checkpoints:
    minutes: float = setting(
        5.0,
        "training time between two checkpoints within an epoch; inf: none; there is always one at a signal",
        "minutes",
        Limits(above=0),
    )
    epochs: int = setting(
        1,
        "a checkpoint at the end of every so many epochs, of the last epoch, and of the best epoch if it is "
        "reported",
        "epochs",
        POSITIVE,
    )

    def __post_init__(self) -> None:
        require_limits(self, "checkpoint.")


@dataclass
class StartCheck:
    """When the start of a language model's training counts as stuck. Such a run ends, because it will not
    recover.
    """

    steps: int | None = setting(
        None,
        "language_model: steps after which the start is judged, at most those of an epoch; null: never",
        "steps",
        POSITIVE,
    )
    loss: float = setting(
        7.0,
        "the start is stuck if the mean loss of the last quarter of these steps is above this",
        "nats per word",
        Limits(above=0, below=math.inf),
    )

    def __post_init__(self) -> None:
        require_limits(self, "stuck.")
        is_used = self.steps is not None or self.loss == type(self).loss
        require(is_used, "stuck.loss", f"{type(self).loss:g} without stuck.steps, which it is for", self.loss)


PUBLISHED_COLUMNS = ((20, 35), (20, 20))  # batch and bptt of the medium and large rows, and of the small one
NOT_IN_IDENTITY = (
    "checkpoint",
    "stuck",
    "seed",
    "outputs",
    "log_every",
    "logger",
    "force",
    "run_name",
    "tags",
)
FORMER_SIZE = "sentiment"  # null was written so in older runs, and their folders' names depend on it


@dataclass
class Train:
    model: Model = MISSING
    dropout: DropoutSettings = MISSING
    data: Data = group_field(CORPORA)
    task: TaskSettings = group_field(TASKS)
    schedule: Schedule = MISSING
    checkpoint: Checkpoints = setting(Checkpoints, "when checkpoints are written")
    stuck: StartCheck = setting(StartCheck, "when a start counts as stuck")
    seed: int = setting(1, "seed of the initial parameters, every mask and the order of reading", limits=SEED)
    device: str = setting("auto", DEVICE_HELP)
    backend: Backend = setting(Backend.auto, "implementation of the cells; auto: the fastest on the device")
    precision: Precision = setting(
        Precision.auto,
        "of matrix products; bf16 leaves forward logits, states, gates, losses and weights in fp32",
    )
    outputs: str = setting("outputs", "folder in which the run folder is made", limits=FolderPath())
    log_every: int = setting(
        20, "steps between two step records in log.jsonl and the logger", "steps", POSITIVE
    )
    logger: LoggerName = setting(
        LoggerName.tensorboard,
        "where curves, settings and the result are also recorded; log.jsonl is always written",
    )
    debug: bool = setting(
        False,
        "two training steps and an evaluation on a small part of the data; the run folder is in "
        "outputs/debug/, which no table reads",
    )
    force: bool = setting(False, "start over, even if a run of the same settings exists, finished or not")
    run_name: str | None = setting(
        None, "what vdrop compare and pictures call the run; null: by its settings", limits=FolderName()
    )
    tags: list[str] = setting([], "words by which vdrop compare selects runs", limits=FolderName())

    def __post_init__(self) -> None:
        require_limits(self)
        self.require_dropout_fits_model()
        self.require_data_fits_task()
        self.require_start_check_fits()
        self.require_validation_exists()

    def require_dropout_fits_model(self) -> None:
        """Raises ConfigError where the model lacks what the dropout acts on."""
        moon_gru = self.dropout.policy is Policy.moon and self.model.cell is Cell.gru
        require(
            not moon_gru,
            "dropout",
            "another policy than moon with a GRU, which has no cell state",
            self.dropout.name,
        )
        has_between = self.dropout.p_between is not None
        require(
            self.model.layers > 1 or not (has_between or BETWEEN in self.dropout.new_each_step),
            "dropout.p_between",
            "null, and not in dropout.new_each_step, with model.layers=1",
            self.dropout.p_between,
        )
        require(
            not (self.dropout.one_state_mask and self.model.residual),
            "dropout.one_state_mask",
            "false with model.residual=true",
            "true",
        )
        require(
            self.dropout.p_head == 0 or self.model.has_projection,
            "dropout.p_head",
            f"0 with task={self.task.name}"
            if self.has_ratings
            else "0 without a projection, which comes with model.tie_embeddings=true and another "
            "model.embedding_size than model.hidden_size",
            self.dropout.p_head,
        )

    def require_data_fits_task(self) -> None:
        """Raises ConfigError where the task cannot read the data, or has no head for tied embeddings."""
        source = self.data.source
        suitable = [one for one in CORPORA.kinds if (one in RATED) == self.has_ratings]
        names = ", ".join(map(str, suitable))
        require(source in suitable, "data", f"one of {names} with task={self.task.name}", source)
        require(
            not (self.has_ratings and self.model.tie_embeddings),
            "model.tie_embeddings",
            f"false with task={self.task.name}, whose head has no row for each word",
            "true",
        )

    def require_start_check_fits(self) -> None:
        """Raises ConfigError for a start check of ratings, or one that comes after the end of training."""
        judged = not self.has_ratings or self.stuck.steps is None
        require(judged, "stuck.steps", f"null with task={self.task.name}", self.stuck.steps)
        require(
            self.stuck.steps is None
            or self.schedule.max_steps is None
            or self.stuck.steps <= self.schedule.max_steps,
            "stuck.steps",
            f"at most schedule.max_steps={self.schedule.max_steps}, or null",
            self.stuck.steps,
        )

    def require_validation_exists(self) -> None:
        """Raises ConfigError if training needs a validation part that the protocol lacks, or if `report_last`
        is set although validation decides something.
        """
        unchosen = self.protocol is SplitProtocol.paper and self.schedule.patience is not None
        require(
            not unchosen,
            "schedule.patience",
            "null with task.protocol=paper, which has no validation part",
            self.schedule.patience,
        )
        require(
            not self.schedule.report_last
            or (self.protocol is SplitProtocol.clean and self.schedule.patience is None),
            "schedule.report_last",
            "false, except with task.protocol=clean and without schedule.patience",
            "true",
        )
        is_plateau = self.schedule.lr_shape is LrShape.plateau
        is_triggered = self.schedule.average_is_triggered
        require(
            not (self.schedule.report_last and (is_plateau or is_triggered)),
            "schedule.report_last",
            "false where validation decides on the learning rate or on when an average begins",
            "true",
        )
        require(
            not (is_triggered and self.protocol is SplitProtocol.paper),
            "schedule.average_from",
            "a number of epochs with task.protocol=paper, which has no validation part",
            "null",
        )
        require(
            not (is_plateau and self.protocol is SplitProtocol.paper),
            "schedule.lr_shape",
            "another than plateau with task.protocol=paper, which has no validation part",
            self.schedule.lr_shape,
        )

    @property
    def has_ratings(self) -> bool:
        """Whether ratings are predicted, rather than words."""
        return isinstance(self.task, SentimentTask)

    @property
    def protocol(self) -> SplitProtocol | None:
        """How texts with ratings are split into parts; None for a language model."""
        return self.task.protocol if isinstance(self.task, SentimentTask) else None

    @property
    def reads_as_published(self) -> bool:
        """Whether Penn Treebank is read with the batch size and bptt of one of the authors' scripts."""
        task = self.task
        columns = (task.batch_size, task.bptt) if isinstance(task, LanguageModelTask) else None
        return isinstance(self.data, PennTreebank) and columns in PUBLISHED_COLUMNS

    @property
    def reports_best(self) -> bool:
        """Whether the epoch that is reported is the best on validation, instead of the last."""
        best = self.schedule.patience is not None or self.protocol is SplitProtocol.clean
        return best and not self.schedule.report_last

    def for_debugging(self) -> "Train":
        """The settings of debug=true: one epoch that starts over and logs every step, without what needs a
        longer training.
        """
        schedule = self.schedule
        return replace(
            self,
            schedule=replace(
                schedule,
                epochs=1,
                warmup=0,
                max_epoch=0 if schedule.falls_to_the_end else schedule.max_epoch,
                average_from=None if schedule.average_decay is None else 0,
                average_trigger=5,
            ),
            stuck=StartCheck(),
            log_every=1,
            force=True,
        )

    def numbers(self) -> dict[str, Any]:
        """The settings that change the numbers, without the seed; those of data and machine included."""
        return {key: value for key, value in plain(self).items() if key not in NOT_IN_IDENTITY}

    def identity(self, corpus_fingerprint: str) -> str:
        """Eight hex digits of all that changes the numbers, the seed excepted.

        The corpus counts by its content; folders and logging do not count. Settings at their field's default
        are left out: new settings can be added without renaming older runs, and a default in this file must
        never change. Device, back end and precision must be those that `auto` resolved to; the number of a
        GPU does not count.
        """
        one = replace(self, device=self.device.partition(":")[0])
        changed = {key: value for key, value in without_defaults(one).items() if key not in NOT_IN_IDENTITY}
        if self.model.size is None:
            changed["model"]["size"] = FORMER_SIZE
        content = changed | {"data": corpus_fingerprint}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    def run_identity(self, corpus_fingerprint: str) -> tuple[str, int]:
        """The identity and the seed, by which a run differs from all others."""
        return self.identity(corpus_fingerprint), self.seed
