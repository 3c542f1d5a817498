"""Every setting of every command, typed: its unit, its limits, its source. No torch here, so that help and
errors are quick.
"""

import dataclasses
import hashlib
import json
import math
import re
import shlex
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, get_args

from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import MISSING, DictConfig, OmegaConf

from vdrop_cli.policies import PLACES, Cell, Choice, Dropout, Policy, Tie, WordMask


class ConfigError(CompactHydraException):
    """A mistake of the user's: one line that names the setting or the file and says what to do. Exit code
    2.
    """


class RunError(CompactHydraException):
    """What stops a run through no mistake in its settings: one line. Exit code 1."""


class Size(Choice):
    small = "small"
    medium = "medium"
    large = "large"
    sentiment = "sentiment"  # the experiments on film reviews


TABLE_1 = [Size.small, Size.medium, Size.large]  # the sizes of language models


class TaskName(Choice):
    language_model = "language_model"
    sentiment = "sentiment"


class Protocol(Choice):
    paper = (
        "paper"  # chunks, 80/20, no validation set: chunks of the text at the border may lie on both sides
    )
    clean = "clean"  # split by text, 70/10/20; the mean over a text's chunks; the best epoch on validation


class Descent(Choice):
    sgd = "sgd"
    adam = "adam"


class Source(Choice):
    ptb = "ptb"
    pydoc = "pydoc"
    text = "text"
    hub = "hub"
    cornell = "cornell"
    vader = "vader"
    text_regression = "text_regression"


RATED = (Source.cornell, Source.vader, Source.text_regression)  # texts with a number each


class Backend(Choice):
    auto = "auto"
    reference = "reference"
    fused = "fused"
    native = "native"
    triton = "triton"


class Precision(Choice):
    auto = "auto"  # bf16 where the processor has instructions for it
    fp32 = "fp32"
    bf16 = "bf16"  # all matrix products but the forward logits; states, gates, losses and weights stay fp32


INTEGER_LIMIT = 2**31 - 1  # of every whole number but the seeds
LIMITS = {"layers": 1000, "mc_samples": 10**6, "mc_batch": 10**6}  # of some, which would take for ever
SEEDS = ("seed", "split_seed")  # which have limits of their own
NAME_LIMIT = 100  # bytes of a name that becomes part of a folder's name
PATH_LIMIT, PART_LIMIT = 3000, 255  # bytes of a path, to which names are added; and of a name in it
PATHS = (
    "checkpoint",
    "members",
    "outputs",
    "file",
    "csv",
    "latex",
    "dir",
    "train",
    "valid",
    "test",
    "cache",
    "name",
)
FLOAT32_LIMIT = 3e38  # what is larger is infinite in the arithmetic


def require_name(key: str, name: str) -> None:
    """It becomes part of a folder's name."""
    require(re.fullmatch(r"\w[\w.-]*", name) is not None, key, "letters, digits, _ . and -", repr(name))
    require(
        len(name.encode()) <= NAME_LIMIT, key, f"at most {NAME_LIMIT} bytes long", f"{len(name.encode())}"
    )


def require(holds: bool, key: str, wanted: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{key} must be {wanted}, got {got}")


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
    source: Source = MISSING
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
            "dir": (Source.ptb, Source.cornell, Source.vader),
            **dict.fromkeys(("train", "valid", "test"), (Source.text,)),
        }
        belongs |= dict.fromkeys(
            ("name", "config", "revision", "column"), (Source.hub, Source.text_regression)
        )
        belongs |= dict.fromkeys(("csv", "delimiter", "rating_column"), (Source.text_regression,)) | {
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
            Source.text: ("train", "valid", "test"),
            Source.hub: ("name", "column"),
            Source.text_regression: ("column", "rating_column"),
        }
        for key in needed.get(self.source, ()):
            require(bool(getattr(self, key)), f"data.{key}", f"set with data={self.source}", "nothing")
        if self.source is Source.text_regression:
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
        given = self.source is Source.ptb  # whose rare words are <unk> already
        require(
            not given or self.min_count == 1,
            "data.min_count",
            "1 with data=ptb, which has its own <unk>",
            self.min_count,
        )
        kept = self.vocabulary_size
        require(kept is None or kept >= 1, "data.vocabulary_size", "at least 1, or null", kept)


@dataclass
class Task:
    name: TaskName = MISSING
    batch_size: int = (
        MISSING  # columns that the training text is cut into, or sequences that are read together
    )
    bptt: int | None = None  # language_model: time steps of a chunk, through which gradients flow
    protocol: Protocol | None = None  # sentiment: how texts are split, and what is reported
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
    optimiser: Descent = Descent.sgd
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
    def clipped_at(self) -> float:
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


SEED_LIMIT = 2**63
DEPTH = 4  # of groups of settings within each other, at most
NO_NUMBERS = (
    "checkpoint",
    "stuck",
    "published",
    "seed",
    "outputs",
    "log_every",
    "force",
)  # in no identity
MOST_SEEDS = 1000  # of one row
MOST_JOBS = 1000


@dataclass
class Train:
    model: Model = MISSING
    dropout: DropoutSettings = MISSING
    data: Data = MISSING
    task: Task = MISSING
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
        others = [other.name for other in Source if (other in RATED) != rated]
        require(suits, "data", f"one of {', '.join(others)} with task={self.task.name}", source)
        unchosen = self.task.protocol is Protocol.paper and self.schedule.patience is not None
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
        return self.schedule.patience is not None or self.task.protocol is Protocol.clean

    def numbers(self) -> dict[str, Any]:
        """The settings that change them, but the seed; those of data and machine, too."""
        return {key: value for key, value in plain(self).items() if key not in NO_NUMBERS}

    def identity(self, corpus_fingerprint: str) -> str:
        """Eight hex digits of all that changes the numbers, the seed excepted: the corpus by its content, no
        folders, no logging.

        What is as its field has it by default is left out, so that settings can come that are of no concern
        to older runs; so a default that stands in this file is never to be changed. Device, back end and
        precision are to be those that `auto` has come to; of several GPUs of a machine it makes no difference
        which.
        """
        one = replace(self, device=self.device.partition(":")[0])
        told = {key: value for key, value in without_defaults(one).items() if key not in NO_NUMBERS} | {
            "data": corpus_fingerprint
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


@dataclass
class Place:
    """Where the corpus of a checkpoint lies. Places that the checkpoint names are used only with
    `stored_data`.
    """

    dir: str | None = None  # ptb, cornell, vader
    train: str | None = None  # text
    valid: str | None = None  # text
    test: str | None = None  # text
    csv: str | None = None  # text_regression
    name: str | None = None  # hub, text_regression


@dataclass
class Eval:
    checkpoint: str | None = None  # a checkpoint file or a run folder
    data: Place = field(default_factory=Place)
    stored_data: bool = (
        False  # read the data from the files, folders or data sets that the checkpoint itself names
    )
    mc_samples: int = 0  # passes of MC dropout; 0: the standard approximation only
    mc_batch: int | None = (
        None  # passes of a language model that run together, as one batch; null: 50 on the CPU, 500 on a GPU
    )
    save_minutes: float = 5.0  # of MC evaluation after which what is done is saved; it is at a signal besides
    members: list[str] = field(
        default_factory=list
    )  # more checkpoints, whose probabilities or ratings are averaged with those of `checkpoint`
    word_dropout: bool | None = (
        # keep word dropout on in MC passes; null: as the authors, off for language models, on for ratings
        None
    )
    seed: int = 1  # of the MC passes' masks
    device: str = "auto"
    backend: Backend = Backend.auto
    precision: Precision | None = None  # null: that of the training

    def __post_init__(self) -> None:
        require(
            bool(self.checkpoint),
            "checkpoint",
            "a checkpoint file or a run folder (vdrop eval checkpoint=…)",
            "nothing",
        )
        require(self.mc_samples >= 0, "mc_samples", "at least 0", self.mc_samples)
        require(
            self.mc_samples > 0 or self.word_dropout is None,
            "word_dropout",
            "null without mc_samples, which it is for",
            self.word_dropout,
        )
        require(
            self.mc_samples == 0 or not self.members,
            "members",
            "empty with mc_samples, which is of one model",
            len(self.members),
        )
        require(self.mc_batch is None or self.mc_batch >= 1, "mc_batch", "at least 1, or null", self.mc_batch)
        require(self.save_minutes > 0, "save_minutes", "above 0 (inf: at a signal only)", self.save_minutes)
        require(0 <= self.seed < SEED_LIMIT, "seed", "in [0, 2^63)", self.seed)


@dataclass
class Predict:
    checkpoint: str | None = None  # a checkpoint file or a run folder
    text: str | None = None  # to predict from
    file: str | None = None  # with one text a line; null, and no text: standard input
    data: Place = field(
        default_factory=Place
    )  # of checkpoints of older versions, which do not hold what is needed of it
    mc_samples: int | None = (
        None  # passes of MC dropout behind a rating; null: 50, 0 of a model without dropout
    )
    level: float | None = None  # per cent of ratings that the interval is to hold; null: 95
    surprises: int | None = (
        None  # a language model: so many words of a text, those that it expects least; null: 5
    )
    sample: int = 0  # a language model: write so many words
    json: bool = False  # a JSON object a line instead of a table
    seed: int = 1  # of the passes' masks, or of the words drawn
    device: str = "auto"
    backend: Backend = Backend.auto
    precision: Precision | None = None  # null: that of the training

    def __post_init__(self) -> None:
        require(
            bool(self.checkpoint),
            "checkpoint",
            "a checkpoint file or a run folder (vdrop predict checkpoint=…)",
            "nothing",
        )
        require(self.text is None or self.file is None, "file", "null with text=…", self.file)
        require(
            self.text is None or bool(self.text.strip()), "text", "a text with words in it", repr(self.text)
        )
        require(
            self.sample == 0 or self.file is None,
            "file",
            "null with sample=…, which continues text=…",
            self.file,
        )
        require(
            self.mc_samples is None or self.mc_samples >= 0,
            "mc_samples",
            "at least 0, or null",
            self.mc_samples,
        )
        require(self.level is None or 0 < self.level < 100, "level", "in (0, 100), or null", self.level)
        require(
            self.surprises is None or self.surprises >= 1, "surprises", "at least 1, or null", self.surprises
        )
        require(self.sample >= 0, "sample", "at least 0", self.sample)
        require(self.sample == 0 or self.surprises is None, "surprises", "null with sample=…", self.surprises)
        require(0 <= self.seed < SEED_LIMIT, "seed", "in [0, 2^63)", self.seed)


@dataclass
class Export:
    checkpoint: str | None = None  # a checkpoint file or a run folder
    file: str | None = None  # to write; null: beside the checkpoint, with the ending .safetensors

    def __post_init__(self) -> None:
        require(
            bool(self.checkpoint),
            "checkpoint",
            "a checkpoint file or a run folder (vdrop export checkpoint=…)",
            "nothing",
        )


class BenchPart(Choice):
    step = "step"  # a whole training step of the language model
    layer = "layer"  # forward and backward of one layer
    mc = (
        "mc"  # MC evaluation; only cells with dropout. On a GPU latency bounds it, and not the products' rate
    )
    checkpoint = "checkpoint"  # writing one, to the disk of `outputs`; only variational
    ratings = "ratings"  # a whole training step of the model of ratings, of the size `sentiment`
    # forward and backward of a layer of one direction and of a bidirectional one, LSTM and GRU
    directions = "directions"
    # one step of a cell at batch 1, forward, without gradients, in fp32; `sentiment` has 128 units
    cell_step = "cell_step"


class BenchCell(Choice):
    none = "none"
    zaremba = "zaremba"
    naive = "naive"
    variational = "variational"
    variational_untied = "variational_untied"
    fused = "fused"  # variational with backend=fused
    # nothing but the matrix products of a step, at their own shapes: what the rest costs is the difference
    products = "products"
    torch_lstm = "torch_lstm"  # torch.nn.LSTM, without dropout
    cell_loop = (
        "cell_loop"  # a loop over nn.LSTMCell, with masks on inputs and recurrence as those of variational
    )
    keras = "keras"  # its LSTM with dropout and recurrent_dropout, in fp32; where it is installed
    bidirectional = "bidirectional"  # a variational LSTM of two directions; only in `directions`
    gru = "gru"  # a variational GRU; only in `directions` and `cell_step`
    bidirectional_gru = "bidirectional_gru"  # the same of two directions; only in `directions`
    torch_gru = "torch_gru"  # torch.nn.GRUCell; only in `cell_step`


@dataclass
class Bench:
    sizes: list[Size] = field(default_factory=lambda: list(Size))
    parts: list[BenchPart] = field(default_factory=lambda: list(BenchPart))
    cells: list[BenchCell] | None = None  # null: all, keras where it is installed
    precisions: list[Precision] = field(
        default_factory=lambda: [Precision.fp32, Precision.bf16]
    )  # rivals: bf16 by autocast
    # times that every case is started anew: where in memory a process comes to lie makes it faster or slower
    starts: int = 3
    turns: int = (
        5  # of each case in each start, one after the other; medians are over the turns of all starts
    )
    mc_passes: int = 64  # that run together
    device: str = "auto"  # auto (CUDA if there is one), cpu, cuda, cuda:1, …
    rivals_ready: bool = False  # give the rivals, too, this project's allocator settings and fp32 library
    outputs: str = "outputs"  # folder under which bench/ is made

    def __post_init__(self) -> None:
        for key in ("sizes", "parts", "cells", "precisions"):
            values = getattr(self, key)
            require(values is None or len(values) > 0, key, "a list with something in it", "[]")
            require(
                values is None or len(set(values)) == len(values),
                key,
                "a list that names nothing twice",
                [str(v) for v in values or ()],
            )
        require(Precision.auto not in self.precisions, "precisions", "a list of fp32 and bf16", "auto")
        require(self.starts >= 1, "starts", "at least 1", self.starts)
        require(self.turns >= 1, "turns", "at least 1", self.turns)
        require(self.mc_passes >= 1, "mc_passes", "at least 1", self.mc_passes)


@dataclass
class ListData:
    data: Data | None = (
        # a corpus to load (fetching it if need be) and check; null: a look at those that need no settings
        None
    )


class Pictures(Choice):
    png = "png"
    svg = "svg"
    none = "none"


@dataclass
class Table:
    sizes: list[Size] = field(default_factory=lambda: list(TABLE_1))
    rows: list[str] | None = (
        None  # none, moon, moon_word, zaremba, variational, variational_mc, untied, untied_mc, …; null: all
    )
    overrides: str = (
        ""  # settings that the runs of all rows were changed in: "schedule.epochs=1 task.bptt=20"
    )
    # folder of the runs and records that are read, and of pictures and records that are written
    outputs: str = "outputs"
    file: str | None = None  # to write; null: RESULTS.md of the checkout, for other outputs in their folder
    csv: str | None = None  # a file to write the same numbers to, in full
    latex: str | None = None  # a file to write the tables to, as tabular environments
    pictures: Pictures = Pictures.png
    record: bool = False  # copy what is small of the runs that are found to outputs/record

    def __post_init__(self) -> None:
        require_rows(self.sizes, self.rows)


@dataclass
class Reproduce:
    sizes: list[Size] = field(default_factory=lambda: [Size.medium])
    rows: list[str] | None = None  # as of vdrop table
    seeds: int = 1  # of each row: 1, 2, …
    overrides: str = ""  # settings to change in all rows, which then are no longer the published ones
    precision: Precision = Precision.auto
    mc_batch: int | None = None  # as of vdrop eval
    launcher: str | None = (
        # of the runs, with its settings: "submitit_slurm hydra.launcher.timeout_min=600"; null: see jobs
        None
    )
    jobs: int = 1  # runs at once, side by side on the one device; 1: one after the other
    until: str | None = (
        None  # time after which everything is stopped and saved, as 25min, 2h or 1h30min; null: to the end
    )
    outputs: str = "outputs"
    file: str | None = None  # to write when all is done; null: as of vdrop table
    plan: bool = False  # only tell what there is to do, and how long it takes

    def __post_init__(self) -> None:
        require_rows(self.sizes, self.rows)
        require_launching(self)
        require(1 <= self.seeds <= MOST_SEEDS, "seeds", f"in [1, {MOST_SEEDS}]", self.seeds)
        require(self.mc_batch is None or self.mc_batch >= 1, "mc_batch", "at least 1, or null", self.mc_batch)


@dataclass
class Figures:
    protocols: list[Protocol] = field(default_factory=lambda: list(Protocol))
    cells: list[Cell] = field(default_factory=lambda: list(Cell))
    dropouts: list[str] = field(default_factory=lambda: ["none", "naive", "variational"])
    epochs: int = 60  # of each run; the authors' are 250 (variational LSTM) and 1,250
    seeds: int = 1  # of each run: 1, 2, …
    mc_samples: int = 50  # passes of MC dropout that runs with dropout are evaluated with
    overrides: str = ""  # settings to change in all runs
    precision: Precision = Precision.auto
    launcher: str | None = None  # as of vdrop reproduce
    jobs: int = 1  # as of vdrop reproduce
    until: str | None = None  # as of vdrop reproduce
    outputs: str = "outputs"
    file: str | None = None  # to write when all is done; null: as of vdrop table
    plan: bool = False  # only tell what there is to do, and how long it takes

    def __post_init__(self) -> None:
        for name in ("protocols", "cells", "dropouts"):
            values = [str(value) for value in getattr(self, name)]
            require(len(values) > 0, name, "a list with something in it", "[]")
            require(len(set(values)) == len(values), name, "a list that names nothing twice", values)
        require_launching(self)
        require(1 <= self.seeds <= MOST_SEEDS, "seeds", f"in [1, {MOST_SEEDS}]", self.seeds)
        for name in ("epochs", "mc_samples"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


def require_launching(settings: Reproduce | Figures) -> None:
    require_command_words("launcher", settings.launcher or "")
    require(1 <= settings.jobs <= MOST_JOBS, "jobs", f"in [1, {MOST_JOBS}]", settings.jobs)
    require(
        settings.jobs == 1 or not settings.launcher,
        "jobs",
        "1 where launcher is set, which has a number of its own",
        settings.jobs,
    )
    if settings.until is not None:
        seconds(settings.until)


def seconds(until: str) -> int:
    """Of a time such as 25min, 2h or 1h30min. Raises ConfigError."""
    parts = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})min)?(?:(\d{1,6})s)?", until, re.ASCII)
    hours, minutes, rest = (int(part or 0) for part in parts.groups()) if parts else (0, 0, 0)
    found = 3600 * hours + 60 * minutes + rest
    require(found > 0, "until", "a time such as 25min, 2h or 1h30min, or null", repr(until))
    return found


def require_command_words(key: str, text: str) -> None:
    """It is read as a shell reads a line of words."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{key} must be words as in a shell, got {text} ({error})") from None


def require_rows(sizes: list[Size], rows: list[str] | None) -> None:
    for name, values in (("sizes", sizes), ("rows", rows)):
        require(values is None or len(values) > 0, name, "a list with something in it", "[]")


ROOTS: dict[str, type] = {
    "train": Train,
    "eval": Eval,
    "predict": Predict,
    "data": ListData,
    "export": Export,
    "bench": Bench,
    "table": Table,
    "reproduce": Reproduce,
    "figures": Figures,
}
Root = TypeVar("Root")


def register() -> None:
    """Makes the typed roots and the resolvers `by_size` and `by_source` known to Hydra."""
    for command, root in ROOTS.items():
        ConfigStore.instance().store(name=f"{command}_schema", node=root)
    OmegaConf.register_new_resolver("by_size", by_size, replace=True)
    OmegaConf.register_new_resolver("by_source", by_source, replace=True)


def by_size(table: DictConfig, *, _root_: DictConfig) -> Any:
    """`${by_size:{small:…,medium:…,large:…}}` in a YAML file: the value published for the size of the chosen
    model.
    """
    size = str(_root_.model.size)
    if size not in table:
        raise ConfigError(
            f"nothing is published for model.size={size} there, only for {', '.join(map(str, table))}; set "
            "it, or choose another model"
        )
    return table[size]


def by_source(table: dict[str, Any], *, _root_: DictConfig) -> Any:
    """`${by_source:{cornell:…,other:…}}` in a YAML file: the value for the source of the chosen data, or for
    all others.
    """
    return table.get(str(OmegaConf.select(_root_, "data.source")), table["other"])


def parse(config: DictConfig, root: type[Root]) -> Root:
    """The configuration as typed objects, every value checked."""
    parsed = OmegaConf.to_object(config)
    assert isinstance(parsed, root)
    refuse_unknown(parsed, "")
    require_within_limits(parsed, "")
    return parsed


def refuse_unknown(node: Any, prefix: str) -> None:
    """Hydra's `+key=value` writes past the schema; what no field reads is refused here."""
    known = {f.name for f in dataclasses.fields(node)}
    for key, value in vars(node).items():
        if key not in known:
            raise ConfigError(
                f"{prefix}{key} is not a "
                f"setting{nearest(prefix + key, [prefix + name for name in sorted(known)])}"
            )
        if dataclasses.is_dataclass(value):
            refuse_unknown(value, f"{prefix}{key}.")


def require_within_limits(node: Any, prefix: str) -> None:
    """That numbers and paths are of a size that the machine can hold."""
    for f in dataclasses.fields(node):
        value, key = getattr(node, f.name), prefix + f.name
        if dataclasses.is_dataclass(value):
            require_within_limits(value, f"{key}.")
        elif isinstance(value, int) and not isinstance(value, bool) and f.name not in SEEDS:
            limit = LIMITS.get(f.name, INTEGER_LIMIT)
            require(value <= limit, key, f"at most {limit:,}", value if value < 10**30 else "a larger number")
        elif f.name in PATHS:
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, str):
                    require_path(key, path)


def require_path(key: str, path: str) -> None:
    content = path.encode(errors="surrogatepass")
    longest = max(map(len, content.split(b"/")))
    require("\0" not in path, key, "a path", "one with a NUL in it")
    require(
        len(content) <= PATH_LIMIT and longest <= PART_LIMIT,
        key,
        f"a path of at most {PATH_LIMIT:,} bytes, and {PART_LIMIT} in each name",
        f"{len(content):,} and {longest:,}",
    )


def nearest(word: str, known: list[str]) -> str:
    """A hint for a mistyped word, ready to be appended to a message."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"


def types(root: type, prefix: str = "") -> dict[str, Any]:
    """The type of every setting below a typed root, by its full name as written on the command line."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(root):
        inner = [
            t for t in (f.type, *get_args(f.type)) if isinstance(t, type) and dataclasses.is_dataclass(t)
        ]
        found |= types(inner[0], f"{prefix}{f.name}.") if inner else {prefix + f.name: f.type}
    return found


def keys(root: type, prefix: str = "") -> list[str]:
    """The full name of every setting below a typed root."""
    return list(types(root, prefix))


def plain(config: Any) -> dict[str, Any]:
    """The configuration as dicts, strings and numbers, to be written down."""
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)  # type: ignore[assignment]
    require_plain(values)
    return values


def require_plain(values: Any) -> None:
    """Raises ConfigError unless these are groups of texts, numbers and nulls, and nothing in them that
    OmegaConf would resolve.
    """
    groups, seen = [("", values)], set[int]()
    for prefix, group in groups:  # which grows
        where = prefix.removesuffix(".") or "the configuration"
        require(
            isinstance(group, dict) and id(group) not in seen,
            where,
            "a group of settings of its own",
            type(group).__name__,
        )
        require(prefix.count(".") <= DEPTH, where, f"at most {DEPTH} groups deep", "more")
        seen.add(id(group))
        for key, value in group.items():
            require(
                isinstance(key, str) and re.fullmatch(r"\w+", key) is not None,
                where,
                "of settings with names",
                ascii(key)[:80],
            )
            if isinstance(value, dict):
                groups.append((f"{prefix}{key}.", value))
                continue
            for one in value if isinstance(value, list) else [value]:
                require(
                    isinstance(one, str | int | float | None),
                    f"{prefix}{key}",
                    "a text, a number or null",
                    type(one).__name__,
                )
                require(
                    not isinstance(one, str) or "${" not in one,
                    f"{prefix}{key}",
                    "a text without ${",
                    ascii(one)[:80],
                )


def without_defaults(settings: Any) -> dict[str, Any]:
    """Nested settings as plain values, without those that are as their fields have them by default."""
    told: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            told[f.name] = without_defaults(value)
        elif value != f.default:
            told[f.name] = value.name if isinstance(value, Choice) else value
    return told


def restore(values: dict[str, Any]) -> Train:
    """The configuration of a training run from what `plain` wrote down. It is data: nothing in it is
    resolved.

    Raises ConfigError, or what OmegaConf raises, where it is something else.
    """
    require_plain(values)
    return parse(OmegaConf.merge(OmegaConf.structured(Train), values), Train)  # type: ignore[arg-type]


def stored_places(data: Data) -> dict[str, str]:
    """Of a training run's data, the settings that say where it lies: files, folders and data sets, by their
    names.
    """
    values = {name: getattr(data, name) for name in (f.name for f in dataclasses.fields(Place))}
    return {name: value for name, value in values.items() if value is not None}


def data_for(trained: Data, given: Place, stored_data: bool, where: str, otherwise: str) -> Data:
    """The data of a checkpoint as it is to be read now. Places that a checkpoint names are used only where
    `stored_data` allows that.

    `where` and `otherwise` are for the message: the checkpoint, and the alternative to giving the places
    again.
    """
    moved = {name: value for name, value in vars(given).items() if value is not None}
    for one, other in (("csv", "name"), ("name", "csv")):
        if one in moved and trained.source is Source.text_regression:
            moved.setdefault(other, None)
    if moved.get("csv"):
        moved |= {"config": None, "revision": None}
    elif moved.get("name"):
        moved |= {"delimiter": None}
    used = {name: value for name, value in stored_places(trained).items() if name not in moved}
    if used and not stored_data:
        names = " ".join(f"data.{name}=…" for name in used)
        held = ", ".join(f"data.{name}={value!r}" for name, value in used.items())
        raise ConfigError(
            f"{where} names its own data, {held}, which is not used unasked; give {names}, or {otherwise}"
        )
    return replace(trained, **moved, cache=None if trained.cache is None else Data.cache)
