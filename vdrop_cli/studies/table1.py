"""Table 1 of Gal & Ghahramani (2016): perplexities on Penn Treebank."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from vdrop_cli import evaluation_files, pictures, published, runs
from vdrop_cli.errors import ConfigError, nearest
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.run_files import RESULT
from vdrop_cli.runs import Finished, Stuck
from vdrop_cli.settings.choices import Size
from vdrop_cli.settings.commands import Reproduce, Table
from vdrop_cli.studies import study
from vdrop_cli.studies.rows import Collected, Conditions, conditions, train_settings
from vdrop_cli.studies.study import Column, Drawing, Line, Number, Reference, Row, RunMetrics, Section, Study

HEADINGS = {
    Size.small: "Small (200 units)",
    Size.medium: "Medium (650 units)",
    Size.large: "Large (1500 units)",
}
INTRODUCTION = """- `vdrop train experiment=table1_SIZE_ROW seed=1` trains a run; ROW is one of {rows}.
  An experiment of an MC row or of an average trains the row that it evaluates. Only the large size has
  averages and corrected rows.
  `vdrop eval checkpoint=RUN mc_samples=1000` (small: 100) evaluates it for an MC row, `members=[RUN,…]`
  averages runs. `make reproduce-table SIZE=medium SEEDS=3` does it all; the average of ten takes `SEEDS=10`.
- *valid, as published*: validation as the authors' code computes it, about 1.4 % low at 35 steps a chunk; it
  compares with the published column. *valid, exact* and *test*: every token but the first, in one pass over
  the text. ±: standard deviation over seeds; of published numbers, that of the paper. Published words/s:
  measured on a GPU of 2015. A dash under words/s: other runs or programs used the device, too, or the
  machines differ.
- †: not confirmed from a copy of the paper. ‡: of other settings, see `conf/published/table1.yaml`.
  The probabilities of Moon's rows are not published, so their differences may come from ours, which
  `docs/deviations.md` has: only the small ones were chosen on validation.
- MC rows evaluate the runs of the row above. The small size has the schedule of the medium one (39 epochs);
  no published result has both."""


@dataclass(frozen=True)
class Table1(Study):
    labels = ("row",)
    sizes: list[Size] | None = None  # None: `default_sizes`, and those of experiments in `names`
    names: list[str] | None = None  # of rows or experiments; None: all
    overrides: str = ""
    default_sizes: tuple[Size, ...] = tuple(Size)

    @classmethod
    def from_table(cls, settings: Table) -> "Table1":
        return cls(settings.sizes, settings.rows, settings.overrides)

    @classmethod
    def from_reproduce(cls, settings: Reproduce) -> "Table1":
        return cls(settings.sizes, settings.rows, settings.overrides, (Size.medium,))

    def compose_rows(self) -> list[Row]:
        return [make_row(size, name, self.overrides) for size, name in self.choose()]

    def choose(self) -> list[tuple[Size, str]]:
        """Sizes and names of the chosen rows, in the paper's order within each size."""
        every = {size: names_in(size) for size in Size}
        sizes = self.default_sizes if self.sizes is None else self.sizes
        names = self.names or []
        chosen = [
            (size, name)
            for size in dict.fromkeys([*sizes, *(every if self.sizes is None else ())])
            for name in every.get(size, ())
            if published.experiment(size.name, name) in names
            or (size in sizes and (self.names is None or name in names))
        ]
        for name in names:
            if not any(name in (row, published.experiment(size.name, row)) for size, row in chosen):
                raise ConfigError(f"rows: {name} is not a row{hint(name, every)}")
        return chosen

    def lines(self, collected: Collected) -> list[Line]:
        return [
            line
            for row in self.rows
            for line in lines_of(row, collected.finished.get(row.key, []), collected.stuck.get(row.key, []))
        ]

    def record_names(self, lines: list[Line]) -> dict[str, str]:
        prefix = f"{published.TABLE_1}_"
        return {
            line.row.key: f"{published.TABLE_1}/{line.row.name.removeprefix(prefix)}"
            for line in reversed(lines)
        }

    def introduction(self) -> list[str]:
        names = dict.fromkeys(f"`{name}`" for size in Size for name in names_in(size))
        about = (
            "Table 1 of Gal & Ghahramani (2016): perplexities on Penn Treebank, measured beside published."
        )
        return [f"{about}{self.note_on_overrides}", INTRODUCTION.format(rows=", ".join(names))]

    def sections(self, lines: list[Line]) -> list[Section]:
        return [
            Section(headings, "", size_lines, COLUMNS, UNMEASURED, partial(draw, size_lines))
            for headings, size_lines in by_headings(lines)
        ]


def by_headings(lines: Iterable[Line]) -> Iterator[tuple[tuple[str, ...], list[Line]]]:
    lines = list(lines)
    for headings in dict.fromkeys(line.row.headings for line in lines):
        yield headings, [line for line in lines if line.row.headings == headings]


def names_in(size: Size) -> list[str]:
    """The rows of a size, in the paper's order."""
    return list(published.sizes()[size.name]["rows"])


def hint(name: str, every: dict[Size, list[str]]) -> str:
    """A hint about a name that is not among the chosen rows: where it is a row, or which name is similar."""
    sizes = [
        str(size)
        for size, names in every.items()
        if name in names or name in (published.experiment(size.name, row) for row in names)
    ]
    if sizes:
        return f" of these sizes, it is of {', '.join(sizes)}"
    if name in published.baselines()["rows"]:
        return "; it is one of study=baselines"
    known = list(dict.fromkeys(row for names in every.values() for row in names))
    if name.startswith(published.TABLE_1):
        known = list(published.experiments())
    return nearest(name, known)


def number(value: float | list[float] | None) -> Number | None:
    if value is None:
        return None
    return Number(*value) if isinstance(value, list) else Number(value)


def make_row(size: Size, name: str, overrides: str) -> Row:
    content = published.sizes()[size.name]["rows"][name]
    trained = (f"experiment={published.experiment(size.name, content.get('runs_of', name))}",)
    return Row(
        name=published.experiment(size.name, name),
        headings=(HEADINGS[size],),
        labels=(content["title"],),
        settings=train_settings(trained, overrides),
        choices=trained,
        evaluation=Evaluation(samples=content.get("samples", 0), members=content.get("members", 1)),
        reference=reference(content),
        is_overridden=bool(overrides),
    )


def reference(content: dict[str, Any]) -> Reference:
    """The published numbers of a row in a file of `conf/published/`."""
    return Reference(
        valid=number(content.get("valid")),
        test=number(content.get("test")),
        words_per_second=content.get("words_per_second"),
        source=content.get("source"),
        confirmed=content.get("confirmed", True),
        same_settings=content.get("same_settings", True),
    )


def first_seeds(count: int, stuck: Collection[int]) -> list[int]:
    """The seeds of so many runs of a row: 1, 2, … without those that are stuck."""
    return list(itertools.islice((seed for seed in itertools.count(1) if seed not in stuck), count))


def lines_of(row: Row, finished: Iterable[Finished], stuck: Iterable[Stuck] = ()) -> list[Line]:
    """A line for each precision, device and text that runs of the row were made with; one without runs where
    there are none.
    """
    groups: dict[Conditions, list[RunMetrics]] = {}
    for run in finished:
        stuck_seeds = [other.train.seed for other in stuck if conditions(other) == conditions(run)]
        measured = measure(row, run, first_seeds(row.evaluation.members, stuck_seeds))
        if measured is not None:
            group = groups.setdefault(conditions(run), [])
            if row.evaluation.members == 1 or not group:  # several runs may hold the same average
                group.append(measured)
    return study.labelled_by_text([Line(row, group) for group in groups.values()]) or [Line(row, [])]


def measure(row: Row, run: Finished, members: Collection[int]) -> RunMetrics | None:
    """The row's metrics of a run; None where it has not been evaluated as the row is.

    `members` are the seeds of averaged runs.
    """
    how = row.evaluation
    if how == Evaluation():
        result = run.result
        evaluation_files.require_fields(result, run.folder / RESULT, "valid_ppl", "test_ppl")
        metrics = {
            "valid_as_published": result.get("valid_ppl_as_published")
            if run.train.reads_as_published
            else None,
            "valid": result["valid_ppl"],
            "test": result["test_ppl"],
            "test_raw": result.get("test_ppl_raw"),  # of runs that average their weights
            "words_per_second": run.words_per_second,
        }
        return RunMetrics(run, metrics, run.environments)
    results = runs.evaluation_of(run, how, members)
    if results is None:
        return None
    test = f"test_ppl_mc{how.samples}" if how.samples else "test_ppl"
    valid = None if how.samples else "valid_ppl"
    evaluation_files.require_fields(results["metrics"], run.folder, test, *filter(None, [valid]))
    metrics = {"test": results["metrics"][test], "valid": results["metrics"][valid] if valid else None}
    return RunMetrics(run, metrics, [results.get("environment", {})], results)


def marks(row: Row) -> str:
    return ("" if row.reference.confirmed else "†") + ("" if compares(row) else "‡")


def compares(row: Row) -> bool:
    """Whether published numbers are of the row's settings."""
    return row.reference.same_settings and not row.is_overridden


def published_number(name: str) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        value: Number | None = getattr(line.row.reference, name)
        if value is None:
            return "–"
        std = "" if value.std is None else f" ± {value.std}"
        return f"{value.value}{std}{marks(line.row)}"

    return cell


def published_speed(line: Line) -> str:
    value = line.row.reference.words_per_second
    return "–" if value is None else f"{value:,.0f}{marks(line.row)}"


def difference(metric: str, name: str) -> Callable[[Line], str]:
    """A cell with the measured mean minus the published number, if the two can be compared."""

    def cell(line: Line) -> str:
        value: Number | None = getattr(line.row.reference, name)
        values = line.values(metric)
        if not values or value is None or not compares(line.row):
            return "–"
        return f"{fmean(values) - value.value:+.2f}"

    return cell


COLUMNS: list[Column] = [
    ("valid, published", published_number("valid")),
    ("valid, as published", study.mean("valid_as_published", 2)),
    ("difference", difference("valid_as_published", "valid")),
    ("valid, exact", study.mean("valid", 2)),
    ("test, published", published_number("test")),
    ("test", study.mean("test", 2)),
    ("difference", difference("test", "test")),
    ("words/s, published", published_speed),
    ("words/s", study.speed),
]
UNMEASURED: list[Column] = [
    ("experiment", lambda line: f"`{line.row.name}`"),
    ("valid, published", published_number("valid")),
    ("test, published", published_number("test")),
    ("words/s, published", published_speed),
]


def by_label(measured: list[Line]) -> dict[str, Line]:
    """Returns the lines by the names of their rows, with precision and device where a row has several."""
    labels = pictures.labels([line.row.labels[0] for line in measured], [machine(line) for line in measured])
    return dict(zip(labels, measured, strict=True))


def machine(line: Line) -> str:
    """Returns precision and device of a line that has runs."""
    return ", ".join(runs.merge_environments(line.runs[0].environments)[:2])


def draw(lines: list[Line]) -> Iterator[Drawing]:
    """Pictures of the runs of a size."""
    measured = [line for line in lines if line.runs]
    if not measured:
        return
    named = by_label(measured)
    trained = [label for label, line in named.items() if line.runs[0].evaluation is None]
    first = {label: named[label].runs[0].run for label in trained if named[label].runs[0].run.epochs}
    speeds = {label: fmean(values) for label, line in named.items() if (values := line.speeds)}
    prefix = f"{published.TABLE_1}_{measured[0].row.settings.model.size}"
    if first:
        figure = pictures.learning_curves(first, training=False)
        yield Drawing("Validation perplexity by epoch, first seed", f"{prefix}_validation", figure)
    samples: dict[str, Any] = {
        label: line.runs[0].evaluation["mc"]
        for label, line in named.items()
        if line.runs[0].evaluation is not None and line.row.evaluation.samples
    }
    if samples:
        title = "MC dropout: test perplexity by number of passes, first seed"
        yield Drawing(title, f"{prefix}_mc", pictures.samples_figure(samples))
    if speeds:
        theirs = {
            line.row.labels[0]: line.row.reference.words_per_second
            for line in lines
            if line.row.reference.words_per_second is not None
        }
        yield Drawing("Words a second", f"{prefix}_speed", pictures.speeds(speeds, theirs))
