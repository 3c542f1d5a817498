"""Ratings of film reviews (Gal & Ghahramani 2016, section 5.2, figures 2 and 3)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from vdrop_cli import CONF, markdown, pictures, runs
from vdrop_cli.errors import ConfigError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.policies import Cell, Policy
from vdrop_cli.runs import Finished
from vdrop_cli.settings.choices import SplitProtocol, TaskName
from vdrop_cli.settings.commands import Reproduce
from vdrop_cli.studies import rows, study
from vdrop_cli.studies.rows import Collected, train_settings
from vdrop_cli.studies.study import Column, Drawing, Line, Row, RunMetrics, Section, Study

HEADING = "Ratings of film reviews"
INTRODUCTION = """Gal & Ghahramani (2016), section 5.2: ratings of film reviews, here those of the Cornell
data set, in [0, 1]. Errors are roots of mean squared errors in rating units, ± their standard deviation over
seeds. `make reproduce-figures` makes the runs and this section. *training*, *test*: dropout off; *MC*: the
mean over passes of MC dropout. *log-likelihood*: nats a text. *in 80 %*: the share of test ratings in the
interval that is to hold 80 %."""
ABOUT = {
    SplitProtocol.paper: "The paper's protocol: split by chunks, in the order of the reviews; there is no "
    "validation part.",
    SplitProtocol.clean: "The clean protocol: split by review; the epoch with the best validation is "
    "reported.",
}


@dataclass(frozen=True)
class FilmReviews(Study):
    labels = ("cell", "dropout")
    protocols: list[SplitProtocol] = field(default_factory=lambda: list(SplitProtocol))
    cells: list[Cell] = field(default_factory=lambda: list(Cell))
    dropouts: list[str] = field(default_factory=lambda: ["none", "naive", "variational"])
    epochs: int = 60  # the authors' are 250 (variational LSTM) and 1,250
    samples: int = 50  # of the MC evaluation, as the authors'
    overrides: str = ""

    @classmethod
    def from_reproduce(cls, settings: Reproduce) -> "FilmReviews":
        chosen = {
            "protocols": settings.protocols,
            "cells": settings.cells,
            "dropouts": settings.dropouts,
            "epochs": settings.epochs,
            "samples": settings.mc_samples,
        }
        changes = {name: value for name, value in chosen.items() if value is not None}
        return replace(cls(overrides=settings.overrides), **changes)  # type: ignore[arg-type]

    def compose_rows(self) -> list[Row]:
        """Raises ConfigError if `overrides` change a setting that a row is chosen by."""
        return [self.row(*chosen) for chosen in product(self.protocols, self.cells, self.dropouts)]

    def row(self, protocol: SplitProtocol, cell: Cell, dropout: str) -> Row:
        choices = (
            "task=sentiment",
            f"task.protocol={protocol}",
            f"model={cell}_sentiment",
            f"dropout={dropout}",
            f"schedule.epochs={self.epochs}",
        )
        settings = train_settings(choices, self.overrides)
        for name, chosen, composed in (
            ("protocols", protocol, settings.protocol),
            ("cells", cell, settings.model.cell),
            ("dropouts", dropout, settings.dropout.name),
            ("epochs", self.epochs, settings.schedule.epochs),
        ):
            if composed != chosen:
                raise ConfigError(
                    f"overrides must leave {name} as chosen ({chosen}), got {composed}; give {name} another "
                    "value"
                )
        has_dropout = settings.dropout.policy is not Policy.none
        return Row(
            name=f"{protocol} {cell} {dropout}",
            headings=(HEADING, protocol.name.capitalize()),
            labels=(cell.name.upper(), dropout),
            settings=settings,
            choices=choices,
            evaluation=Evaluation(samples=self.samples if has_dropout else 0),
        )

    def rows_of_other_dropouts(self, finished: Iterable[Finished]) -> Iterator[Row]:
        """Rows of dropouts that were not chosen, if a run has a dropout of that name. That run may belong to
        the row.
        """
        trained = [run.train for run in finished if run.train.task.name is TaskName.sentiment]
        for protocol, cell in product(self.protocols, self.cells):
            names = {
                train.dropout.name
                for train in trained
                if (train.protocol, train.model.cell) == (protocol, cell)
            }
            for name in sorted(names - set(self.dropouts)):
                if (CONF / "dropout" / f"{name}.yaml").is_file():
                    yield self.row(protocol, cell, name)

    def lines(self, collected: Collected) -> list[Line]:
        """The lines of every row, and those of other dropouts that were run, so that the page loses none.
        With overrides only the chosen rows.
        """
        finished = [run for run in collected.all_finished if run.train.task.name is TaskName.sentiment]
        lines = [line for row in self.rows for line in lines_of(row, finished)]
        if not self.overrides:
            others = [
                line for row in self.rows_of_other_dropouts(finished) for line in lines_of(row, finished)
            ]
            lines += [line for line in others if line.runs]
        order = {row: place for place, row in enumerate(product(self.protocols, self.cells))}

        def place(line: Line) -> int:
            return order[protocol_of(line), line.row.settings.model.cell]

        return sorted(lines, key=place)

    def record_names(self, lines: list[Line]) -> dict[str, str]:
        names = {}
        for line in lines:
            for measured in line.runs:
                epochs = measured.run.train.schedule.epochs
                name = f"ratings/{line.row.name.replace(' ', '_')}-{epochs}"
                names[rows.key(measured.run.numbers)] = name
        return names

    def introduction(self) -> list[str]:
        changed = f" All runs with `{self.overrides}`." if self.overrides else ""
        return [f"## {HEADING}", INTRODUCTION + changed]

    def sections(self, lines: list[Line]) -> list[Section]:
        return [self.section(protocol, lines) for protocol in self.protocols]

    def section(self, protocol: SplitProtocol, lines: list[Line]) -> Section:
        lines = [line for line in lines if protocol_of(line) is protocol]
        return Section(
            headings=(HEADING, protocol.name.capitalize()),
            about=f"{ABOUT[protocol]} {baselines(lines)}".strip(),
            lines=lines,
            columns=columns(protocol),
            unmeasured=[],
            draw=lambda: (drawing for cell in self.cells for drawing in draw(protocol, cell, lines)),
        )


def protocol_of(line: Line) -> SplitProtocol:
    protocol = line.row.settings.protocol
    assert protocol is not None
    return protocol


def key(settings: dict[str, object]) -> str:
    """The key of the row that a run belongs to, from the run's `Train.numbers`. The number of epochs does not
    matter.
    """
    schedule = settings["schedule"]
    assert isinstance(schedule, dict)
    return rows.key(settings | {"schedule": schedule | {"epochs": None}})


def lines_of(row: Row, finished: Iterable[Finished]) -> list[Line]:
    """A line for each number of epochs, precision, device and text; one without runs where there are none."""
    groups: dict[tuple[object, ...], list[Finished]] = {}
    own = key(row.settings.numbers())
    for run in finished:
        if key(run.numbers) == own:
            made = (run.train.schedule.epochs, *rows.conditions(run))
            groups.setdefault(made, []).append(run)
    return study.labelled_by_text([Line(row, measure(group)) for group in groups.values()]) or [Line(row, [])]


def measure(group: list[Finished]) -> list[RunMetrics]:
    """The metrics of runs, with those of one MC evaluation.

    Its number of passes is the one that most runs were evaluated with; if several are as frequent, the
    largest. A run without that evaluation has no MC metrics. If no run has an MC evaluation, those of the
    records that the runs replace are used.
    """
    passes_by_run = [run.passes for run in group]
    if not any(passes_by_run):
        passes_by_run = [set[int]().union(*(one.passes for one in run.lineage)) for run in group]
    counts = Counter(samples for passes in passes_by_run for samples in passes)
    samples = max(counts, key=lambda samples: (counts[samples], samples), default=0)
    return [measure_one(run, samples) for run in group]


def mc_mean(name: str, digits: int) -> Callable[[Line], str]:
    """A cell like that of `study.mean`. If some runs lack the evaluation, it also shows how many have it."""

    def cell(line: Line) -> str:
        values = line.values(name)
        count_text = f" ({len(values)} of {len(line.runs)})" if 0 < len(values) < len(line.runs) else ""
        return markdown.mean(values, digits) + count_text

    return cell


def measure_one(run: Finished, samples: int) -> RunMetrics:
    metrics: dict[str, float | None] = {"words_per_second": run.words_per_second}
    environments = list(run.environments)
    results = runs.evaluation_of(run, Evaluation(samples)) if samples else None
    if results is not None:
        metrics |= results["metrics"] | {"samples": samples}
        for name, value in results["metrics"].items():
            if name.endswith(f"_mc{samples}"):
                metrics[name.removesuffix(str(samples))] = value
        if samples not in run.passes:  # it is a record's
            environments.append(results.get("environment", {}))
    metrics |= {name: value for name, value in run.result.items() if isinstance(value, int | float)}
    return RunMetrics(run, metrics, environments, results)


def columns(protocol: SplitProtocol) -> list[Column]:
    reported = {
        SplitProtocol.paper: [
            ("test, last epoch", study.mean("test_rmse", 4)),
            ("test, best epoch, chosen on test", study.mean("test_rmse_chosen_on_test", 4)),
        ],
        SplitProtocol.clean: [
            ("epoch chosen", study.mean("epoch", 0)),
            ("validation", study.mean("valid_rmse", 4)),
            ("test", study.mean("test_rmse", 4)),
        ],
    }
    return [
        ("epochs", lambda line: str(line.runs[0].run.train.schedule.epochs)),
        ("training", study.mean("train_rmse", 4)),
        *reported[protocol],
        ("passes", lambda line: f"{samples[0]:.0f}" if (samples := line.values("samples")) else "–"),
        ("test, MC", mc_mean("test_rmse_mc", 4)),
        ("log-likelihood", study.mean("test_log_likelihood", 3)),
        ("log-likelihood, MC", mc_mean("test_log_likelihood_mc", 3)),
        *((f"in {level} %, MC", mc_mean(f"test_coverage_{level}_mc", 3)) for level in (50, 80, 95)),
        ("words/s", study.speed),
    ]


def baselines(lines: list[Line]) -> str:
    """A sentence with the test errors of the baselines, with which all runs of a protocol are compared; or
    nothing.
    """
    values = {
        title: value
        for name, title in pictures.BASELINES.items()
        for value in [value for line in lines for value in line.values(name)][:1]
    }
    if not values:
        return ""
    return f"Baselines, on test: {', '.join(f'{title} {value:.4f}' for title, value in values.items())}."


def draw(protocol: SplitProtocol, cell: Cell, lines: list[Line]) -> Iterator[Drawing]:
    """Errors by epoch of a cell's first runs."""
    measured = [line for line in lines if line.runs and line.row.settings.model.cell is cell]
    if not measured:
        return
    first = [line.runs[0].run for line in measured]
    details = [
        f"{run.train.schedule.epochs} epochs, {', '.join(runs.merge_environments(run.environments)[:2])}"
        for run in first
    ]
    labels = pictures.labels([line.row.labels[1] for line in measured], details)
    figure = pictures.error_curves(dict(zip(labels, first, strict=True)))
    title = f"{cell.name.upper()}, {protocol} protocol: error by epoch, first seed"
    yield Drawing(title, f"ratings_{protocol}_{cell}", figure)
