"""`vdrop predict`: a rating, the surprisal of each word of a text, or words that continue it."""

from vdrop_cli.device import choose_device, configure_process
from vdrop_cli.errors import require
from vdrop_cli.prediction import load, print_ratings, with_members
from vdrop_cli.settings.choices import TaskName
from vdrop_cli.settings.commands import Predict, require_task
from vdrop_cli.tasks import RatingPredictor
from vdrop_cli.word_prediction import print_sample, print_surprisals


def run(settings: Predict) -> None:
    device = choose_device(settings.device)
    configure_process(device)
    trained = load(settings, device)
    task = trained.checkpoint.train.task.name
    require_task(settings, ("sample", "surprises"), TaskName.language_model, task, trained.path)
    if isinstance(trained.predictor, RatingPredictor):
        print_ratings(with_members(trained, settings, device), trained.predictor, settings)
        return
    names = ("level", "interval", "members", "passes")
    require_task(settings, names, TaskName.sentiment, task, trained.path)
    for name, value in vars(settings.data).items():
        unset = f"null, {trained.path} has all that a language model predicts with"
        require(value is None, f"data.{name}", unset, value)
    if settings.sample > 0:
        print_sample(trained, trained.predictor, settings)
    else:
        print_surprisals(trained, trained.predictor, settings)
