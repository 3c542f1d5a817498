"""A study: rows of runs, each with its evaluation and published numbers, and sections of a page."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from vdrop_cli import markdown, runs
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.runs import Finished
from vdrop_cli.settings.train import Train
from vdrop_cli.studies.rows import Collected, key

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Number(NamedTuple):
    """A published number, and its standard deviation over runs."""

    value: float
    std: float | None = None


@dataclass(frozen=True)
class Reference:
    """Published numbers that a row's runs are set beside."""

    valid: Number | None = None  # perplexity as the authors' code computes it
    test: Number | None = None  # perplexity
    words_per_second: float | None = None  # on a GPU of 2015
    source: str | None = None  # None: nothing published compares
    confirmed: bool = True  # whether they were checked in a copy of the paper itself
    same_settings: bool = True  # whether they are of the row's settings, so that they compare


@dataclass(frozen=True)
class Row:
    """Runs that differ by seed alone. A run belongs to a row by its settings."""

    name: str
    headings: tuple[str, ...]  # of the page, above the row
    labels: tuple[str, ...]  # cells of the page that name the row
    settings: Train
    choices: tuple[str, ...]  # `vdrop train` with these makes a run
    evaluation: Evaluation = field(default_factory=Evaluation)
    reference: Reference = field(default_factory=Reference)
    is_overridden: bool = False  # whether settings differ from those that were published

    @cached_property
    def key(self) -> str:
        return key(self.settings.numbers())


@dataclass(frozen=True)
class RunMetrics:
    """The metrics of a run, or of an evaluation that begins with it."""

    run: Finished
    metrics: dict[str, float | None]
    environments: list[dict[str, Any]]  # in which they were measured, in order
    evaluation: dict[str, Any] | None = None  # the results of `vdrop eval`, where the row has an evaluation

    @property
    def seeds(self) -> str:
        members = (self.evaluation or {}).get("members", ())
        numbers = [int(Path(member).parent.name.rpartition("-s")[2]) for member in members]
        return markdown.ranges(numbers) if numbers else str(self.run.train.seed)


@dataclass(frozen=True)
class Line:
    """A line of a table: the runs of a row that were made under the same conditions; none if the row has not
    been run.
    """

    row: Row
    runs: list[RunMetrics]

    def values(self, name: str) -> list[float]:
        """A metric of all runs that have it."""
        return [value for measured in self.runs if (value := measured.metrics.get(name)) is not None]

    @property
    def speeds(self) -> list[float]:
        """Words per second of the runs; empty where the machines of the runs differ."""
        is_one = runs.are_on_one_machine(measured.run for measured in self.runs)
        return self.values("words_per_second") if is_one else []

    @property
    def environment_cells(self) -> list[str]:
        """Returns a text for each of `runs.ENVIRONMENT_COLUMNS`."""
        return runs.merge_environments(
            environment for measured in self.runs for environment in measured.environments
        )

    @property
    def seeds(self) -> str:
        return " ".join(measured.seeds for measured in self.runs)


def labelled_by_text(lines: list[Line]) -> list[Line]:
    """Returns the lines of a row; where they are of several texts, its last label has the beginning of the
    text's fingerprint.
    """
    if len({line.runs[0].run.corpus for line in lines if line.runs}) < 2:
        return lines
    named = []
    for line in lines:
        *labels, last = line.row.labels
        label = f"{last} (text {line.runs[0].run.corpus[:8]})"
        named.append(replace(line, row=replace(line.row, labels=(*labels, label))))
    return named


Column = tuple[str, Callable[[Line], str]]


def mean(name: str, digits: int) -> Callable[[Line], str]:
    """A cell with the mean of a metric, and its standard deviation."""
    return lambda line: markdown.mean(line.values(name), digits)


def speed(line: Line) -> str:
    values = line.speeds
    spread = f" ± {stdev(values):,.0f}" if len(values) > 1 else ""
    return f"{fmean(values):,.0f}{spread}" if values else "–"


class Drawing(NamedTuple):
    title: str
    name: str  # of the file, without its suffix
    figure: "Figure"


@dataclass(frozen=True)
class Section:
    """A table of a page, with what belongs to it."""

    headings: tuple[str, ...]
    about: str
    lines: list[Line]
    columns: Sequence[Column]
    unmeasured: Sequence[Column]  # of rows that have not been run
    draw: Callable[[], Iterable[Drawing]]


class Study(ABC):
    labels: ClassVar[tuple[str, ...]]  # names of the columns that name a row
    overrides: str  # settings in which all runs differ from the published ones

    @property
    def note_on_overrides(self) -> str:
        """A sentence, after a blank, where all runs have settings that were not published; else empty."""
        if not self.overrides:
            return ""
        return f" All runs with `{self.overrides}`, which is not what was published."

    @cached_property
    def rows(self) -> list[Row]:
        """The chosen rows, each composed once."""
        return self.compose_rows()

    @abstractmethod
    def compose_rows(self) -> list[Row]:
        """Returns the chosen rows. Raises ConfigError if a name is not that of a row, or no row is chosen."""

    @abstractmethod
    def lines(self, collected: Collected) -> list[Line]:
        """The lines of all rows that the page shows."""

    @abstractmethod
    def record_names(self, lines: list[Line]) -> dict[str, str]:
        """Folders below outputs/record for the runs of lines, by the keys of the runs."""

    @abstractmethod
    def introduction(self) -> list[str]:
        """Parts of the page before the sections."""

    @abstractmethod
    def sections(self, lines: list[Line]) -> list[Section]: ...
