"""The settings of every command but `train`."""

import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from vdrop_cli.errors import ConfigError, require
from vdrop_cli.policies import Cell
from vdrop_cli.settings.choices import (
    Backend,
    BenchCell,
    BenchPart,
    BenchSize,
    InputFormat,
    Interval,
    OutputFormat,
    Pictures,
    Precision,
    Size,
    SplitProtocol,
    StudyName,
    TaskName,
)
from vdrop_cli.settings.data import CORPORA, Data, delimiter_sign
from vdrop_cli.settings.data_places import DataPlaces
from vdrop_cli.settings.fields import (
    FLOAT32_LIMIT,
    POSITIVE,
    FilePath,
    FolderName,
    FolderPath,
    Items,
    Limits,
    require_limits,
    setting,
)
from vdrop_cli.settings.train import DEVICE_HELP, MC_SAMPLES, SEED, Train
from vdrop_cli.settings.variants import group_field

POSITIVE_SAMPLES = Limits(at_least=1, at_most=10**6)
SEEDS = Limits(at_least=1, at_most=1000)
JOBS = Limits(at_least=1, at_most=1000)
CHECKPOINT_HELP = "a checkpoint file or a run folder"
MODEL_HELP = f"{CHECKPOINT_HELP}, or what vdrop export wrote"
PRECISION_HELP = "of matrix products; null: that of the training"
REPOSITORY = r"[\w.-]+/[\w.-]+"
OUTPUTS_HELP = "folder of runs, pictures and records"
MC_SETTINGS = ("mc_batch", "save_minutes", "word_dropout", "seed")  # of `vdrop eval`, for MC samples alone


@dataclass
class Eval:
    checkpoint: str | None = setting(None, MODEL_HELP, limits=FilePath())
    data: DataPlaces = setting(DataPlaces, "where the corpus of the checkpoint lies")
    stored_data: bool = setting(
        False, "read the data from the files, folders or data sets that the checkpoint itself names"
    )
    file: str | None = setting(
        None,
        "language model: a text file to evaluate in place of the test part, without the corpus; its metrics "
        "begin with file_",
        limits=FilePath(),
    )
    mc_samples: int = setting(0, "MC samples; 0: the standard approximation only", "samples", MC_SAMPLES)
    mc_batch: int | None = setting(
        None,
        "MC samples of a language model that run as one batch; null: 50 on the CPU, 500 on a GPU, 1 with "
        "dropout.p_weight",
        "samples",
        POSITIVE_SAMPLES,
    )
    save_minutes: float = setting(
        5.0,
        "time between two saves of the MC samples that are done; inf: at a signal only",
        "minutes",
        Limits(above=0),
    )
    members: list[str] = setting(
        [],
        "more checkpoints, to average their probabilities or ratings with those of checkpoint",
        "",
        FilePath(),
    )
    word_dropout: bool | None = setting(
        None, "word dropout in MC samples; null: as the authors, off for language models, on for ratings"
    )
    interval: Interval | None = setting(None, "ratings: the kind of interval to print; null: every kind")
    calibration: bool = setting(
        False, "language model: measure how sure it is of the next word; ratings always have such measures"
    )
    tempered: bool = setting(
        False,
        "language model: choose the temperature of the softmax on the validation text, and measure both "
        "texts with it; a result of its own beside the plain one",
    )
    dropout_factors: list[float] = setting(
        [],
        "language model: multiply all dropout probabilities of MC samples by the one of these factors that "
        "is the best on the validation text; a result of its own beside the plain one",
        limits=Limits(above=0, below=math.inf),
    )
    picture: str | None = setting(
        None, "a file for a picture of the results: .png, .svg or .pdf", limits=FilePath()
    )
    seed: int = setting(1, "seed of the masks of MC samples", limits=SEED)
    device: str = setting("auto", DEVICE_HELP)
    backend: Backend = setting(Backend.auto, "implementation of the cells; auto: the fastest on the device")
    precision: Precision | None = setting(None, PRECISION_HELP)

    def __post_init__(self) -> None:
        require_limits(self)
        require_checkpoint("eval", self.checkpoint)
        for name in MC_SETTINGS:
            default = getattr(type(self), name)
            value, text = getattr(self, name), "null" if default is None else f"{default:g}"
            is_used = self.mc_samples > 0 or value == default
            require(is_used, name, f"{text} without mc_samples, which it is for", value)
        for name in ("mc_samples", "members", "calibration", "picture", "file"):
            value = getattr(self, name)
            require(not (self.tempered and value), "tempered", f"false with {name}", "true")
        factors = ", ".join(map(str, self.dropout_factors))
        for name in ("tempered", "members", "calibration", "picture", "file"):
            value = getattr(self, name)
            require(not (self.dropout_factors and value), "dropout_factors", f"empty with {name}", factors)
        require(
            not self.dropout_factors or self.mc_samples > 0,
            "dropout_factors",
            "empty without mc_samples, which they are for",
            factors,
        )
        require(
            len(set(self.dropout_factors)) == len(self.dropout_factors),
            "dropout_factors",
            "factors that differ",
            factors,
        )
        if self.file is not None:
            require(not self.stored_data, "stored_data", "false with file, which needs no corpus", "true")
            for name, value in vars(self.data).items():
                require(value is None, f"data.{name}", "null with file, which needs no corpus", value)
        require(
            not self.calibration or not self.members,
            "members",
            "empty with calibration, which is of one model",
            len(self.members),
        )


PREDICT_SAMPLES = 50  # of MC dropout, where the settings leave it open


@dataclass
class Predict:
    checkpoint: str | None = setting(None, MODEL_HELP, limits=FilePath())
    text: str | None = setting(None, "the text to predict from")
    file: str | None = setting(None, "a file of texts; null, and no text: standard input", limits=FilePath())
    input: InputFormat | None = setting(
        None, "format of file or standard input; null: by the file's ending, else one text per line"
    )
    column: str | None = setting(None, "input=csv, tsv or jsonl: the column of the texts; null: text")
    delimiter: str | None = setting(None, "input=csv: the character between columns, or tab; null: a comma")
    data: DataPlaces = setting(
        DataPlaces,
        "where the corpus lies, for checkpoints that lack what prediction needs of it (within an epoch: the "
        "noise of ratings)",
    )
    mc_samples: int | None = setting(
        None,
        "MC samples of a rating, of each member, or of a text's words; null: 50 of a rating, 0 with members, "
        "for a model without dropout and of a language model",
        "samples",
        MC_SAMPLES,
    )
    members: list[str] = setting(
        [], "ratings: more checkpoints, whose passes are averaged with those of checkpoint", "", FilePath()
    )
    interval: Interval | None = setting(
        None, "ratings: the kind of interval; null: gaussian; conformal needs a vdrop eval before"
    )
    level: float | None = setting(
        None,
        "share of ratings that the interval is meant to contain; null: 95",
        "per cent",
        Limits(at_least=1, below=100),
    )
    surprises: int | None = setting(
        None, "language model: number of words shown, the most surprising ones; null: 5", "words", POSITIVE
    )
    sample: int = setting(0, "language model: number of words to generate", "words", Limits(at_least=0))
    temperature: float | None = setting(
        None,
        "with sample: logits are divided by it, so that a low one prefers probable words; null: 1",
        limits=Limits(at_least=1e-6, below=FLOAT32_LIMIT),
    )
    top_k: int | None = setting(
        None,
        "with sample: each word is drawn from so many most probable ones; null: from all",
        "words",
        POSITIVE,
    )
    format: OutputFormat = setting(
        OutputFormat.table, "of the output; json: an object per text; csv: with the columns of the input"
    )
    passes: bool = setting(False, "with format=json: the rating of every pass, too")
    seed: int = setting(1, "seed of the masks of MC samples, or of the generated words", limits=SEED)
    device: str = setting("auto", DEVICE_HELP)
    backend: Backend = setting(Backend.auto, "implementation of the cells; auto: the fastest on the device")
    precision: Precision | None = setting(None, PRECISION_HELP)

    def __post_init__(self) -> None:
        require_limits(self)
        require_checkpoint("predict", self.checkpoint)
        require(self.text is None or self.file is None, "file", "null with text=…", self.file)
        has_words = self.text is None or bool(self.text.strip())
        require(has_words, "text", "a text with words in it", repr(self.text))
        continues = self.sample == 0 or self.file is None
        require(continues, "file", "null with sample=…, which continues text=…", self.file)
        self.delimiter = delimiter_sign("delimiter", self.delimiter)
        for name in ("input", "column", "delimiter"):
            value = getattr(self, name)
            require(self.text is None or value is None, name, "null with text=…", value)
            require(self.sample == 0 or value is None, name, "null with sample=…", value)
        is_csv = self.format is OutputFormat.csv
        require(self.sample == 0 or not is_csv, "format", "table or json with sample=…", self.format)
        has_surprises = self.surprises is not None
        require(not (is_csv and has_surprises), "surprises", "null with format=csv", self.surprises)
        is_json = self.format is OutputFormat.json
        require(is_json or not self.passes, "passes", "false without format=json", "true")
        require(self.sample == 0 or self.surprises is None, "surprises", "null with sample=…", self.surprises)
        passes = self.mc_samples
        require(self.sample == 0 or not passes, "mc_samples", "0 or null with sample=…", passes)
        for name in ("temperature", "top_k"):
            value = getattr(self, name)
            require(self.sample > 0 or value is None, name, "null without sample=…, which it is for", value)


@dataclass
class Export:
    checkpoint: str | None = setting(None, CHECKPOINT_HELP, limits=FilePath())
    file: str | None = setting(
        None, "the file to write; null: beside the checkpoint, ending in .safetensors", limits=FilePath()
    )
    folder: str | None = setting(
        None, "a folder to write instead: weights, vocabulary, settings and a model card", limits=FilePath()
    )
    push: str | None = setting(
        None, "upload the folder to this repository, owner/name, of the Hugging Face Hub"
    )
    private: bool = setting(True, "push: a new repository is visible to its owner only")

    def __post_init__(self) -> None:
        require_limits(self)
        require_checkpoint("export", self.checkpoint)
        for key in ("folder", "push"):
            value = getattr(self, key)
            require(value is None or self.file is None, key, "null with file=…", value)
        is_name = self.push is None or re.fullmatch(REPOSITORY, self.push, re.ASCII) is not None
        require(is_name, "push", "owner/name, of letters, digits, _ . and -", repr(self.push))
        require(
            self.private or self.push is not None, "private", "true without push, which it is for", "false"
        )


def require_checkpoint(command: str, checkpoint: str | None) -> None:
    what = CHECKPOINT_HELP if command == "export" else MODEL_HELP
    expected = f"{what} (vdrop {command} checkpoint=…)"
    require(bool(checkpoint), "checkpoint", expected, "nothing")


@dataclass
class Bench:
    sizes: list[BenchSize] = setting(list(BenchSize), "sizes of the models", limits=Items(unique=True))
    parts: list[BenchPart] = setting(list(BenchPart), "what is timed", limits=Items(unique=True))
    cells: list[BenchCell] | None = setting(
        None, "cells to time; null: all, keras if it is installed", limits=Items(unique=True)
    )
    precisions: list[Precision] | None = setting(
        None,
        "of matrix products; null: fp32, and bf16 if the device has instructions for it; alternatives get "
        "bf16 by autocast",
        limits=Items(unique=True),
    )
    starts: int = setting(
        3, "new processes for each case: a process's memory layout makes it faster or slower", "", POSITIVE
    )
    turns: int = setting(
        5, "timings of each case in each process, in alternation; medians are over all", "", POSITIVE
    )
    mc_passes: int = setting(64, "MC samples that run as one batch", "samples", POSITIVE)
    device: str = setting("auto", DEVICE_HELP)
    configure_alternatives: bool = setting(
        False, "give the alternatives this project's allocator settings and fp32 library, too"
    )
    as_imported: bool = setting(
        False,
        "measure this project's layers without its allocator settings and fp32 library, as after an import",
    )
    outputs: str = setting("outputs", "folder in which bench/ is made", limits=FolderPath())

    def __post_init__(self) -> None:
        require_limits(self)
        has_auto = Precision.auto in (self.precisions or ())
        require(not has_auto, "precisions", "a list of fp32 and bf16, or null", "auto")
        require(
            not (self.as_imported and self.configure_alternatives),
            "as_imported",
            "false with configure_alternatives=true",
            "true",
        )


@dataclass
class ListData:
    """`data` is a corpus to fetch if necessary, load and check; null: an overview."""

    data: Data | None = group_field(CORPORA, None)


@dataclass
class Compare:
    runs: list[str] = setting(
        [], "folders of runs or of sweeps, or folders that hold runs", limits=FilePath()
    )
    tags: list[str] = setting([], "only runs with all of these tags", limits=FolderName())
    outputs: str = setting(
        "outputs", "with tags and without runs: the folder of the runs", limits=FolderPath()
    )
    picture: str | None = setting(
        None, "a file for the learning curves: .png, .svg or .pdf", limits=FilePath()
    )
    title: str | None = setting(None, "title of the picture")
    csv: str | None = setting(None, "a CSV file for the same numbers, unrounded", limits=FilePath())
    markdown: str | None = setting(None, "a file for the tables in Markdown", limits=FilePath())

    def __post_init__(self) -> None:
        require_limits(self)
        expected = "folders of runs or of a sweep (vdrop compare RUN RUN), or set tags"
        require(bool(self.runs or self.tags), "runs", expected, "nothing")
        require(self.title is None or self.picture is not None, "title", "null without picture", self.title)
        is_searched = bool(self.tags) and not self.runs
        default = type(self).outputs
        require(
            is_searched or self.outputs == default,
            "outputs",
            f"{default} without tags, or with runs",
            self.outputs,
        )


@dataclass
class Table:
    sizes: list[Size] | None = setting(
        None, "sizes of Table 1; null: all, or those that rows name", limits=Items()
    )
    rows: list[str] | None = setting(
        None,
        "rows of Table 1 (none, moon, moon_word, zaremba, variational, variational_mc, untied, untied_mc, …) "
        "or their experiments (table1_medium_untied, …); null: all",
        limits=Items(),
    )
    overrides: str = setting(
        "", 'settings that the runs of Table 1 were changed in: "schedule.epochs=1 task.bptt=20"'
    )
    outputs: str = setting("outputs", OUTPUTS_HELP, limits=FolderPath())
    file: str | None = setting(
        None,
        "the page to write; null: RESULTS.md of the checkout, or in outputs if that is not the default",
        limits=FilePath(),
    )
    csv: str | None = setting(None, "a CSV file for Table 1, unrounded", limits=FilePath())
    latex: str | None = setting(None, "a file for Table 1 as tabular environments", limits=FilePath())
    pictures: Pictures = setting(Pictures.png, "format of the pictures")
    record: bool = setting(False, "copy the small files of these runs to outputs/record")

    def __post_init__(self) -> None:
        require_limits(self)


CHOSEN_BY_REPRODUCE = {  # settings of runs that `vdrop reproduce` chooses itself, and what to do instead
    "seed": "vdrop reproduce takes seeds=…, how many there are",
    "outputs": "give outputs=… to vdrop reproduce",
    "device": "give device=… to vdrop reproduce",
    "backend": "give backend=… to vdrop reproduce",
    "precision": "give precision=… to vdrop reproduce",
    "force": "remove the run folders, or use vdrop train",
}
LOCAL_LAUNCHERS = ("basic", "joblib", "submitit_local")
STUDY_SETTINGS = {  # of `vdrop reproduce`, by the study that reads them
    StudyName.table1: ("sizes", "rows", "mc_batch"),
    StudyName.film_reviews: ("protocols", "cells", "dropouts", "epochs", "mc_samples"),
    StudyName.baselines: ("rows",),
}


@dataclass
class Reproduce:
    study: StudyName = setting(
        StudyName.table1,
        "table1: perplexities on Penn Treebank; film_reviews: ratings, section 5.2; baselines: newer models",
    )
    sizes: list[Size] | None = setting(
        None, "table1: sizes of the models; null: medium, or those that rows name", limits=Items()
    )
    rows: list[str] | None = setting(
        None, "table1: rows as in vdrop table; baselines: ptb_3h, quick_tied, …; null: all", limits=Items()
    )
    mc_batch: int | None = setting(None, "table1: as in vdrop eval", "samples", POSITIVE_SAMPLES)
    protocols: list[SplitProtocol] | None = setting(
        None,
        "film_reviews: how reviews are split, see task.protocol of vdrop train; null: both",
        limits=Items(unique=True),
    )
    cells: list[Cell] | None = setting(
        None, "film_reviews: the recurrent cells; null: both", limits=Items(unique=True)
    )
    dropouts: list[str] | None = setting(
        None,
        "film_reviews: choices of the group dropout; null: none, naive, variational",
        limits=Items(unique=True),
    )
    epochs: int | None = setting(
        None,
        "film_reviews: length of each run; null: 60; the authors' are 250 (variational LSTM) and 1,250",
        "epochs",
        POSITIVE,
    )
    mc_samples: int | None = setting(
        None,
        "film_reviews: MC samples of the evaluation of runs with dropout; null: 50",
        "samples",
        POSITIVE_SAMPLES,
    )
    seeds: int = setting(1, "runs of each row, with seeds 1, 2, …", "runs", SEEDS)
    overrides: str = setting("", "settings to change in all rows, which then differ from the published ones")
    device: str = setting("auto", DEVICE_HELP)
    backend: Backend = setting(Backend.auto, "implementation of the cells; auto: the fastest on the device")
    precision: Precision = setting(Precision.auto, "of matrix products")
    launcher: str | None = setting(
        None,
        "Hydra launcher of the runs and its settings, such as "
        '"submitit_slurm hydra.launcher.timeout_min=600"; null: see jobs. With one that takes runs to other '
        "machines, device, backend and precision cannot be auto",
    )
    jobs: int = setting(1, "runs at the same time on one device", "runs", JOBS)
    until: str | None = setting(
        None, "time after which all runs are stopped and saved: 25min, 2h or 1h30min; null: when all are done"
    )
    outputs: str = setting("outputs", OUTPUTS_HELP, limits=FolderPath())
    file: str | None = setting(
        None, "the page to write at the end; null: as in vdrop table", limits=FilePath()
    )
    plan: bool = setting(False, "only print what is left to do, and how long it takes")

    def __post_init__(self) -> None:
        require_limits(self)
        for name in dict.fromkeys(chain.from_iterable(STUDY_SETTINGS.values())):
            value = getattr(self, name)
            shown = [str(one) for one in value] if isinstance(value, list) else value
            is_read = name in STUDY_SETTINGS[self.study]
            require(value is None or is_read, name, f"null with study={self.study}", shown)
        require_command_words("launcher", self.launcher or "")
        require(
            self.jobs == 1 or not self.launcher,
            "jobs",
            "1 with launcher, which has a setting of its own for it",
            self.jobs,
        )
        if self.until is not None:
            seconds(self.until)

    @property
    def uses_other_machines(self) -> bool:
        """Whether the runs are made on other machines than this one."""
        name = next(iter(shlex.split(self.launcher or "")), "basic")
        return name not in LOCAL_LAUNCHERS

    def require_place(self) -> None:
        """Raises ConfigError where runs on other machines need settings that this machine cannot choose."""
        if not self.uses_other_machines:
            return
        there = f"with launcher={shlex.split(self.launcher or '')[0]}, whose jobs may run on other machines"
        for name in ("device", "backend", "precision"):
            value = str(getattr(self, name))
            require(value != "auto", name, f"that of the runs, not auto, {there}", value)
        limit = f"null {there}; their limit is hydra.launcher.timeout_min"
        require(self.until is None, "until", limit, self.until)


def seconds(until: str) -> int:
    """The length of a time such as 25min, 2h or 1h30min. Raises ConfigError."""
    parts = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})min)?(?:(\d{1,6})s)?", until, re.ASCII)
    hours, minutes, rest = (int(part or 0) for part in parts.groups()) if parts else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + rest
    require(total > 0, "until", "a time such as 25min, 2h or 1h30min, or null", repr(until))
    return total


def require_command_words(key: str, text: str) -> None:
    """Raises ConfigError unless a shell could split the text into words."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{key} must be words as in a shell, got {text} ({error})") from None


ROOTS: dict[str, type] = {
    "train": Train,
    "eval": Eval,
    "predict": Predict,
    "data": ListData,
    "export": Export,
    "bench": Bench,
    "compare": Compare,
    "table": Table,
    "reproduce": Reproduce,
}


MODELS = {  # by task: several of its models, and one
    TaskName.language_model: ("language models", "a language model"),
    TaskName.sentiment: ("ratings", "a model of ratings"),
}
INSTEAD = {"calibration": ", which always have such measures"}  # what models of the other task have


def require_task(
    settings: Eval | Predict, names: Iterable[str], needed: TaskName, trained: TaskName, path: Path
) -> None:
    """Raises ConfigError where one of the settings `names`, which are for models of the task `needed`, is
    given and the checkpoint `path` is of another task, `trained`.
    """
    for name in names if trained is not needed else ():
        if getattr(settings, name):
            verb, it = ("are", "them") if name.endswith("s") else ("is", "it")
            raise ConfigError(
                f"{name} {verb} for {MODELS[needed][0]}, {path} is {MODELS[trained][1]}"
                f"{INSTEAD.get(name, '')}; leave {it} out"
            )
