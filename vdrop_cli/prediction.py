"""Loads the models that predict, and prints a predicted rating for each text."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vdrop_cli import trained_model
from vdrop_cli.errors import ConfigError, require
from vdrop_cli.intervals import Intervals, TooFewTexts, conformal, conformal_quantile, gaussian, quantile
from vdrop_cli.learned import Learned, Ratings
from vdrop_cli.policies import Policy
from vdrop_cli.prediction_inputs import lines
from vdrop_cli.prediction_rows import Problems, RowPrinter, UnknownWords, require_finite
from vdrop_cli.rating_noise import Noise, noise_of
from vdrop_cli.settings.choices import Interval, OutputFormat
from vdrop_cli.settings.commands import PREDICT_SAMPLES, Predict
from vdrop_cli.tasks import RatingPredictor, predictor_of
from vdrop_cli.trained_model import TrainedModel, add_member, build, member_paths, no_dropout, other_corpus
from vdrop_cli.uncertainty import Predictive

LEVEL = 95.0  # default level of intervals, per cent


def load(settings: Predict, device: torch.device) -> TrainedModel:
    """Returns the model, with all that prediction needs."""
    assert settings.checkpoint is not None
    path = trained_model.find(settings.checkpoint)
    snapshot = trained_model.load(path)
    return build(path, snapshot, predictor_of(snapshot.knowledge, device), settings, device)


def with_members(first: TrainedModel, settings: Predict, device: torch.device) -> list[TrainedModel]:
    """Returns a model and those of all members. Raises ConfigError unless they were trained on the same
    texts.
    """
    paths = member_paths(first.path, settings.members)
    others = [load(replace(settings, checkpoint=str(path)), device) for path in paths[1:]]
    members = dict[str, Path]()
    add_member(members, first)
    for one in others:
        add_member(members, one)
        same_corpus = one.checkpoint.corpus == first.checkpoint.corpus
        if not same_corpus or learned_without_noise(one) != learned_without_noise(first):
            raise other_corpus(one.path, first.path)
    return [first, *others]


def learned_without_noise(trained: TrainedModel) -> Learned:
    """Returns what a model has learned beside its weights, without the noise, which differs between models
    of one corpus.
    """
    learned = trained.predictor.learned
    return replace(learned, noise=None) if isinstance(learned, Ratings) else learned


def passes_of_each(models: list[TrainedModel], settings: Predict) -> int:
    """Returns how many passes of MC dropout each model makes; 0: the standard approximation. Raises
    ConfigError where passes are asked for of a model without dropout.
    """
    without = [one for one in models if one.checkpoint.train.dropout.policy is Policy.none]
    if without and settings.mc_samples:
        raise no_dropout(without[0].path, settings.mc_samples, "0 or null")
    by_default = 0 if without or settings.members else PREDICT_SAMPLES
    samples = by_default if settings.mc_samples is None else settings.mc_samples
    require(samples > 0 or settings.seed == 1, "seed", "1 without MC samples, which it is for", settings.seed)
    return samples


def lacks_spread(models: list[TrainedModel], samples: int) -> str | None:
    """Returns why passes cannot differ, so that they have no standard deviation; None where they can."""
    if len(models) > 1:
        return None
    if samples <= 1:
        return "one pass has no standard deviation of the model; take more mc_samples, or members"
    if not models[0].checkpoint.train.dropout.to_policy().drops:
        return (
            f"all passes are the same, as every dropout probability of {models[0].path} is 0, so they have "
            "no standard deviation; take members"
        )
    return None


def how_of(models: list[TrainedModel], samples: int) -> str:
    """Returns how ratings are predicted, in words for a message."""
    each = f"{samples} passes of MC dropout" if samples else "standard approximation"
    return each if len(models) == 1 else f"{len(models)} models, {each} of each"


def intervals_of(distribution: Predictive, noise: Noise, interval: Interval) -> Intervals:
    """Returns the intervals of one kind; conformal intervals use the scores in `noise`."""
    if interval is Interval.conformal:
        assert noise.scores_n is not None
        return conformal(distribution, noise.scores_n)
    return quantile(distribution) if interval is Interval.quantile else gaussian(distribution)


def require_scores(noise: Noise, level: float) -> None:
    """Raises ConfigError where there are too few validation texts for conformal intervals of a level."""
    try:
        if noise.scores_n is not None:
            conformal_quantile(noise.scores_n, level)
    except TooFewTexts as reason:
        raise ConfigError(
            f"level: {reason}; choose a smaller level, or interval=gaussian or interval=quantile"
        ) from None


COLUMNS = ("rating", "std_model", "std_noise", "low", "high", "level")  # columns of the output


def print_ratings(models: list[TrainedModel], predictor: RatingPredictor, settings: Predict) -> None:
    """Prints each text's rating with its standard deviation over passes, and the interval that is meant to
    contain `level` per cent of such ratings.
    """
    texts, problems = lines(settings), Problems(settings)
    unknown = UnknownWords(predictor, models[0].checkpoint.train.data)
    samples = passes_of_each(models, settings)
    noise = noise_of(models, predictor, settings, samples)
    interval = settings.interval or Interval.gaussian
    level = LEVEL if settings.level is None else settings.level
    require_scores(noise, level)
    how = how_of(models, samples)
    print(f"{models[0].path}: {how}; observation noise {noise.std:.4g}, {noise.origin}", file=sys.stderr)
    for name, value in vars(settings.data).items():
        if value is not None and not noise.is_of_corpus:
            print(f"vdrop: data.{name}={value} is not read: the observation noise is stored", file=sys.stderr)
    without = lacks_spread(models, samples)
    if without:
        print(f"vdrop: {without}", file=sys.stderr)
    names = (*COLUMNS, "passes") if settings.passes else COLUMNS
    rows = RowPrinter(settings, texts, names)
    if settings.format is OutputFormat.table:
        print(f"{'line':>6} {'rating':>8} {'± (model)':>10}   {level:g} % of ratings in     text")
    for line in texts:
        values: dict[str, Any] = dict.fromkeys(names)
        shown = f"{'–':>8} {'–':>10}   {'–':>8}    {'':<8}"
        if line.problem is None and not line.is_blank:
            assert line.text is not None
            words = predictor.words(line.text)
            unknown.count(words)
            passes_S = torch.cat(
                [
                    predictor.passes_of(one.model, words, samples, settings.seed, member)
                    for member, one in enumerate(models)
                ]
            )
            distribution = Predictive(passes_S[:, None], noise.std)
            bounds = intervals_of(distribution, noise, interval)(level)
            mean, low, high = distribution.mean_R.item(), bounds.low_R.item(), bounds.high_R.item()
            require_finite(mean + high - low, "rating", models[0], line)
            std = None if without else distribution.model_variance_R.sqrt().item()
            values = {"rating": mean, "std_model": std, "std_noise": noise.std}
            values |= {"low": low, "high": high, "level": level}
            values |= {"passes": passes_S.tolist()} if settings.passes else {}
            spread = "–" if std is None else f"{std:.3f}"
            shown = f"{mean:8.3f} {spread:>10}   {low:8.3f} to {high:<8.3f}"
        if line.problem is not None:
            problems.report(line)
        rows.write(line, values, f"{line.number:6} {shown}    {line.shown}")
    unknown.report()
    problems.end(len(texts))
