"""The settings of `vdrop train`. No torch here: help and errors are quick."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any

from omegaconf import MISSING

from vdrop_cli.errors import ConfigError, require
from vdrop_cli.policies import PLACES, Cell, Dropout, Policy, Tie, WordMask
from vdrop_cli.settings.choices import (
    RATED,
    Backend,
    CorpusName,
    LoggerName,
    OptimizerName,
    Precision,
    Size,
    SplitProtocol,
    TaskName,
)
from vdrop_cli.settings.fields import (
    FLOAT32_LIMIT,
    SEED_LIMIT,
    FilePath,
    FolderName,
    Limits,
    plain,
    require_limits,
    setting,
    without_defaults,
)

POSITIVE = Limits(at_least=1)
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
    hidden_size: int = setting(MISSING, "size of each layer and of the embedding", "units", POSITIVE)
    layers: int = setting(MISSING, "number of layers", limits=Limits(at_least=1, at_most=1000))
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

    def __post_init__(self) -> None:
        require_limits(self, "model.")
        require(
            self.forget_bias == 0 or self.cell is Cell.lstm,
            "model.forget_bias",
            "0 for a GRU, which has no forget gate",
            self.forget_bias,
        )
        require(
            not self.reset_after or self.cell is Cell.gru,
            "model.reset_after",
            "false for an LSTM, which has no reset gate",
            "true",
        )


@dataclass
class DropoutSettings:
    name: str = setting(MISSING, "name of the dropout in the run folder's name", limits=FolderName())
    policy: Policy = setting(MISSING, "what is dropped, and for how long a mask is held")
    untied: bool = setting(
        False, "variational: a mask for each gate instead of one for all (naive is always untied)"
    )
    p_word: float = setting(0.0, "probability of dropping a word of the vocabulary", limits=PROBABILITY)
    p_x: float = setting(0.0, "probability of dropping a unit of each layer's input", limits=PROBABILITY)
    p_h: float = setting(
        0.0,
        "probability of dropping a unit of the previous hidden state in the recurrent product",
        "",
        PROBABILITY,
    )
    p_c: float = setting(0.0, "probability of dropping a unit of the cell state", limits=PROBABILITY)
    p_out: float = setting(0.0, "probability of dropping a unit of the last layer's output", "", PROBABILITY)
    word_mask: WordMask = setting(
        WordMask.type,
        "type: a dropped word is dropped wherever it occurs in the sequence; token: each occurrence "
        "by itself, as in the authors' code until 2017-01",
    )

    def __post_init__(self) -> None:
        require_limits(self, "dropout.")
        tied = self.policy is not Policy.variational
        require(
            not (self.untied and tied), "dropout.untied", f"false with dropout.policy={self.policy}", "true"
        )
        self.for_layers()

    def for_layers(self) -> Dropout:
        """The policy as the layers take it."""
        probabilities = {name: getattr(self, name) for name in PLACES}
        try:
            return Dropout(
                self.policy, tie=Tie.none if self.untied else None, word_mask=self.word_mask, **probabilities
            )
        except ValueError as error:
            message = re.sub(r"\b(policy|p_word)=", r"dropout.\1=", str(error))
            raise ConfigError(f"dropout.{message}") from None


@dataclass
class Data:
    source: CorpusName = setting(MISSING, "the corpus; data=… selects it")
    dir: str | None = setting(
        None,
        "ptb: folder of ptb.{train,valid,test}.txt; cornell: folder of scaledata/; vader: folder of its "
        "snippets; null: data/ of the checkout or the working folder",
        limits=FilePath(),
    )
    train: str | None = setting(None, "text: file to train on", limits=FilePath())
    valid: str | None = setting(None, "text: file to validate on", limits=FilePath())
    test: str | None = setting(None, "text: file to test on", limits=FilePath())
    csv: str | None = setting(
        None,
        "text_regression: a CSV file with column names in its first line; or data.name",
        limits=FilePath(),
    )
    delimiter: str | None = setting(
        None, "with data.csv: the character between columns, or tab; null: a comma, or a tab in a .tsv file"
    )
    name: str | None = setting(
        None,
        'hub, text_regression: the data set, "owner/name", or a local folder that `datasets` can load',
        limits=FilePath(),
    )
    config: str | None = setting(None, "hub, text_regression: one of the data set's configurations")
    revision: str | None = setting(None, "hub, text_regression: branch, tag or commit of the data set")
    column: str | None = setting(None, "hub, text_regression: the column with the text")
    rating_column: str | None = setting(None, "text_regression: the column with the number to predict")
    min_count: int = setting(
        1,
        "words that occur less often in the training part (task.protocol=paper: in all parts) are <unk>; "
        "2 by default for text, hub and pydoc",
        limits=POSITIVE,
    )
    vocabulary_size: int | None = setting(
        None,
        "texts with ratings: size of the vocabulary, the most frequent words; null: all",
        "words",
        POSITIVE,
    )
    fraction: float = setting(
        1.0,
        "share of the training part that is used: the first tokens of a text, or as many texts with ratings, "
        "drawn by task.split_seed; the vocabulary stays that of the whole part",
        limits=Limits(above=0, at_most=1),
    )
    cache: str | None = setting(
        "data/cache",
        "folder of encoded corpora, which are looked up by content; null: no cache; texts with ratings are "
        "never cached",
        limits=FilePath(),
    )

    def __post_init__(self) -> None:
        require_limits(self, "data.")
        for key, sources in OPTIONAL_KEYS.items():
            value = getattr(self, key)
            is_allowed = value is None or self.source in sources
            require(is_allowed, f"data.{key}", f"unset with data={self.source}", value)
        for key in REQUIRED_KEYS.get(self.source, ()):
            require(bool(getattr(self, key)), f"data.{key}", f"set with data={self.source}", "nothing")
        require(
            self.source is not CorpusName.ptb or self.min_count == 1,
            "data.min_count",
            "1 with data=ptb, which has its own <unk>",
            self.min_count,
        )
        if self.source is CorpusName.text_regression:
            self.require_table()

    def require_table(self) -> None:
        """Raises ConfigError unless the settings of a table of ratings agree; `tab` becomes the sign."""
        got = "both" if self.csv else "neither"
        require(
            bool(self.csv) != bool(self.name), "data.csv", "set with data=text_regression, or data.name", got
        )
        require(
            self.column != self.rating_column,
            "data.rating_column",
            "another column than data.column",
            self.rating_column,
        )
        require(
            self.delimiter is None or self.csv is not None,
            "data.delimiter",
            "null without data.csv",
            self.delimiter,
        )
        self.delimiter = "\t" if self.delimiter in ("tab", "\\t") else self.delimiter
        require(
            self.delimiter is None or (len(self.delimiter) == 1 and self.delimiter not in '"\r\n'),
            "data.delimiter",
            "one character that is no quotation mark or line end, or tab",
            repr(self.delimiter),
        )
        for key in ("config", "revision"):
            value = getattr(self, key)
            require(value is None or self.csv is None, f"data.{key}", "null with data.csv", value)


# the settings of data that only some corpora have, and those that a corpus needs
OPTIONAL_KEYS: dict[str, tuple[CorpusName, ...]] = {
    "dir": (CorpusName.ptb, CorpusName.cornell, CorpusName.vader),
    **dict.fromkeys(("train", "valid", "test"), (CorpusName.text,)),
    **dict.fromkeys(("name", "config", "revision", "column"), (CorpusName.hub, CorpusName.text_regression)),
    **dict.fromkeys(("csv", "delimiter", "rating_column"), (CorpusName.text_regression,)),
    "vocabulary_size": RATED,
}
REQUIRED_KEYS: dict[CorpusName, tuple[str, ...]] = {
    CorpusName.text: ("train", "valid", "test"),
    CorpusName.hub: ("name", "column"),
    CorpusName.text_regression: ("column", "rating_column"),
}


@dataclass
class TaskSettings:
    name: TaskName = setting(MISSING, "what is learned; task=… selects it")
    batch_size: int = setting(
        MISSING,
        "language_model: columns that the training text is cut into; sentiment: sequences in a batch",
        "sequences",
        POSITIVE,
    )
    bptt: int | None = setting(
        None, "language_model: time steps of a chunk, through which gradients flow", "steps", POSITIVE
    )
    protocol: SplitProtocol | None = setting(
        None,
        "sentiment: paper: chunks are split 80/20 without a validation part, as by the authors; clean: texts "
        "are split 70/10/20, and the best epoch on validation is reported",
    )
    chunk_words: int | None = setting(
        None,
        "sentiment: longer texts are cut into chunks of this length; null: texts are read whole",
        "words",
        Limits(at_least=2),
    )
    split_seed: int | None = setting(
        None, "sentiment: seed of the split into parts", limits=Limits(at_least=0, below=2**32)
    )
    length_pool: int | None = setting(
        None,
        "sentiment: length bucketing: this many batches are drawn together and sorted by length, which saves "
        "padding; 1: off",
        "batches",
        POSITIVE,
    )

    def __post_init__(self) -> None:
        require_limits(self, "task.")
        required, optional = TASK_KEYS[self.name]
        for key in (f.name for f in fields(self) if f.name not in ("name", "batch_size")):
            value = getattr(self, key)
            require(
                value is not None or key not in required, f"task.{key}", f"set with task={self.name}", "null"
            )
            is_allowed = value is None or key in required or key in optional
            require(is_allowed, f"task.{key}", f"null with task={self.name}", value)

    @property
    def steps(self) -> int:
        """`bptt` of a language model, where it is always set."""
        assert self.bptt is not None
        return self.bptt


# the settings that a task needs beside the batch size, and those that can be null
TASK_KEYS: dict[TaskName, tuple[tuple[str, ...], tuple[str, ...]]] = {
    TaskName.language_model: (("bptt",), ()),
    TaskName.sentiment: (("protocol", "split_seed", "length_pool"), ("chunk_words",)),
}


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
        "the learning rate is divided by it at the end of every epoch after max_epoch",
        limits=Limits(at_least=1, below=math.inf),
    )
    max_epoch: int = setting(MISSING, "last epoch at the full learning rate", "epochs", Limits(at_least=0))
    clip: float | None = setting(
        MISSING,
        "largest global norm of the gradient, on the scale of the summed loss; null: no clipping",
        limits=Limits(above=0),
    )
    weight_decay: float = setting(
        0.0,
        "sgd: w ← (1 - weight_decay)·w after each step, not multiplied by lr; adam: weight_decay·w is "
        "added to the gradient",
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

    def __post_init__(self) -> None:
        require_limits(self, "schedule.")

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
    """Language models: a run with a stuck start ends, because it will not recover."""

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
FORMER_SIZE = "sentiment"  # stood for null in older runs, whose folders are named by it


@dataclass
class Train:
    model: Model = MISSING
    dropout: DropoutSettings = MISSING
    data: Data = MISSING
    task: TaskSettings = MISSING
    schedule: Schedule = MISSING
    checkpoint: Checkpoints = setting(Checkpoints, "when checkpoints are written")
    stuck: StartCheck = setting(StartCheck, "when a start counts as stuck")
    seed: int = setting(1, "seed of the initial parameters and of every mask", limits=SEED)
    device: str = setting("auto", DEVICE_HELP)
    backend: Backend = setting(Backend.auto, "implementation of the cells; auto: the fastest on the device")
    precision: Precision = setting(
        Precision.auto,
        "of matrix products; bf16 leaves forward logits, states, gates, losses and weights in fp32",
    )
    outputs: str = setting("outputs", "folder in which the run folder is made", limits=FilePath())
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
        moon_gru = self.dropout.policy is Policy.moon and self.model.cell is Cell.gru
        require(
            not moon_gru,
            "dropout",
            "another policy than moon with a GRU, which has no cell state",
            self.dropout.name,
        )
        rated, source = self.data.source in RATED, self.data.source
        suits = rated == (self.task.name is TaskName.sentiment)
        others = [other.name for other in CorpusName if (other in RATED) != rated]
        require(suits, "data", f"one of {', '.join(others)} with task={self.task.name}", source)
        judged = self.task.name is TaskName.language_model or self.stuck.steps is None
        require(judged, "stuck.steps", f"null with task={self.task.name}", self.stuck.steps)
        require(
            self.stuck.steps is None
            or self.schedule.max_steps is None
            or self.stuck.steps <= self.schedule.max_steps,
            "stuck.steps",
            f"at most schedule.max_steps={self.schedule.max_steps}, or null",
            self.stuck.steps,
        )
        unchosen = self.task.protocol is SplitProtocol.paper and self.schedule.patience is not None
        require(
            not unchosen,
            "schedule.patience",
            "null with task.protocol=paper, which has no validation part",
            self.schedule.patience,
        )

    @property
    def reports_best(self) -> bool:
        """Whether the epoch that is reported is the best on validation, instead of the last."""
        return self.schedule.patience is not None or self.task.protocol is SplitProtocol.clean

    def for_debugging(self) -> "Train":
        """One epoch that starts over and logs every step."""
        return replace(
            self,
            schedule=replace(self.schedule, epochs=1),
            stuck=replace(self.stuck, steps=None),
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
