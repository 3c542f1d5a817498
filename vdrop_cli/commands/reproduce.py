"""`vdrop reproduce`: the rows of the paper's Table 1: what is missing is run or resumed, evaluated, and written down."""

import sys
from pathlib import Path

from vdrop_cli import experiments
from vdrop_cli.commands import campaign, table
from vdrop_cli.commands.campaign import Commands, Evaluation, Maker, Training
from vdrop_cli.commands.table import Line, Work
from vdrop_cli.config import TABLE_1, ConfigError, Figures, Reproduce, Table
from vdrop_cli.experiments import Row


def run(settings: Reproduce) -> None:
    rows = experiments.rows(settings.sizes, settings.rows, settings.overrides)
    if not rows:
        raise ConfigError("sizes and rows leave nothing to run; vdrop reproduce plan=true sizes=[small] shows what there is")
    page, commands = page_of(settings), Commands(settings.until)
    figures = Figures(outputs=page.outputs, file=page.file)
    if not settings.plan:
        table.require_that_it_can_be_written(page, Work(figures, rows, []))
    trainings, evaluations = needed(rows, settings)
    if not trainings:
        raise ConfigError(f"seeds must be more for any of these rows, got {settings.seeds}")
    campaign.announce(trainings, evaluations)
    if settings.plan:
        return
    todo = [training for training in trainings if not training.is_finished]
    if todo:
        choices = [f"experiment={','.join(dict.fromkeys(training.name for training in todo))}"]
        seeds, precision = dict.fromkeys(training.settings.seed for training in todo), todo[0].settings.precision
        commands.vdrop("train", *campaign.sweep(choices, seeds, precision, settings))
    commands.evaluate_all(evaluations)
    lines, _ = table.write(page, figures)
    campaign.require_all(trainings, evaluations)
    campaign.require_on_page(wanted(rows, settings.seeds), told(lines))


def wanted(rows: list[Row], seeds: int) -> list[tuple[str, int]]:
    """Names and seeds that the table is to have; of averaged models the seed of the first."""
    found = []
    for row in rows:
        members = row.published.members
        of_row = range(1, seeds + 1) if members <= 1 else [1] if members <= seeds else []
        found += [(row.experiment, seed) for seed in of_row]
    return found


def told(lines: list[Line]) -> set[tuple[str, int]]:
    """Names and seeds that it has."""
    return {(line.row.experiment, evaluated.run.train.seed) for line in lines for evaluated in line.runs}


def page_of(settings: Reproduce) -> Table:
    """All rows there are, so that none is lost that was on the page; of runs with settings of their own the chosen ones."""
    sizes, rows = (settings.sizes, settings.rows) if settings.overrides else (list(TABLE_1), None)
    return Table(sizes, rows, settings.overrides, settings.outputs, settings.file)


def needed(rows: list[Row], settings: Reproduce) -> tuple[list[Training], list[Evaluation]]:
    """Each once, however many rows need it."""
    maker = Maker(settings.precision, settings.outputs)
    trainings: dict[Path, Training] = {}
    evaluations: dict[tuple[Path, int, int], Evaluation] = {}
    for row in rows:
        members, samples = row.published.members, row.published.mc_samples
        if members > settings.seeds:
            print(f"{row.experiment} is left out: it takes seeds={members}", file=sys.stderr)
            continue
        made = [maker.training(row.experiment, row.settings, seed) for seed in range(1, settings.seeds + 1)]
        of_row = [trainings.setdefault(training.folder, training) for training in made]
        for evaluated in [of_row[:members]] if members > 1 else [[training] for training in of_row if samples]:
            evaluation = Evaluation(row.experiment, row.published, evaluated, settings.mc_batch)
            evaluations.setdefault((evaluated[0].folder, members, samples), evaluation)
    return list(trainings.values()), list(evaluations.values())
