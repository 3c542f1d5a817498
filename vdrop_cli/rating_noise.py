"""The observation noise of predicted ratings and the scores of conformal intervals, from evaluations.

n validation texts
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdrop_cli import evaluation_files
from vdrop_cli.errors import ConfigError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.settings.choices import Interval
from vdrop_cli.settings.commands import Predict
from vdrop_cli.settings.data_places import data_for, stored_places
from vdrop_cli.tasks import RatingPredictor, Sentiment
from vdrop_cli.trained_model import TrainedModel, evaluation_stem, is_export, member_name, task_of
from vdrop_cli.uncertainty import fit_noise


@dataclass(frozen=True)
class Noise:
    """The standard deviation of ratings around their predictions, and where this number is from."""

    std: float
    origin: str
    scores_n: Tensor | None = None  # of `conformal_scores`
    is_of_corpus: bool = False  # whether the corpus was read for it


def noise_of(
    models: list[TrainedModel], predictor: RatingPredictor, settings: Predict, samples: int
) -> Noise:
    """Returns the observation noise for predictions of these models.

    It is the noise that `vdrop eval` fitted for the same checkpoints, passes and precision. Without such an
    evaluation, the noise of a single model comes from the errors of the standard approximation. These errors
    include the error of the model, so an interval that also contains the deviation over passes is a little
    too wide. A checkpoint that was written right after a validation contains this noise; otherwise the corpus
    is read to compute it. Conformal intervals take the noise and the scores of one evaluation. Raises
    ConfigError where an evaluation is needed and does not exist.
    """
    first = models[0]
    part = predictor.learned.noise_part
    fitted = f"fitted to the {part} part"
    if settings.interval is Interval.conformal:
        predictor.require_validation_part(first.path, "gaussian or quantile")
        return conformal_noise(models, samples, fitted)
    if part == "train":
        pieces, chunk_words = "texts", predictor.learned.chunk_words
        longer = ""
        if chunk_words is not None:  # the protocol takes each sequence for a text
            pieces, longer = f"pieces of {chunk_words} words", ", and too wide for longer texts"
        fitted += (
            f" ({pieces} that the model was trained on: intervals are too narrow where it over-fits{longer})"
        )
    fitting = next(evaluations(models, samples), None)
    if fitting is not None:
        path, noise, _ = fitting
        return Noise(noise, f"{fitted} in {path}")
    command = command_of(models, samples)
    if len(models) > 1:
        raise ConfigError(
            f"members have no observation noise together yet; run {command} first, which fits it"
        )
    if samples:
        fitted += (
            ", by the standard approximation, which makes intervals a little too wide; vdrop eval "
            f"mc_samples={samples} fits it to passes"
        )
    trained = first.checkpoint.train
    if predictor.learned.noise is not None:
        if first.precision is not trained.precision:
            fitted += f" (in {trained.precision}, as the model was trained)"
        return Noise(predictor.learned.noise, fitted)
    otherwise = f"run {command} first, which fits the observation noise"
    data = data_for(trained.data, settings.data, False, f"checkpoint={first.path}", otherwise)
    task = task_of(first.path, first.checkpoint, data, predictor.device)
    assert isinstance(task, Sentiment)  # as the predictor is one of ratings
    sample = task.sample(part)
    std = fit_noise(task.predict(first.model, sample)[None], sample.ratings_R)
    return Noise(std, fitted, is_of_corpus=True)


def conformal_noise(models: list[TrainedModel], samples: int, fitted: str) -> Noise:
    """Returns the noise and the conformal scores of one evaluation of these checkpoints. Raises ConfigError
    where none has scores. `fitted` says to what the noise is fitted.
    """
    without_scores = None
    for path, noise, results in evaluations(models, samples):
        if scores := results.get("conformal_scores"):
            scores_n = torch.tensor(scores, dtype=torch.float64)
            return Noise(noise, f"{fitted} in {path}, as the conformal scores", scores_n)
        without_scores = path
    command = command_of(models, samples)
    if without_scores is not None:
        raise ConfigError(
            f"interval=conformal: {without_scores} has no conformal scores, as its ratings say little; "
            f"run {command} again, or choose another interval"
        )
    raise ConfigError(
        f"interval=conformal takes the errors on the validation part; run {command} first, which "
        "measures them"
    )


def evaluations(models: list[TrainedModel], samples: int) -> Iterator[tuple[Path, float, dict[str, Any]]]:
    """Yields the path, the noise and the results of each evaluation of these checkpoints together.

    An evaluation of several checkpoints is in the folder of the one that was named first, so all folders are
    searched. Raises ConfigError where its noise is not a finite number above 0.
    """
    metric = f"noise_mc{samples}" if samples else "noise"
    names = [member_name(one.path) for one in models]
    digest = evaluation_files.members_digest(names) if len(models) > 1 else ""
    digests = sorted(one.digest for one in models)
    precision = None if models[0].precision is models[0].checkpoint.train.precision else models[0].precision
    how = Evaluation(samples=samples, members=len(models), precision=precision)
    for one in models:
        for path in sorted(one.path.parent.glob("*.json")):
            made = evaluation_files.from_file(path, evaluation_stem(one.path))
            if made is None or not how.includes(made) or digest not in path.stem:
                continue
            results = evaluation_files.read(path)
            # another model may have had the same name
            if metric not in results["metrics"] or results.get("models") != digests:
                continue
            noise = results["metrics"][metric]
            if type(noise) is not float or not 0 < noise < math.inf:
                raise ConfigError(f"{path} is damaged; delete it and give the same vdrop eval command again")
            yield path, noise, results


def command_of(models: list[TrainedModel], samples: int) -> str:
    """Returns the command that evaluates these checkpoints in this way."""
    words = [f"vdrop eval checkpoint={models[0].path}"]
    if len(models) > 1:
        words.append(f"members=[{','.join(str(one.path) for one in models[1:])}]")
    if samples:
        words.append(f"mc_samples={samples}")
    if places := stored_places(models[0].checkpoint.train.data):  # an export names no folders
        given = [f"data.{name}=…" for name in places]
        words += given if is_export(models[0].path) else ["stored_data=true"]
    if models[0].precision is not models[0].checkpoint.train.precision:
        words.append(f"precision={models[0].precision}")
    return " ".join(words)
