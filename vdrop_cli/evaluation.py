"""Evaluation of a checkpoint: which models, in which way, under which file name."""

import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from vdrop_cli import evaluation_files, runs, trained_model
from vdrop_cli.device import choose_mc_batch
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.mc_passes import PassOptions
from vdrop_cli.measured import Measured
from vdrop_cli.metric_names import OTHER_TEXT
from vdrop_cli.partial_evaluation import PartialEvaluation, run_passes
from vdrop_cli.policies import Policy
from vdrop_cli.run_files import RESULT
from vdrop_cli.settings.choices import Precision, TaskName
from vdrop_cli.settings.commands import Eval, require_task
from vdrop_cli.settings.data_places import data_for
from vdrop_cli.sinks import phase
from vdrop_cli.tasks import EvaluationTask, OtherText, TaskModel, WordPredictor, predictor_of
from vdrop_cli.temperature import NoTemperature
from vdrop_cli.trained_model import (
    BROKEN_WEIGHTS,
    TrainedModel,
    add_member,
    build,
    member_name,
    no_dropout,
    other_corpus,
    task_of,
)

FOR_ONE_TASK = {  # settings that are for models of one task only, by that task
    TaskName.language_model: ("calibration", "dropout_factors", "file", "mc_batch", "tempered"),
    TaskName.sentiment: ("interval",),
}


def load(path: Path, settings: Eval, device: torch.device) -> tuple[TrainedModel, EvaluationTask]:
    """Returns the model of a checkpoint or an export, and what it is evaluated on.

    This is the task that the model was trained on, or the text of a file. Raises ConfigError where the
    settings are not for such a model.
    """
    snapshot = trained_model.load(path)
    trained = snapshot.train
    if settings.mc_samples > 0 and trained.dropout.policy is Policy.none:
        raise no_dropout(path, settings.mc_samples, "0")
    if settings.word_dropout and trained.dropout.p_word == 0:
        raise ConfigError(f"word_dropout must be false or null, {path} was trained without it, got true")
    for needed, names in FOR_ONE_TASK.items():
        require_task(settings, names, needed, trained.task.name, path)
    if settings.file is not None:
        predictor = predictor_of(snapshot.knowledge, device)
        assert isinstance(predictor, WordPredictor)  # as the task is language modelling
        text = OtherText(settings.file, predictor, trained.data)
        return build(path, snapshot, predictor, settings, device), text
    allowed = "stored_data=true, if the checkpoint is from a source that you trust"
    data = data_for(trained.data, settings.data, settings.stored_data, f"checkpoint={path}", allowed)
    with phase("loading the data"):
        task = task_of(path, snapshot, data, device)
    return build(path, snapshot, task.predictor, settings, device), task


def describe_evaluation(
    settings: Eval, paths: list[Path], task: EvaluationTask, precision: Precision, trained: Precision
) -> tuple[Evaluation, str]:
    """Returns how checkpoints are evaluated, and for several of them eight hex digits that name them.

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
        text_digest=task.fingerprint[:8] if isinstance(task, OtherText) else "",
        scaled="_".join(map(evaluation_files.factor_name, settings.dropout_factors)),
    )
    return how, evaluation_files.members_digest(map(member_name, paths)) if len(paths) > 1 else ""


def load_members(
    first: TrainedModel, paths: list[Path], settings: Eval, device: torch.device, members: dict[str, Path]
) -> Iterator[TaskModel]:
    """Yields the first model and those of the other checkpoints, one at a time, and adds each to `members`.
    With several, prints the epoch of each, and warns of one whose run is not finished. Raises ConfigError
    where one was trained on another corpus, or is the same as one before it.
    """
    add_member(members, first)
    if len(paths) > 1:
        print_epoch(first)
    yield first.model
    for path in paths[1:]:
        member, _ = load(path, settings, device)
        if member.checkpoint.corpus != first.checkpoint.corpus:
            raise other_corpus(path, first.path)
        add_member(members, member)
        print_epoch(member)
        yield member.model


def print_epoch(member: TrainedModel) -> None:
    """Prints the epoch of a member, and warns if its run is not finished."""
    folder = member.path.parent
    print(f"{member.path}: epoch {member.checkpoint.epoch}", file=sys.stderr)
    if runs.is_run(folder) and not (folder / RESULT).exists():
        print(
            f"vdrop: {folder} is not finished, so this average is of an epoch before its last",
            file=sys.stderr,
        )


def evaluate_members(
    task: EvaluationTask, models: Iterable[TaskModel], settings: Eval, path: Path
) -> Measured:
    """Returns the metrics of the standard approximation that the settings ask for.

    `path` is the first checkpoint. Raises RunError where no temperature in the allowed range is the best.
    """
    what = "evaluating by the standard approximation" if settings.mc_samples else "evaluating"
    with phase("choosing the temperature on the validation text" if settings.tempered else what):
        try:
            return task.measure_standard(models, settings)
        except NoTemperature as error:
            raise RunError(f"{path}: {error}; take another checkpoint of the run") from None


def stored_details(measured: Measured) -> dict[str, Any]:
    """Returns the parts of the result file other than metrics and MC passes.

    Prints the reason where conformal intervals are left out.
    """
    details: dict[str, Any] = {}
    if tables := {name: rows for name, rows in measured.tables.items() if name != "mc"}:
        details["tables"] = tables
    if measured.assessment is not None:
        for problem in measured.assessment.problems:
            print(f"vdrop: {problem}", file=sys.stderr)
        if measured.assessment.scores_n is not None:
            details["conformal_scores"] = measured.assessment.scores_n.tolist()
    return details


def pass_options(task: EvaluationTask, settings: Eval, mc_batch: int) -> PassOptions:
    """Returns the options of MC passes.

    Where the settings do not say whether words are dropped, the task decides.
    """
    word_dropout = task.word_dropout if settings.word_dropout is None else settings.word_dropout
    return PassOptions(
        settings.mc_samples,
        mc_batch,
        settings.seed,
        word_dropout,
        tuple(settings.dropout_factors),
        settings.calibration,
    )


def measure(
    first: TrainedModel,
    task: EvaluationTask,
    paths: list[Path],
    target: Path,
    described: dict[str, Any],
    settings: Eval,
) -> tuple[dict[str, Any], Measured, bool]:
    """Returns the content of the result file, all measurements, and whether saved passes were resumed.

    The content is metrics and MC passes. `first` is the model of the first of `paths`, `target` the result
    file, and `described` the environment that it records.
    """
    mc_batch = choose_mc_batch(settings.mc_batch, task.device, first.model.dropout.p_weight)
    calibration = task.measure_calibration(first.model, settings)
    members = dict[str, Path]()
    models = load_members(first, paths, settings, task.device, members)
    if settings.mc_samples == 0:
        measured = evaluate_members(task, models, settings, first.path)
        results: dict[str, Any] = {"metrics": measured.metrics | calibration.metrics}
        results["models"] = sorted(members)
        return results, measured._replace(tables=calibration.tables | measured.tables), False
    partial = PartialEvaluation.for_settings(target, paths, task, mc_batch, described, settings)
    all_models = list(models)
    options = pass_options(task, settings, mc_batch)
    dropout = first.model.dropout
    if not settings.members and not (dropout if options.word_dropout else dropout.without_words()).drops:
        kinds = (
            "nothing" if options.word_dropout or not dropout.drops else "words alone, which these passes keep"
        )
        print(
            f"vdrop: all passes are the same: {first.path} drops {kinds}; mc_samples=0 is enough",
            file=sys.stderr,
        )
    passes = task.passes(all_models, options)
    is_resumed = partial.load(passes)
    if not partial.metrics:
        partial.metrics = evaluate_members(task, all_models, settings, first.path).metrics
    run_passes(passes, partial)
    measured = passes.results()
    results = {
        "metrics": partial.metrics | calibration.metrics | measured.metrics,
        "word_dropout": options.word_dropout,
        "mc": measured.tables["mc"],
        "mc_seconds": partial.seconds,
        "models": sorted(members),
    }
    return results, measured._replace(tables=calibration.tables | measured.tables), is_resumed


def file_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Renames metrics `test_…` to `file_…`, their names where a text of a file is evaluated."""
    return {re.sub("^test_", f"{OTHER_TEXT}_", name): value for name, value in metrics.items()}


def require_finite(results: dict[str, Any], path: Path) -> None:
    """Raises RunError where a result is not finite: finite weights can still lead to an overflow."""
    rows = [*results.get("mc", []), *(row for table in results.get("tables", {}).values() for row in table)]
    numbers = [*results["metrics"].items(), *(pair for row in rows for pair in row.items())]
    broken = [
        f"{name} is {value}"
        for name, value in numbers
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if broken:
        raise RunError(f"{path}: {broken[0]}; {BROKEN_WEIGHTS}, take another checkpoint")
