"""`vdrop figures`: the paper's experiments on film reviews: what is missing is run or resumed, evaluated,
drawn and written down.
"""

from dataclasses import replace

from vdrop_cli import ratings
from vdrop_cli.commands import campaign, table
from vdrop_cli.commands.campaign import Commands, Evaluation, Maker
from vdrop_cli.commands.table import Work
from vdrop_cli.ratings import Line
from vdrop_cli.settings.commands import Figures, Table


def run(settings: Figures) -> None:
    page, commands = Table(outputs=settings.outputs, file=settings.file), Commands(settings.until)
    rows = ratings.rows(settings)
    if not settings.plan:
        table.require_that_it_can_be_written(page, Work(on_page(settings), [], rows))
    maker, seeds = Maker(settings.precision, settings.outputs), range(1, settings.seeds + 1)
    trainings, evaluations = [], []
    for row in rows:
        of_row = [maker.training(row.name, row.settings, seed) for seed in seeds]
        trainings += of_row
        published = row.evaluation(settings.mc_samples)
        evaluations += [
            Evaluation(row.name, published, [training]) for training in of_row if published is not None
        ]
    campaign.announce(trainings, evaluations, stuck=())
    if settings.plan:
        return
    for protocol in settings.protocols:
        todo = [t for t in trainings if t.settings.task.protocol is protocol and not t.is_finished]
        if todo:
            cells = dict.fromkeys(training.settings.model.cell for training in todo)
            dropouts = dict.fromkeys(training.settings.dropout.name for training in todo)
            chosen = ratings.choices(protocol, cells, dropouts, settings.epochs)
            of_todo, precision = (
                dict.fromkeys(training.settings.seed for training in todo),
                todo[0].settings.precision,
            )
            commands.vdrop("train", *campaign.sweep(chosen, of_todo, precision, settings))
    commands.evaluate_all(evaluations)
    _, lines = table.write(page, on_page(settings))
    campaign.require_all(trainings, evaluations)
    campaign.require_on_page(
        [(row.name, seed) for row in rows for seed in seeds], told(lines, settings.epochs)
    )


def told(lines: list[Line], epochs: int) -> set[tuple[str, int]]:
    """Names and seeds of runs of so many epochs that the tables have."""
    return {
        (line.row.name, run.train.seed)
        for line in lines
        for run in line.runs
        if run.train.schedule.epochs == epochs
    }


def on_page(settings: Figures) -> Figures:
    """As `vdrop table` shows them, so that none is lost that was on the page; of runs with settings of their
    own the chosen ones.
    """
    if settings.overrides:
        return settings
    every = Figures()
    return replace(settings, protocols=every.protocols, cells=every.cells, dropouts=every.dropouts)
