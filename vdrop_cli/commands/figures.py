"""`vdrop figures`: the paper's experiments on film reviews: what is missing is run or resumed, evaluated, drawn and written down."""

from vdrop_cli import ratings
from vdrop_cli.commands import campaign, table
from vdrop_cli.commands.campaign import Evaluation, Maker
from vdrop_cli.config import Figures, Table


def run(settings: Figures) -> None:
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
    table.run(Table(outputs=settings.outputs, file=settings.file), settings)
    campaign.require_all(trainings, evaluations)
