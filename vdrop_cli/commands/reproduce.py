"""`vdrop reproduce`: the rows of the paper's Table 1: what is missing is run or resumed, evaluated, and
written down.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vdrop_cli import experiments
from vdrop_cli.commands import campaign, table
from vdrop_cli.commands.campaign import Commands, Evaluation, Maker, Training
from vdrop_cli.commands.table import Line, Work
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.experiments import Row
from vdrop_cli.settings.choices import TABLE_1
from vdrop_cli.settings.commands import Figures, Reproduce, Table
from vdrop_cli.stuck_starts import StuckStart

MORE_SEEDS = 10  # of a row, beyond those asked for, that are tried where others are stuck


@dataclass
class Plan:
    """What rows need, each once however many of them need it."""

    trainings: dict[Path, Training] = field(default_factory=dict)  # by their folders
    evaluations: dict[tuple[Path, int, int], Evaluation] = field(default_factory=dict)
    stuck: dict[Path, tuple[str, StuckStart]] = field(
        default_factory=dict
    )  # trainings that others replace: folder, name and start
    on_page: list[tuple[str, int]] = field(
        default_factory=list
    )  # names of rows and seeds; of averaged models the seed of the first
    without_seeds: dict[str, list[int]] = field(
        default_factory=dict
    )  # rows of which too many seeds are stuck, and these seeds

    def sweeps(self) -> Iterator[list[Training]]:
        """Those that are not finished, of rows with the same seeds together, so that every row of a sweep
        needs every seed of it.
        """
        of_rows: dict[str, list[Training]] = {}
        for training in self.trainings.values():
            of_rows.setdefault(training.name, []).append(training)
        groups: dict[tuple[int, ...], list[Training]] = {}
        for of_row in of_rows.values():
            seeds = tuple(training.settings.seed for training in of_row)
            groups.setdefault(seeds, []).extend(training for training in of_row if not training.is_finished)
        return filter(None, groups.values())

    def require_seeds(self) -> None:
        """Raises RunError where a row has too few that are not stuck."""
        for name, seeds in self.without_seeds.items():
            raise RunError(
                f"{name}: seeds {', '.join(map(str, seeds))} are stuck, and no more are tried; see whether "
                "stuck.steps and stuck.loss "
                "suit the row's other settings, and change them by overrides="
            )


def run(settings: Reproduce) -> None:
    rows = experiments.rows(settings.sizes, settings.rows, settings.overrides)
    page, commands = page_of(settings), Commands(settings.until)
    figures = Figures(outputs=page.outputs, file=page.file)
    if not settings.plan:
        table.require_that_it_can_be_written(page, Work(figures, rows, []))
    for row in (row for row in rows if row.published.members > settings.seeds):
        print(f"{row.experiment} is left out: it takes seeds={row.published.members}", file=sys.stderr)
    rows = [row for row in rows if row.published.members <= settings.seeds]
    if not rows:
        raise ConfigError(f"seeds must be more for any of these rows, got {settings.seeds}")
    maker = Maker(settings.precision, settings.outputs)
    plan = plan_of(rows, settings, maker)
    campaign.announce(plan.trainings.values(), plan.evaluations.values(), plan.stuck.values())
    if settings.plan:
        return
    while sweeps := list(plan.sweeps()):
        for todo in sweeps:
            choices = [f"experiment={','.join(dict.fromkeys(training.name for training in todo))}"]
            seeds, precision = (
                dict.fromkeys(training.settings.seed for training in todo),
                todo[0].settings.precision,
            )
            commands.vdrop("train", *campaign.sweep(choices, seeds, precision, settings))
        before, plan = plan, plan_of(rows, settings, maker)
        new = [name for folder, (name, _) in plan.stuck.items() if folder not in before.stuck]
        if not new:
            break
        print(f"vdrop: {', '.join(new)}: stuck; other seeds replace them", file=sys.stderr)
    commands.evaluate_all(plan.evaluations.values())
    lines, _ = table.write(page, figures)
    campaign.require_all(plan.trainings.values(), plan.evaluations.values())
    plan.require_seeds()
    campaign.require_on_page(plan.on_page, told(lines))


def told(lines: list[Line]) -> set[tuple[str, int]]:
    """Names of rows and seeds that a table has."""
    return {(line.row.experiment, evaluated.run.train.seed) for line in lines for evaluated in line.runs}


def page_of(settings: Reproduce) -> Table:
    """All rows there are, so that none is lost that was on the page; of runs with settings of their own the
    chosen ones.
    """
    sizes, rows = (settings.sizes, settings.rows) if settings.overrides else (list(TABLE_1), None)
    return Table(sizes, rows, settings.overrides, settings.outputs, settings.file)


def plan_of(rows: list[Row], settings: Reproduce, maker: Maker) -> Plan:
    """With the first seeds of each row that are not known to be stuck."""
    plan = Plan()
    for row in rows:
        members, samples = row.published.members, row.published.mc_samples
        of_row, stuck = list[Training](), list[int]()
        for seed in range(1, settings.seeds + MORE_SEEDS + 1):
            training = maker.training(row.experiment, row.settings, seed)
            training = plan.trainings.get(training.folder, training)
            if (start := maker.stuck_start(training)) is not None:
                plan.stuck.setdefault(training.folder, (training.told, start))
                stuck.append(seed)
                continue
            of_row.append(plan.trainings.setdefault(training.folder, training))
            if len(of_row) == settings.seeds:
                break
        else:
            plan.without_seeds[row.experiment] = stuck
        if len(of_row) < members:
            continue
        for evaluated in (
            [of_row[:members]] if members > 1 else [[training] for training in of_row if samples]
        ):
            evaluation = Evaluation(row.experiment, row.published, evaluated, settings.mc_batch)
            plan.evaluations.setdefault((evaluated[0].folder, members, samples), evaluation)
        plan.on_page += [
            (row.experiment, training.settings.seed) for training in (of_row if members == 1 else of_row[:1])
        ]
    return plan
