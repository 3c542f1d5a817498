"""The observation noise of predicted ratings, and the scores of conformal intervals, as an evaluation of the
same models has them.

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
from vdrop_cli.settings.data_places import data_for
from vdrop_cli.tasks import RatingPredictor, Sentiment
from vdrop_cli.trained_model import Built, task_of
from vdrop_cli.uncertainty import fit_noise


@dataclass(frozen=True)
class Noise:
    """The standard deviation of observations about what the model means, and where it is from."""

    std: float
    origin: str
    scores_n: Tensor | None = None  # of `conformal_scores`


def noise_of(built: list[Built], predictor: RatingPredictor, settings: Predict, samples: int) -> Noise:
    """As `vdrop eval` fitted it for these checkpoints, passes and precision, else, of one model, as the
    standard approximation's errors give it.

    These hold the model's error, too, so that with the deviation over passes beside it an interval comes out
    a little too wide. They are in the checkpoint where the validation had just been made, else the training
    text is read for them. Conformal intervals take the noise and the scores of one evaluation.
    """
    first = built[0]
    part = predictor.learned.noise_part
    fitted = f"fitted to the {part} part"
    is_conformal = settings.interval is Interval.conformal
    if part == "train":
        if is_conformal:
            raise ConfigError(
                f"interval must be gaussian or quantile, got conformal: {first.path} was trained by the "
                "paper's protocol, which has no validation part; train with task.protocol=clean"
            )
        fitted += " (which the model has learnt: intervals are too narrow where it over-fits)"
    command = command_of(built, samples)
    without_scores = None
    for path, noise, results in evaluations(built, samples):
        scores = results.get("conformal_scores")
        if not is_conformal:
            return Noise(noise, f"{fitted} in {path}")
        if scores:
            scores_n = torch.tensor(scores, dtype=torch.float64)
            return Noise(noise, f"{fitted} in {path}, as the conformal scores", scores_n)
        without_scores = path
    if without_scores is not None:
        raise ConfigError(
            f"interval=conformal: {without_scores} has no conformal scores, as its ratings say little or an "
            f"older version wrote it; run {command} again, or choose another interval"
        )
    if is_conformal:
        raise ConfigError(
            f"interval=conformal takes the errors on the validation part; run {command} first, which "
            "measures them"
        )
    if len(built) > 1:
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
    assert isinstance(task, Sentiment)
    sample = task.sample(part)
    return Noise(fit_noise(task.predict(first.model, sample)[None], sample.ratings_R), fitted)


def evaluations(built: list[Built], samples: int) -> Iterator[tuple[Path, float, dict[str, Any]]]:
    """The files of evaluations of these checkpoints together, with their noise and results.

    That of several lies beside whichever was named first.
    """
    metric = f"noise_mc{samples}" if samples else "noise"
    digest = evaluation_files.members_digest([one.path for one in built]) if len(built) > 1 else ""
    precision = None if built[0].precision is built[0].checkpoint.train.precision else built[0].precision
    how = Evaluation(samples=samples, members=len(built), precision=precision)
    for one in built:
        for path in sorted(one.path.parent.glob("*.json")):
            made = evaluation_files.from_file(path, one.path.stem)
            if made is None or not how.includes(made) or digest not in path.stem:
                continue
            results = evaluation_files.read(path)
            # another checkpoint may have had the same name
            if metric not in results["metrics"] or results.get("epoch") != one.checkpoint.epoch:
                continue
            noise = results["metrics"][metric]
            if type(noise) is not float or not 0 < noise < math.inf:
                raise ConfigError(f"{path} is damaged; delete it and give the same vdrop eval command again")
            yield path, noise, results


def command_of(built: list[Built], samples: int) -> str:
    """The command that evaluates these checkpoints in this way."""
    words = [f"vdrop eval checkpoint={built[0].path}"]
    if len(built) > 1:
        words.append(f"members=[{','.join(str(one.path) for one in built[1:])}]")
    if samples:
        words.append(f"mc_samples={samples}")
    if built[0].precision is not built[0].checkpoint.train.precision:
        words.append(f"precision={built[0].precision}")
    return " ".join(words)
