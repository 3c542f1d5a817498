"""The paper's experiments on film reviews (Gal & Ghahramani 2016, section 5.2, figures 2 and 3), and what
runs of them came to.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from vdrop_cli import CONF, experiments, markdown, pictures, runs
from vdrop_cli.errors import ConfigError
from vdrop_cli.policies import Cell, Policy
from vdrop_cli.runs import Finished
from vdrop_cli.settings.choices import Pictures, SplitProtocol, TaskName
from vdrop_cli.settings.commands import Figures
from vdrop_cli.settings.train import Published, Train


@dataclass(frozen=True)
class Row:
    """One way to predict ratings; its runs differ by seed."""

    protocol: SplitProtocol
    cell: Cell
    dropout: str
    settings: Train

    @property
    def name(self) -> str:
        return f"{self.protocol} {self.cell} {self.dropout}"

    @cached_property
    def key(self) -> str:
        return key(self.settings.numbers())

    def evaluation(self, samples: int) -> Published | None:
        """How its runs are evaluated beyond the standard approximation."""
        return (
            None if self.settings.dropout.policy is Policy.none else Published(self.name, mc_samples=samples)
        )


def key(numbers: dict[str, Any]) -> str:
    """What a run must share with a row to be one of it, from `Train.numbers`: the number of epochs need not
    be the same.
    """
    return experiments.key(numbers | {"schedule": numbers["schedule"] | {"epochs": None}})


def choices(
    protocol: SplitProtocol, cells: Iterable[Cell], dropouts: Iterable[str], epochs: int
) -> list[str]:
    """Of `vdrop train`."""
    models = ",".join(f"{cell}_sentiment" for cell in cells)
    chosen = [
        "task=sentiment",
        f"task.protocol={protocol}",
        f"model={models}",
        f"dropout={','.join(dropouts)}",
    ]
    return [*chosen, f"schedule.epochs={epochs}"]


def rows(settings: Figures) -> list[Row]:
    """Raises ConfigError where `overrides` make of them what they are not."""
    found = []
    for protocol, cell, dropout in product(settings.protocols, settings.cells, settings.dropouts):
        made = experiments.settings_of(
            choices(protocol, [cell], [dropout], settings.epochs), settings.overrides
        )
        for name, wanted, got in (
            ("protocols", protocol, made.task.protocol),
            ("cells", cell, made.model.cell),
            ("dropouts", dropout, made.dropout.name),
            ("epochs", settings.epochs, made.schedule.epochs),
        ):
            if got != wanted:
                raise ConfigError(
                    f"overrides must leave to {name} what is chosen by it ({wanted}), got {got}; give "
                    f"{name} another value"
                )
        found.append(Row(protocol, cell, dropout, made))
    return found


def others(settings: Figures, found: Iterable[Finished]) -> Iterator[Row]:
    """Rows of dropouts that are not chosen, where there is a run of that name: it may be one of the row."""
    trains = [run.train for run in found if run.train.task.name is TaskName.sentiment]
    for protocol, cell in product(settings.protocols, settings.cells):
        names = {
            train.dropout.name
            for train in trains
            if (train.task.protocol, train.model.cell) == (protocol, cell)
        }
        own = [
            name
            for name in sorted(names - set(settings.dropouts))
            if (CONF / "dropout" / f"{name}.yaml").is_file()
        ]
        if own:
            yield from rows(replace(settings, protocols=[protocol], cells=[cell], dropouts=own))


@dataclass(frozen=True)
class Line:
    """A row's runs of so many epochs, in one precision, on one device, and their evaluations by MC dropout;
    there may be none yet.
    """

    row: Row
    runs: list[Finished]
    passes: list[dict[str, Any]]

    def of(self, name: str) -> list[float]:
        """A metric of every run, or if they have none of that name, of every evaluation by passes."""
        of_runs = [value for run in self.runs if (value := run.result.get(name)) is not None]
        return of_runs or [value for told in self.passes if (value := told["metrics"].get(name)) is not None]

    @property
    def samples(self) -> int | None:
        """Of the evaluations by passes."""
        return max((row["samples"] for told in self.passes for row in told["mc"]), default=None)

    @property
    def speeds(self) -> list[float]:
        return [speed for run in self.runs if (speed := run.words_per_second) is not None]

    def of_passes(self, name: str) -> list[float]:
        return self.of(f"{name}_mc{self.samples}")

    @property
    def environments(self) -> list[dict[str, Any]]:
        """In which its runs were made, and evaluations that are those of records in whose place runs
        stand.
        """
        older = [
            told.get("environment", {})
            for run, told in zip(self.runs, self.passes, strict=False)
            if self.samples not in run.passes
        ]
        return [environment for run in self.runs for environment in run.environments] + older


def lines(row: Row, found: Iterable[Finished]) -> list[Line]:
    """One for each number of epochs, precision and device, or one that says that there is no run."""
    groups: dict[tuple[object, ...], list[Finished]] = {}
    for run in found:
        if run.train.task.name is TaskName.sentiment and key(run.numbers) == row.key:
            of = (run.train.schedule.epochs, str(run.train.precision), run.environment["device"])
            groups.setdefault(of, []).append(run)
    return [Line(row, of_group, by_passes(of_group)) for of_group in groups.values()] or [Line(row, [], [])]


def all_lines(settings: Figures, found: Iterable[Finished]) -> list[Line]:
    """Of every row, in their order, and of what else was run, so that none is lost that was on the page; of
    overrides the chosen ones.
    """
    found = list(found)
    told = [line for row in rows(settings) for line in lines(row, found)]
    if not settings.overrides:
        told += [line for row in others(settings, found) for line in lines(row, found) if line.runs]
    return sorted(
        told,
        key=lambda line: (settings.protocols.index(line.row.protocol), settings.cells.index(line.row.cell)),
    )


def by_passes(of_group: list[Finished]) -> list[dict[str, Any]]:
    """The evaluations with as many passes as all runs have been evaluated with, the most there are; none
    where there are no such.

    Where there are no such of the runs themselves, also those of records in whose place they stand.
    """
    own = [run.passes for run in of_group]
    older = [set[int]().union(*(one.passes for one in run.lineage)) for run in of_group]
    common = (set.intersection(*own) or set.intersection(*older)) if of_group else set()
    if not common:
        return []
    told = [runs.evaluation_of(run, Published("its row", mc_samples=max(common))) for run in of_group]
    return [one for one in told if one is not None]


Column = tuple[str, Callable[[Line], str]]


def metric(name: str, digits: int = 4) -> Callable[[Line], str]:
    return lambda line: markdown.mean(line.of(name), digits)


def of_passes(name: str, digits: int = 4) -> Callable[[Line], str]:
    return lambda line: markdown.mean(line.of_passes(name), digits)


def of_making(place: int) -> Callable[[Line], str]:
    """How the runs were made."""
    return lambda line: runs.made(line.environments)[place] if line.runs else "–"


def columns(protocol: SplitProtocol) -> list[Column]:
    chosen: list[Column] = (
        [
            ("test, last epoch", metric("test_rmse")),
            ("test, best epoch, chosen on test", metric("test_rmse_chosen_on_test")),
        ]
        if protocol is SplitProtocol.paper
        else [
            ("epoch chosen", metric("epoch", 0)),
            ("validation", metric("valid_rmse")),
            ("test", metric("test_rmse")),
        ]
    )
    return [
        ("cell", lambda line: line.row.cell.name.upper()),
        ("dropout", lambda line: line.row.dropout),
        ("epochs", metric("epochs", 0)),
        ("training", metric("train_rmse")),
        *chosen,
        ("passes", lambda line: str(line.samples or "–")),
        ("test, MC", of_passes("test_rmse")),
        ("log-likelihood", metric("test_log_likelihood", 3)),
        ("log-likelihood, MC", of_passes("test_log_likelihood", 3)),
        *((f"in {level} %, MC", of_passes(f"test_coverage_{level}", 3)) for level in (50, 80, 95)),
        ("words/s", lambda line: f"{fmean(speeds):,.0f}" if (speeds := line.speeds) else "–"),
        ("seeds", lambda line: " ".join(str(run.train.seed) for run in line.runs) or "not yet run"),
        *((heading, of_making(place)) for place, heading in enumerate(runs.MADE)),
    ]


LEGEND = """Gal & Ghahramani (2016), section 5.2: ratings of film reviews, here those of the Cornell data set, in [0, 1]. Errors are roots
of mean squared errors in rating units, ± the deviation over seeds. `make reproduce-figures` makes the runs and this section. *training*,
*test*: dropout off; *MC*: the mean over passes of MC dropout. *log-likelihood*: nats a text. *in 80 %*: the share of test ratings in the
interval that is to hold 80 %."""
OF_PROTOCOL = {
    SplitProtocol.paper: "The paper's protocol: split by chunks, in the order of the reviews; there is no "
    "validation part.",
    SplitProtocol.clean: "The clean protocol: split by review; the epoch with the best validation is reported.",
}


def section(settings: Figures, told: list[Line], folder: Path, kind: Pictures, page: Path) -> list[str]:
    """Of the page that is at `page`; pictures are drawn into `folder`."""
    changed = f" All runs with `{settings.overrides}`." if settings.overrides else ""
    parts = ["## Ratings of film reviews", LEGEND + changed]
    for protocol in settings.protocols:
        of_protocol = [line for line in told if line.row.protocol is protocol]
        shown = columns(protocol)
        table = markdown.table(
            [heading for heading, _ in shown], ([of(line) for _, of in shown] for line in of_protocol)
        )
        parts += [
            f"### {protocol.name.capitalize()}",
            f"{OF_PROTOCOL[protocol]} {baselines(of_protocol)}".strip(),
            table,
        ]
        for cell in settings.cells:
            of_cell = [line for line in of_protocol if line.runs and line.row.cell is cell]
            if of_cell and kind is not Pictures.none:
                first = [line.runs[0] for line in of_cell]
                details = [
                    f"{run.train.schedule.epochs} epochs, {', '.join(runs.made(run.environments)[:2])}"
                    for run in first
                ]
                labels = pictures.labels([line.row.dropout for line in of_cell], details)
                path = folder / f"ratings_{protocol}_{cell}.{kind}"
                pictures.save(pictures.error_curves(dict(zip(labels, first, strict=True))), path)
                title = f"{cell.name.upper()}, {protocol} protocol: error by epoch, first seed"
                parts.append(markdown.picture(title, path, page))
    return parts


def record_names(lines: Iterable[Line]) -> dict[str, str]:
    """Below outputs/record, by the key of the runs."""
    return {
        experiments.key(run.numbers): f"ratings/{line.row.name.replace(' ', '_')}-{run.train.schedule.epochs}"
        for line in lines
        for run in line.runs
    }


def baselines(of_protocol: list[Line]) -> str:
    """What all runs of a protocol are set beside."""
    names = {"test_rmse_of_mean": "predicting the mean", "test_rmse_of_ridge": "ridge regression on TF-IDF"}
    found = {
        told: value
        for name, told in names.items()
        for value in [v for line in of_protocol for v in line.of(name)][:1]
    }
    return (
        f"Baselines, on test: {', '.join(f'{told} {value:.4f}' for told, value in found.items())}."
        if found
        else ""
    )
