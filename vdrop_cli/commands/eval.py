"""`vdrop eval`: perplexity or error of a checkpoint's model; only the corpus is not in the checkpoint."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from vdrop_cli import (
    evaluation,
    evaluation_files,
    evaluation_pictures,
    files,
    output,
    ownership,
    stored,
    tasks,
)
from vdrop_cli.device import choose_device, configure_process
from vdrop_cli.errors import RunError
from vdrop_cli.evaluation_report import print_results
from vdrop_cli.lock import Lock
from vdrop_cli.provenance import describe
from vdrop_cli.settings.choices import Interval
from vdrop_cli.settings.commands import Eval
from vdrop_cli.trained_model import evaluation_stem, find, member_paths, replaced


def run(settings: Eval) -> str:
    """Evaluates a checkpoint and writes the results beside it; returns "done" or "resumed"."""
    device = choose_device(settings.device)
    configure_process(device)
    assert settings.checkpoint is not None
    path = find(settings.checkpoint)
    version = files.version(path)
    first, task = evaluation.load(path, settings, device)
    _, snapshot, _, model, precision = first
    print(
        f"{path}: epoch {snapshot.epoch}, {files.printable(task.origin)}, {device}, back end "
        f"{model.layers.backend}, {precision}",
        file=sys.stderr,
    )
    evaluation_pictures.require_writable(settings)
    task.require_evaluable(settings, path)
    tasks.warn(task)
    if isinstance(task, tasks.OtherText):
        print(f"{files.printable(task.origin)}: {task.size}", file=sys.stderr)
    described = describe(device, model.layers.backend, precision.name)
    results: dict[str, Any] = {"checkpoint": str(path), "epoch": snapshot.epoch, "seed": settings.seed}
    paths = member_paths(path, settings.members)
    if settings.members:
        results["members"] = [str(member) for member in paths]
        results["checksums"] = [evaluation_files.checksum_of(member) for member in paths]
    how, digest = evaluation.describe_evaluation(settings, paths, task, precision, snapshot.train.precision)
    target = path.with_name(f"{how.stem(evaluation_stem(path), digest)}.json")
    if not ownership.is_run_file(target):  # of a checkpoint with a name of its own
        is_own = stored.readable_by(evaluation_files.parse)
        ownership.require_own(target, is_own, "give the checkpoint another name, or move that file away")
    with Lock(target.with_suffix(".lock"), str(target)):
        # A training with force=true may have begun since the checkpoint was read. None can begin from now on.
        if files.version(path) != version:
            raise replaced(path)
        files.remove_unfinished(target.parent, rf"{re.escape(target.stem)}\.(json|partial)")
        more, measured, is_resumed = evaluation.measure(first, task, paths, target, described, settings)
        results |= more | evaluation.stored_details(measured)
        if isinstance(task, tasks.OtherText):
            results["metrics"] = evaluation.file_metrics(results["metrics"])
            results["file"] = task.details
        if task.warnings:
            results["warnings"] = task.warnings
        results["environment"] = described
        evaluation.require_finite(results, path)
        if not settings.calibration:
            evaluation_files.add_earlier_calibration(results, target)
        write(target, results, settings.interval)
        target.with_suffix(".partial").unlink(missing_ok=True)
    evaluation_pictures.write(results, measured.assessment, settings)
    return "resumed" if is_resumed else "done"


def write(path: Path, results: dict[str, Any], interval: Interval | None) -> None:
    """The file first, then the table, so that nothing is lost where the latter cannot be shown."""
    try:
        files.replace(path, (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())
    except RunError as error:
        if output.is_written(lambda: print_results(results, interval)):
            raise RunError(f"{error}; the results are above") from None
        raise
    with output.stdout_errors_deferred():
        print_results(results, interval)
    print(f"\nwritten to {path}", file=sys.stderr)
