"""Tables of runs: a row per configuration, a column per metric, means and standard deviations over seeds."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from statistics import fmean, stdev
from typing import Any

from vdrop_cli import markdown
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.metric_names import decimals
from vdrop_cli.runs import Finished, Logged, Unfinished, are_on_one_machine, evaluation_of
from vdrop_cli.settings.train import NOT_IN_IDENTITY
from vdrop_cli.text_tables import Rows, write_csv_row

# Settings that come first in a label. The label shows their values without their names.
NAMES = ("task.name", "data.source", "model.name", "dropout.name")
FIRST = ("epoch", "train_ppl", "valid_ppl", "valid_ppl_as_published", "test_ppl")
LEFT_OUT = (
    *("epochs", "seconds", "averaged", "valid_ppl_batched", "valid_ppl_batched_raw", "warnings"),
    "stopped_after_steps",
)
# Earlier versions also wrote these metrics for a batch_size and bptt that the authors did not use.
AS_PUBLISHED = ("valid_ppl_as_published", "valid_ppl_as_published_raw")
RANKED_BY = ("valid_ppl", "valid_rmse", "test_ppl", "test_rmse")  # the first of them that a run has
MAIN = r"(?:train|valid|test)_(?:ppl|rmse)"
SPEED = "words_per_second"
WHOLE = (SPEED,)  # metrics that are shown without decimals
CSV_START = ["configuration", "tags", "seeds", "unfinished"]
MARKDOWN_MARK = "<!-- vdrop compare -->"
BLANK = "–"


@dataclass
class Configuration:
    """Runs that differ only in their seeds."""

    label: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # by full name
    finished: list[Finished] = field(default_factory=list)
    measured: list[dict[str, float]] = field(default_factory=list)  # the metrics of each finished run
    unfinished: list[str] = field(default_factory=list)  # the state of each, such as stuck or interrupted
    run_names: set[str | None] = field(default_factory=set)
    tags: dict[str, None] = field(default_factory=dict)
    corpus: str = ""  # the fingerprint of the text

    def add(self, run: Finished | Unfinished) -> None:
        self.corpus = self.corpus or (run.corpus if run.log else "")
        self.settings = self.settings or run.settings
        self.run_names.add(run.train.run_name)
        self.tags |= dict.fromkeys(run.train.tags)
        if isinstance(run, Finished):
            self.finished.append(run)
            self.measured.append(metrics(run))
        else:
            self.unfinished.append(run.state)

    def values(self, metric: str) -> list[float]:
        """The metric of every finished run that has it; no speeds where the machines of the runs differ."""
        if metric == SPEED and not are_on_one_machine(self.finished):
            return []
        return [numbers[metric] for numbers in self.measured if numbers.get(metric) is not None]

    def mean(self, metric: str) -> float | None:
        return fmean(values) if (values := self.values(metric)) else None

    @property
    def seeds(self) -> str:
        """The number of finished runs, and the states of the others."""
        count, total = len(self.measured), len(self.measured) + len(self.unfinished)
        states = dict.fromkeys(self.unfinished)
        others = ", ".join(f"{self.unfinished.count(state)} {state}" for state in states)
        return f"{count} of {total} ({others})" if others else str(count)

    def cell(self, metric: str) -> str:
        """Mean ± standard deviation; the number of runs follows if some finished runs lack the metric."""
        values = self.values(metric)
        if not values:
            return BLANK
        text = markdown.mean(values, digits(metric, values))
        return text if len(values) == len(self.measured) else f"{text} ({len(values)})"


def digits(metric: str, values: Sequence[float]) -> int:
    """The number of decimals that a metric is shown with."""
    if metric in WHOLE:
        return 0
    if all(isinstance(value, int) for value in values):
        return 1 if len(set(values)) > 1 else 0
    return decimals(fmean(values))


def metrics(run: Finished) -> dict[str, float]:
    """The result of a run, its MC dropout metrics and its speed.

    Evaluations in another precision than the training's, or with other word dropout, are left out: their
    metrics have the same names, but different values.
    """
    evaluated: dict[str, float] = {}
    for samples in sorted(run.passes):
        results = evaluation_of(run, Evaluation(samples)) or {"metrics": {}}
        evaluated |= {name: value for name, value in results["metrics"].items() if "_mc" in name}
    speed = run.words_per_second
    every = run.result | evaluated | ({SPEED: speed} if speed is not None else {})
    left_out = LEFT_OUT if run.train.reads_as_published else (*LEFT_OUT, *AS_PUBLISHED)
    return {name: value for name, value in every.items() if name not in left_out}


def metric_names(configurations: Iterable[Configuration]) -> list[str]:
    """The metrics that any of the runs has, the usual ones first."""
    every = [name for one in configurations for numbers in one.measured for name in numbers]
    return [name for name in dict.fromkeys([*FIRST, *every]) if name in every]


def identity(run: Logged) -> str:
    """Returns the hash that all runs of one configuration share.

    For a run without a log, it is read from the name of the run folder.
    """
    return run.train.identity(run.log[0]["corpus"]) if run.log else run.folder.name.rpartition("-s")[0]


def grouped(runs: Iterable[Finished | Unfinished]) -> tuple[list[Configuration], list[str]]:
    """Returns the runs by configuration, with labels, and a message for each run that is left out.

    Of several runs with the same configuration and seed, only one counts: the first finished run, or the
    first run where none is finished.
    """
    chosen: dict[tuple[str, int], Finished | Unfinished] = {}
    messages = []
    for run in runs:
        key = (identity(run), run.train.seed)
        earlier = chosen.setdefault(key, run)
        if earlier.folder.resolve() == run.folder.resolve():
            continue
        if isinstance(run, Finished) and not isinstance(earlier, Finished):
            earlier, run = run, earlier
            chosen[key] = earlier
        messages.append(f"{run.folder} has the settings and the seed of {earlier.folder}; left out")
    configurations: dict[str, Configuration] = {}
    for (name, _), run in chosen.items():
        configurations.setdefault(name, Configuration()).add(run)
    every = list(configurations.values())
    for one, label in zip(every, labels(every), strict=True):
        one.label = label
    distinguish(every)
    return every, messages


def distinguish(configurations: Iterable[Configuration]) -> None:
    """Adds device, back end, precision and text to labels that occur more than once, where these differ.

    The text differs where a file has changed.
    """
    by_label: dict[str, list[Configuration]] = {}
    for one in configurations:
        by_label.setdefault(one.label, []).append(one)
    for alike in by_label.values():
        parts = [
            [
                *(str(one.settings.get(name, "")) for name in ("device", "backend", "precision")),
                f"text {one.corpus[:8]}" if one.corpus else "",
            ]
            for one in alike
        ]
        differs = [len(set(values)) > 1 for values in zip(*parts, strict=True)]
        for one, values in zip(alike, parts, strict=True):
            if chosen := list(filter(None, compress(values, differs))):
                one.label += f" ({', '.join(chosen)})"


def differing(configurations: Sequence[Configuration]) -> list[str]:
    """Returns the settings that differ between configurations; those in `NAMES` come first."""
    every = dict.fromkeys([*NAMES, *(key for one in configurations for key in one.settings)])
    return [
        key
        for key in every
        if key.partition(".")[0] not in NOT_IN_IDENTITY
        and len({str(one.settings.get(key)) for one in configurations}) > 1
    ]


def labels(configurations: Sequence[Configuration]) -> list[str]:
    """Returns a short name for each configuration: its `run_name`, or the settings that distinguish it."""
    keys = differing(configurations)
    shortened = [key.rpartition(".")[2] for key in keys]
    parts: list[list[str]] = [[] for _ in configurations]
    for key, short in zip(keys, shortened, strict=True):
        before = [" ".join(part) for part in parts]
        for part, one in zip(parts, configurations, strict=True):
            alike = [n for n, text in enumerate(before) if text == " ".join(part)]
            if len({str(configurations[n].settings.get(key)) for n in alike}) > 1:
                name = "" if key in NAMES else f"{short if shortened.count(short) == 1 else key}="
                part.append(f"{name}{one.settings.get(key, 'null')}")
    texts = [" ".join(part) or own_label(one) for part, one in zip(parts, configurations, strict=True)]
    names = [next(iter(one.run_names)) if len(one.run_names) == 1 else None for one in configurations]
    named = [
        name if name is not None and names.count(name) == 1 else text
        for name, text in zip(names, texts, strict=True)
    ]
    return [text if named.count(label) > 1 else label for label, text in zip(named, texts, strict=True)]


def own_label(one: Configuration) -> str:
    """Data set, model and dropout of a configuration."""
    return " ".join(str(one.settings[key]) for key in NAMES[1:])


def result_rows(configurations: Sequence[Configuration]) -> Rows:
    """A heading, then a row per configuration: tags if there are any, seeds and metrics."""
    names = metric_names(configurations)
    tagged = any(one.tags for one in configurations)
    heading = ["", *(["tags"] if tagged else []), "seeds", *names]
    return [
        heading,
        *(
            [
                one.label,
                *([", ".join(one.tags) or BLANK] if tagged else []),
                one.seeds,
                *(one.cell(name) for name in names),
            ]
            for one in configurations
        ),
    ]


def setting_rows(configurations: Sequence[Configuration]) -> Rows:
    """A heading, then a row per configuration, of the settings that differ."""
    keys = differing(configurations)
    rows = [[one.label, *(str(one.settings.get(key, BLANK)) for key in keys)] for one in configurations]
    return [["", *keys], *rows] if keys else []


def ranked_rows(configurations: Iterable[Configuration]) -> Rows:
    """A heading, then a row per configuration, the best first; configurations without a result come last."""

    def place(one: Configuration) -> tuple[int, float]:
        means = [one.mean(name) for name in RANKED_BY]
        return next(((n, mean) for n, mean in enumerate(means) if mean is not None), (len(means), 0.0))

    ranked = sorted(configurations, key=place)
    names = [name for name in metric_names(ranked) if re.fullmatch(MAIN, name)]
    rows = [
        [f"{n}. {one.label}" if one.measured else one.label, one.seeds, *map(one.cell, names)]
        for n, one in enumerate(ranked, 1)
    ]
    return [["", "seeds", *names], *rows]


def as_markdown(configurations: Sequence[Configuration]) -> str:
    """A page with the table of results, and below it the settings that differ."""
    tables = [rows for rows in (result_rows(configurations), setting_rows(configurations)) if rows]
    parts = [markdown.table(rows[0], rows[1:]) for rows in tables]
    return "\n\n".join([MARKDOWN_MARK, *parts, "Mean ± standard deviation over seeds."]) + "\n"


def is_markdown(content: bytes) -> bool:
    """Whether a file was written by `as_markdown`, or is empty."""
    return not content or content.startswith(MARKDOWN_MARK.encode())


def as_csv(configurations: Sequence[Configuration]) -> str:
    """A record per configuration: differing settings; mean, standard deviation and count of each metric."""
    keys, names = differing(configurations), metric_names(configurations)
    text = io.StringIO()
    write_csv_row(
        text, [*CSV_START, *keys, *(f"{name}{part}" for name in names for part in ("", "_std", "_count"))]
    )
    for one in configurations:
        numbers: list[Any] = []
        for values in map(one.values, names):
            numbers += [
                fmean(values) if values else "",
                stdev(values) if len(values) > 1 else "",
                len(values),
            ]
        settings = [one.settings.get(key, "") for key in keys]
        counts = [len(one.measured), len(one.unfinished)]
        write_csv_row(text, [one.label, " ".join(one.tags), *counts, *settings, *numbers])
    return text.getvalue()


def is_csv(content: bytes) -> bool:
    """Whether a file starts like those of `as_csv`, or is empty."""
    return not content or content.startswith(",".join(CSV_START).encode())
