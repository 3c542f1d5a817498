"""`vdrop predict`: a rating, the surprisal of each word of a text, or words that continue it."""

from vdrop_cli.device import choose_device, configure_process
from vdrop_cli.errors import ConfigError
from vdrop_cli.prediction import load, rate, surprise, with_members, write
from vdrop_cli.settings.commands import Predict
from vdrop_cli.tasks import RatingPredictor


def run(settings: Predict) -> None:
    device = choose_device(settings.device)
    configure_process(device)
    built = load(settings, device)
    if isinstance(built.predictor, RatingPredictor):
        for name, value in (("sample", settings.sample or None), ("surprises", settings.surprises)):
            if value is not None:
                raise ConfigError(
                    f"{name} is for language models, {built.path} predicts ratings; leave it out"
                )
        rate(with_members(built, settings, device), built.predictor, settings)
        return
    if settings.mc_samples:
        raise ConfigError(
            "mc_samples must be 0 or null of a language model, whose words are predicted without; vdrop "
            "eval has MC perplexity"
        )
    for name in ("level", "interval", "members", "passes"):
        if getattr(settings, name):
            raise ConfigError(f"{name} is for ratings, {built.path} is a language model; leave it out")
    if settings.sample > 0:
        write(built, built.predictor, settings)
    else:
        surprise(built, built.predictor, settings)
