"""The settings of every other command, typed."""

import dataclasses
import re
import shlex
from dataclasses import dataclass, field, replace

from vdrop_cli.errors import ConfigError, require
from vdrop_cli.policies import Cell
from vdrop_cli.settings.choices import (
    TABLE_1,
    Backend,
    BenchCell,
    BenchPart,
    CorpusName,
    Pictures,
    Precision,
    Size,
    SplitProtocol,
)
from vdrop_cli.settings.fields import SEED_LIMIT
from vdrop_cli.settings.train import Data, Train

MOST_SEEDS = 1000  # of one row


MOST_JOBS = 1000


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
    protocols: list[SplitProtocol] = field(default_factory=lambda: list(SplitProtocol))
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
        if one in moved and trained.source is CorpusName.text_regression:
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
