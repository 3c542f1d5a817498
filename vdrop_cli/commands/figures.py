"""`vdrop figures`: the paper's experiments on film reviews: what is missing is run or resumed, evaluated, drawn and written down."""

from dataclasses import replace

from vdrop_cli import ratings
from vdrop_cli.commands import campaign, table
from vdrop_cli.commands.campaign import Evaluation, Maker
from vdrop_cli.config import Figures, Table


def run(settings: Figures) -> None:
    page = Table(outputs=settings.outputs, file=settings.file)
    table.require_that_it_can_be_written(page)
    maker, seeds = Maker(settings.precision, settings.outputs), range(1, settings.seeds + 1)
    trainings, evaluations = [], []
    for row in ratings.rows(settings):
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
    table.write(page, on_page(settings))
    campaign.require_all(trainings, evaluations)


def on_page(settings: Figures) -> Figures:
    """All runs there are, so that none is lost that was on the page; of runs with settings of their own the chosen ones."""
    if settings.overrides:
        return settings
    every = Figures()
    dropouts = list(dict.fromkeys([*every.dropouts, *settings.dropouts]))
    return replace(settings, protocols=every.protocols, cells=every.cells, dropouts=dropouts)
