"""The settings of `vdrop train`: types, limits, sources. It imports no torch: help and errors are quick."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING

from vdrop_cli.errors import ConfigError, require
from vdrop_cli.policies import PLACES, Cell, Dropout, Policy, Tie, WordMask
from vdrop_cli.settings.choices import (
    RATED,
    Backend,
    CorpusName,
    OptimizerName,
    Precision,
    Size,
    SplitProtocol,
    TaskName,
)
from vdrop_cli.settings.fields import FLOAT32_LIMIT, SEED_LIMIT, plain, require_name, without_defaults


@dataclass
class Model:
    name: str = MISSING  # names the run folder
    size: Size = MISSING  # the column of published settings that ${by_size:…} picks from
    cell: Cell = MISSING
    hidden_size: int = MISSING  # units of each layer, and of the embedding
    layers: int = MISSING
    init: float = MISSING  # every parameter starts uniform in [-init, init]
    forget_bias: float = 0.0  # LSTM: added to the bias of the forget gates at the start
    reset_after: bool = False  # GRU: the reset gate acts after the recurrent product, as in torch and cuDNN

    def __post_init__(self) -> None:
        require_name("model.name", self.name)
        require(self.hidden_size >= 1, "model.hidden_size", "at least 1", self.hidden_size)
        require(self.layers >= 1, "model.layers", "at least 1", self.layers)
        require(0 < self.init < FLOAT32_LIMIT, "model.init", "above 0", self.init)
        require(math.isfinite(self.forget_bias), "model.forget_bias", "finite", self.forget_bias)
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
    """Probabilities are of dropping, in [0, 1)."""

    name: str = MISSING  # names the run folder
    policy: Policy = MISSING
    untied: bool = False  # variational: a mask for each gate, instead of one for all (naive is always untied)
    p_word: float = 0.0  # a word of the vocabulary
    p_x: float = 0.0  # the input of each layer
    p_h: float = 0.0  # the previous hidden state where it enters the recurrent product
    p_c: float = 0.0  # the cell state
    p_out: float = 0.0  # the output of the last layer
    word_mask: WordMask = WordMask.type

    def __post_init__(self) -> None:
        require_name("dropout.name", self.name)
        tied = self.policy is not Policy.variational
        require(
            not (self.untied and tied), "dropout.untied", f"false with dropout.policy={self.policy}", "true"
        )
        self.for_layers()

    def for_layers(self) -> Dropout:
        """As the layers take it."""
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
    source: CorpusName = MISSING
    dir: str | None = (
        # ptb: the folder of ptb.{train,valid,test}.txt; cornell: that of scaledata/; vader: that of its
        # snippets
        None
    )
    train: str | None = None  # text: a file
    valid: str | None = None  # text: a file
    test: str | None = None  # text: a file
    csv: str | None = None  # text_regression: a file, its columns named in the first line; or `name`
    delimiter: str | None = (
        None  # with csv: the sign between two columns, or tab; null: a comma, or in a file .tsv a tab
    )
    name: str | None = (
        None  # hub, text_regression: the data set, "owner/name", or a local folder that `datasets` can load
    )
    config: str | None = None  # hub, text_regression: one of its configurations
    revision: str | None = None  # hub, text_regression: branch, tag or commit
    column: str | None = None  # hub, text_regression: the column with the text
    rating_column: str | None = None  # text_regression: the column with the number to be predicted
    # words that the training part (task.protocol=paper: all) has less often are <unk>; text, hub, pydoc: 2
    min_count: int = 1
    vocabulary_size: int | None = (
        None  # texts with ratings: so many words, the most frequent ones, are kept; null: all
    )
    cache: str | None = (
        # folder of encoded corpora, found by content; null: none. Texts with ratings are not kept there
        "data/cache"
    )

    def __post_init__(self) -> None:
        belongs = {
            "dir": (CorpusName.ptb, CorpusName.cornell, CorpusName.vader),
            **dict.fromkeys(("train", "valid", "test"), (CorpusName.text,)),
        }
        belongs |= dict.fromkeys(
            ("name", "config", "revision", "column"), (CorpusName.hub, CorpusName.text_regression)
        )
        belongs |= dict.fromkeys(("csv", "delimiter", "rating_column"), (CorpusName.text_regression,)) | {
            "vocabulary_size": RATED
        }
        for key, sources in belongs.items():
            value = getattr(self, key)
            require(
                value is None or self.source in sources,
                f"data.{key}",
                f"unset with data={self.source}",
                value,
            )
        needed = {
            CorpusName.text: ("train", "valid", "test"),
            CorpusName.hub: ("name", "column"),
            CorpusName.text_regression: ("column", "rating_column"),
        }
        for key in needed.get(self.source, ()):
            require(bool(getattr(self, key)), f"data.{key}", f"set with data={self.source}", "nothing")
        if self.source is CorpusName.text_regression:
            require(
                bool(self.csv) != bool(self.name),
                "data.csv",
                "set with data=text_regression, or data.name",
                "both" if self.csv else "neither",
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
            fits = self.delimiter is None or (len(self.delimiter) == 1 and self.delimiter not in '"\r\n')
            require(
                fits,
                "data.delimiter",
                "one character that is no quotation mark or line end, or tab",
                repr(self.delimiter),
            )
            for key in ("config", "revision"):
                value = getattr(self, key)
                require(
                    value is None or self.csv is None,
                    f"data.{key}",
                    "null with data.csv, it is of the Hub",
                    value,
                )
        require(self.min_count >= 1, "data.min_count", "at least 1", self.min_count)
        given = self.source is CorpusName.ptb  # whose rare words are <unk> already
        require(
            not given or self.min_count == 1,
            "data.min_count",
            "1 with data=ptb, which has its own <unk>",
            self.min_count,
        )
        kept = self.vocabulary_size
        require(kept is None or kept >= 1, "data.vocabulary_size", "at least 1, or null", kept)


@dataclass
class TaskSettings:
    name: TaskName = MISSING
    batch_size: int = (
        MISSING  # columns that the training text is cut into, or sequences that are read together
    )
    bptt: int | None = None  # language_model: time steps of a chunk, through which gradients flow
    protocol: SplitProtocol | None = None  # sentiment: how texts are split, and what is reported
    chunk_words: int | None = (
        None  # sentiment: longer texts are cut into chunks of so many words; null: they are read whole
    )
    split_seed: int | None = None  # sentiment: of the order in which texts are dealt to the parts
    length_pool: int | None = (
        # sentiment: so many batches are drawn together and sorted by length, so that less padding is read
        None
    )

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "task.batch_size", "at least 1", self.batch_size)
        require(
            self.chunk_words is None or self.chunk_words >= 2,
            "task.chunk_words",
            "at least 2, or null",
            self.chunk_words,
        )
        of_sentiment, rated = ("protocol", "split_seed", "length_pool"), self.name is TaskName.sentiment
        for key in ("bptt", *of_sentiment, "chunk_words"):
            value, wanted = getattr(self, key), (key in of_sentiment) if rated else key == "bptt"
            require(value is not None or not wanted, f"task.{key}", f"set with task={self.name}", "null")
            require(
                value is None or wanted or (rated and key == "chunk_words"),
                f"task.{key}",
                f"null with task={self.name}",
                value,
            )
        require(self.bptt is None or self.bptt >= 1, "task.bptt", "at least 1", self.bptt)
        require(
            self.split_seed is None or 0 <= self.split_seed < 2**32,
            "task.split_seed",
            "in [0, 2^32)",
            self.split_seed,
        )
        require(
            self.length_pool is None or self.length_pool >= 1,
            "task.length_pool",
            "at least 1",
            self.length_pool,
        )

    @property
    def steps(self) -> int:
        """`bptt`, where it is known to be set."""
        assert self.bptt is not None
        return self.bptt


@dataclass
class Schedule:
    epochs: int = MISSING
    optimiser: OptimizerName = OptimizerName.sgd
    lr: float = MISSING  # sgd: on the scale of a loss summed over the time steps of a chunk
    decay: float = MISSING  # the learning rate is divided by it at the end of every epoch after max_epoch
    max_epoch: int = MISSING
    clip: float | None = (
        MISSING  # limit of the gradient's global norm, on the scale of the summed loss; null: none
    )
    # sgd: w ← (1 - weight_decay)·w after each step, not multiplied by lr; adam: weight_decay·w in the
    # gradient
    weight_decay: float = 0.0
    patience: int | None = (
        # stop after so many epochs without a better validation, report the best epoch; null: run to the end
        None
    )

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "schedule.epochs", "at least 1", self.epochs)
        require(0 < self.lr < FLOAT32_LIMIT, "schedule.lr", "above 0", self.lr)
        require(1 <= self.decay < math.inf, "schedule.decay", "at least 1", self.decay)
        require(self.max_epoch >= 0, "schedule.max_epoch", "at least 0", self.max_epoch)
        require(self.clip is None or self.clip > 0, "schedule.clip", "above 0, or null", self.clip)
        require(0 <= self.weight_decay < 1, "schedule.weight_decay", "in [0, 1)", self.weight_decay)
        require(
            self.patience is None or self.patience >= 1,
            "schedule.patience",
            "at least 1, or null",
            self.patience,
        )

    @property
    def max_grad_norm(self) -> float:
        return math.inf if self.clip is None else self.clip


@dataclass
class Checkpoints:
    minutes: float = (
        5.0  # of training between two of them; there are those at the end of epochs and at a signal besides
    )
    # one at the end of every so many epochs, of the last, and of the best so far where that is the one that
    # is reported
    epochs: int = 1

    def __post_init__(self) -> None:
        require(
            self.minutes > 0,
            "checkpoint.minutes",
            "above 0 (inf: at the end of epochs and at a signal only)",
            self.minutes,
        )
        require(self.epochs >= 1, "checkpoint.epochs", "at least 1", self.epochs)


@dataclass
class StartCheck:
    """Language models: a run whose start is stuck ends, as it will not recover."""

    steps: int | None = None  # after which the start is judged, at most those of an epoch; null: never
    loss: float = (
        7.0  # nats a word; the start is stuck where the mean of the last quarter of these steps is above it
    )

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, "stuck.steps", "at least 1, or null", self.steps)
        require(0 < self.loss < math.inf, "stuck.loss", "above 0", self.loss)


@dataclass
class Published:
    """The row of a published table that runs of an experiment are set beside."""

    row: str = MISSING
    source: str | None = None  # null: nothing published compares
    confirmed: bool = False  # whether from a copy of the paper itself
    same_settings: bool = (
        True  # whether its settings are those of the experiment, so that a difference says something
    )
    mc_samples: int = 0  # passes of MC dropout that it is evaluated with; 0: the standard approximation
    members: int = 1  # runs, of seeds 1, 2, … without stuck ones, whose probabilities are averaged
    valid: float | None = (
        None  # perplexity as the authors' code computes it: compares with valid_ppl_as_published
    )
    valid_deviation: float | None = None
    test: float | None = None  # perplexity
    test_deviation: float | None = None
    words_per_second: float | None = None  # on a GPU of 2015

    def __post_init__(self) -> None:
        require(bool(self.row.strip()), "published.row", "a name", repr(self.row))
        require(self.mc_samples >= 0, "published.mc_samples", "at least 0", self.mc_samples)
        require(self.members >= 1, "published.members", "at least 1", self.members)


NOT_IN_IDENTITY = (
    "checkpoint",
    "stuck",
    "published",
    "seed",
    "outputs",
    "log_every",
    "force",
)  # in no identity


@dataclass
class Train:
    model: Model = MISSING
    dropout: DropoutSettings = MISSING
    data: Data = MISSING
    task: TaskSettings = MISSING
    schedule: Schedule = MISSING
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    stuck: StartCheck = field(default_factory=StartCheck)
    published: Published | None = None  # of an experiment: what vdrop table prints beside it
    seed: int = 1  # of the parameters' start and of every mask
    device: str = "auto"  # auto (CUDA if there is one), cpu, cuda, cuda:1, …
    backend: Backend = Backend.auto
    precision: Precision = Precision.auto  # in which matrix products are multiplied
    outputs: str = "outputs"  # folder under which the run folder is made
    log_every: int = 20  # steps between two step records in log.jsonl and in TensorBoard
    force: bool = False  # start over, even where a finished or interrupted run of the same settings lies

    def __post_init__(self) -> None:
        require(0 <= self.seed < SEED_LIMIT, "seed", "in [0, 2^63)", self.seed)
        require(self.log_every >= 1, "log_every", "at least 1", self.log_every)
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
        unchosen = self.task.protocol is SplitProtocol.paper and self.schedule.patience is not None
        judged = self.task.name is TaskName.language_model or self.stuck.steps is None
        require(judged, "stuck.steps", f"null with task={self.task.name}", self.stuck.steps)
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

    def numbers(self) -> dict[str, Any]:
        """The settings that change them, but the seed; those of data and machine, too."""
        return {key: value for key, value in plain(self).items() if key not in NOT_IN_IDENTITY}

    def identity(self, corpus_fingerprint: str) -> str:
        """Eight hex digits of all that changes the numbers, the seed excepted: the corpus by its content, no
        folders, no logging.

        What is as its field has it by default is left out, so that settings can come that are of no concern
        to older runs; so a default that stands in this file is never to be changed. Device, back end and
        precision are to be those that `auto` has come to; of several GPUs of a machine it makes no difference
        which.
        """
        one = replace(self, device=self.device.partition(":")[0])
        told = {key: value for key, value in without_defaults(one).items() if key not in NOT_IN_IDENTITY} | {
            "data": corpus_fingerprint
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
