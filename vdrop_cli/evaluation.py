"""Evaluation of a checkpoint: which models, in which way, under which file name."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vdrop_cli import checkpoint, evaluation_files
from vdrop_cli.checkpoint import Checkpoint
from vdrop_cli.device import choose_mc_batch
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.measured import Measured
from vdrop_cli.model import LanguageModel
from vdrop_cli.partial_evaluation import PartialEvaluation, run_passes
from vdrop_cli.policies import Policy
from vdrop_cli.settings.choices import Interval, Precision, TaskName
from vdrop_cli.settings.commands import Eval
from vdrop_cli.settings.data_places import data_for
from vdrop_cli.sinks import phase
from vdrop_cli.tasks import LanguageModelling, Passes, Sentiment, Task, TaskModel
from vdrop_cli.trained_model import build, task_of


class Loaded(NamedTuple):
    """A model with the weights of a checkpoint, and the task that it was trained on."""

    path: Path
    checkpoint: Checkpoint
    task: Task
    model: TaskModel
    precision: Precision


def load(named: str, settings: Eval, device: torch.device) -> Loaded:
    path = checkpoint.find(named)
    snapshot = checkpoint.load(path)
    trained = snapshot.train
    if settings.mc_samples > 0 and trained.dropout.policy is Policy.none:
        raise ConfigError(
            f"mc_samples must be 0, {path} was trained without dropout, got {settings.mc_samples}"
        )
    if settings.word_dropout and trained.dropout.p_word == 0:
        raise ConfigError(f"word_dropout must be false or null, {path} was trained without it, got true")
    if settings.calibration and trained.task.name is not TaskName.language_model:
        raise ConfigError(
            f"calibration is for language models, {path} is a model of ratings, which always have such "
            "measures; leave it out"
        )
    if settings.dropout_factors and trained.task.name is not TaskName.language_model:
        raise ConfigError(
            f"dropout_factors are for language models, {path} is a model of ratings; leave them out"
        )
    if settings.tempered and trained.task.name is not TaskName.language_model:
        raise ConfigError(f"tempered is for language models, {path} is a model of ratings; leave it out")
    if settings.members and settings.mc_samples and trained.task.name is TaskName.language_model:
        raise ConfigError(
            f"members must be empty with mc_samples, {path} is a language model, whose members are averaged "
            f"by the standard approximation, got {len(settings.members)}"
        )
    allowed = "stored_data=true, if the checkpoint is from a source that you trust"
    data = data_for(trained.data, settings.data, settings.stored_data, f"checkpoint={path}", allowed)
    with phase("loading the data"):
        task = task_of(path, snapshot, data, device)
    built = build(path, snapshot, task.predictor, settings, device)
    return Loaded(path, snapshot, task, built.model, built.precision)


def describe_evaluation(
    settings: Eval, paths: list[Path], task: Task, precision: Precision, trained: Precision
) -> tuple[Evaluation, str]:
    """How checkpoints are evaluated, and eight hex digits that name several.

    `trained` is the precision of their training.
    """
    is_default = settings.mc_samples == 0 or settings.word_dropout in (None, task.word_dropout)
    how = Evaluation(
        samples=settings.mc_samples,
        members=len(paths),
        seed=settings.seed,
        word_dropout=None if is_default else settings.word_dropout,
        precision=None if precision is trained else precision,
        tempered=settings.tempered,
        scaled="_".join(f"{factor:g}" for factor in settings.dropout_factors),
    )
    return how, evaluation_files.members_digest(paths)


def models(
    paths: list[Path], settings: Eval, device: torch.device, fingerprint: str, first: Path
) -> Iterator[TaskModel]:
    """Of members, one at a time. Raises ConfigError unless `fingerprint` is that of their corpus, which is
    the one of the checkpoint `first`.
    """
    for path in paths:
        loaded = load(str(path), settings, device)
        if loaded.task.fingerprint != fingerprint:
            raise ConfigError(
                f"members: {path} was trained on another corpus than {first}, or another split of it; "
                "average models of the same words"
            )
        yield loaded.model


def standard(task: Task, members: list[TaskModel]) -> Measured:
    """What the standard approximation gives, of one model or several."""
    return task.ensemble(members) if len(members) > 1 else task.evaluate(members[0])


def without_passes(
    task: Task, model: TaskModel, paths: list[Path], settings: Eval, device: torch.device
) -> Measured:
    """What the settings ask for where they ask for no MC passes; `model` is that of the first path. Raises
    RunError where no temperature is the best.
    """
    if settings.tempered:
        assert isinstance(task, LanguageModelling)  # `load` refuses others
        with phase("choosing the temperature on the validation text"):
            try:
                return task.tempered(model)
            except ValueError as error:
                raise RunError(f"{paths[0]}: {error}; take another checkpoint of the run") from None
    with phase("evaluating"):
        members = models(paths, settings, device, task.fingerprint, paths[0])
        return task.ensemble(members) if settings.members else task.evaluate(model)


def require_intervals(interval: Interval | None, task: Task, path: Path) -> None:
    """Raises ConfigError where a task has no intervals of that kind."""
    if interval is None:
        return
    if not isinstance(task, Sentiment):
        raise ConfigError(f"interval is for ratings, {path} is a language model; leave it out")
    if interval is Interval.conformal and task.noise_part == "train":
        raise ConfigError(
            f"interval must be gaussian, quantile or null, got conformal: {path} was trained by the paper's "
            "protocol, which has no validation part; train with task.protocol=clean"
        )


def details(measured: Measured) -> dict[str, Any]:
    """What an evaluation's file has beside metrics and MC passes. Prints why intervals are left out."""
    stored_details: dict[str, Any] = {}
    if tables := {name: rows for name, rows in measured.tables.items() if name != "mc"}:
        stored_details["tables"] = tables
    if measured.assessment is not None:
        for problem in measured.assessment.problems:
            print(f"vdrop: {problem}", file=sys.stderr)
        if measured.assessment.scores_n is not None:
            stored_details["conformal_scores"] = measured.assessment.scores_n.tolist()
    return stored_details


def word_dropout(task: Task, settings: Eval) -> bool:
    """Whether it is on in MC passes."""
    return task.word_dropout if settings.word_dropout is None else settings.word_dropout


def passes(task: Task, members: list[TaskModel], settings: Eval, mc_batch: int) -> Passes:
    """MC dropout as the settings ask for it, of one model or several."""
    with_words = word_dropout(task, settings)
    if len(members) > 1:
        assert isinstance(task, Sentiment)  # `load` refuses others
        return task.pooled_passes(members, settings.mc_samples, settings.seed, with_words)
    (model,) = members
    if settings.calibration:
        assert isinstance(task, LanguageModelling)  # `load` refuses others
        return task.next_word_passes(model, settings.mc_samples, mc_batch, settings.seed, with_words)
    if settings.dropout_factors:
        assert isinstance(task, LanguageModelling)  # `load` refuses others
        how = (settings.mc_samples, mc_batch, settings.seed, with_words)
        try:
            return task.scaled_passes(model, settings.dropout_factors, *how)
        except ValueError as error:
            raise ConfigError(f"dropout_factors: {error}; leave out the larger ones") from None
    return task.passes(model, settings.mc_samples, mc_batch, settings.seed, with_words)


def next_word(task: Task, model: TaskModel) -> Measured:
    """How sure the standard approximation is of the next word."""
    assert isinstance(task, LanguageModelling)
    with phase("measuring how sure the standard approximation is of the next word"):
        return task.next_word(model)


def measure(
    loaded: Loaded, paths: list[Path], target: Path, described: dict[str, Any], settings: Eval
) -> tuple[dict[str, Any], Measured, bool]:
    """Returns the metrics and the MC passes as the file of results has them, all that was measured, and
    whether saved passes were resumed.
    """
    path, _, task, model, _ = loaded
    device = task.device
    p_weight = model.dropout.p_weight if isinstance(model, LanguageModel) else 0.0
    mc_batch = choose_mc_batch(settings.mc_batch, device, p_weight)
    calibration = next_word(task, model) if settings.calibration else Measured({}, {})
    if settings.mc_samples == 0:
        measured = without_passes(task, model, paths, settings, device)
        metrics = measured.metrics | calibration.metrics
        return {"metrics": metrics}, measured._replace(tables=calibration.tables | measured.tables), False
    partial = PartialEvaluation.for_settings(target, paths, task, mc_batch, described, settings)
    members = [model, *models(paths[1:], settings, device, task.fingerprint, path)]
    mc = passes(task, members, settings, mc_batch)
    resumed = partial.load(mc)
    with phase("evaluating by the standard approximation"):
        partial.metrics = partial.metrics or standard(task, members).metrics
    run_passes(mc, partial)
    measured = mc.results()
    results = {
        "metrics": partial.metrics | calibration.metrics | measured.metrics,
        "word_dropout": word_dropout(task, settings),
        "mc": measured.tables["mc"],
        "mc_seconds": partial.seconds,
    }
    return results, measured._replace(tables=calibration.tables | measured.tables), resumed


def require_finite(results: dict[str, Any], path: Path) -> None:
    """Raises RunError where a result is no number: weights that are finite can still overflow."""
    rows = [*results.get("mc", []), *(row for table in results.get("tables", {}).values() for row in table)]
    numbers = [*results["metrics"].items(), *(pair for row in rows for pair in row.items())]
    broken = [
        f"{name} is {value}"
        for name, value in numbers
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if broken:
        raise RunError(
            f"{path}: {broken[0]}; its weights are not those of a model that works, take another checkpoint "
            "of the run"
        )
