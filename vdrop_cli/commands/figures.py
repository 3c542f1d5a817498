"""`vdrop figures`: the paper's experiments on film reviews: what is missing is run or resumed, evaluated, drawn and written down."""

from dataclasses import replace

from vdrop_cli import ratings
from vdrop_cli.commands import campaign, table
from vdrop_cli.commands.campaign import Evaluation, Maker
from vdrop_cli.config import Figures, RunError, Table
from vdrop_cli.ratings import Line, Row


def run(settings: Figures) -> None:
    page = Table(outputs=settings.outputs, file=settings.file)
    table.require_that_it_can_be_written(page, on_page(settings))
    maker, seeds = Maker(settings.precision, settings.outputs), range(1, settings.seeds + 1)
    rows = ratings.rows(settings)
    trainings, evaluations = [], []
    for row in rows:
        of_row = [maker.training(row.name, row.settings, seed) for seed in seeds]
        trainings += of_row
        published = row.evaluation(settings.mc_samples)
        evaluations += [Evaluation(row.name, published, [training]) for training in of_row if published is not None]
    campaign.announce(trainings, evaluations)
    if settings.plan:
        return
    for protocol in settings.protocols:
        todo = [t for t in trainings if t.settings.task.protocol is protocol and not t.is_finished]
        if todo:
            cells = dict.fromkeys(training.settings.model.cell for training in todo)
            dropouts = dict.fromkeys(training.settings.dropout.name for training in todo)
            chosen = ratings.choices(protocol, cells, dropouts, settings.epochs)
            of_todo, precision = dict.fromkeys(training.settings.seed for training in todo), todo[0].settings.precision
            campaign.vdrop("train", *campaign.sweep(chosen, of_todo, settings.launcher, precision, settings.outputs, settings.overrides))
    campaign.evaluate_all(evaluations)
    _, lines = table.write(page, on_page(settings))
    campaign.require_all(trainings, evaluations)
    require_on_page(rows, lines, settings.seeds)


def require_on_page(rows: list[Row], lines: list[Line], seeds: int) -> None:
    """Raises RunError where a row, or a seed of it, is not in its table though all is finished."""
    told = {(line.row.name, run.train.schedule.epochs, run.train.seed) for line in lines for run in line.runs}
    for row in rows:
        lacking = [seed for seed in range(1, seeds + 1) if (row.name, row.settings.schedule.epochs, seed) not in told]
        if lacking:
            raise RunError(f"{row.name} seed {lacking[0]} is finished, but not in the table; what was left out is told above")


def on_page(settings: Figures) -> Figures:
    """As `vdrop table` shows them, so that none is lost that was on the page; of runs with settings of their own the chosen ones."""
    if settings.overrides:
        return settings
    every = Figures()
    return replace(settings, protocols=every.protocols, cells=every.cells, dropouts=every.dropouts)
