"""Records: copies of the small files of runs, below outputs/record."""

import re
from pathlib import Path

from vdrop_cli import RECORDS, evaluation_files, files, ownership, runs
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.run_files import CONFIG, LOG, RESULT, SHARED_DEVICE, STUCK
from vdrop_cli.runs import Finished, Logged, Stuck
from vdrop_cli.sinks import read_log
from vdrop_cli.studies import rows
from vdrop_cli.studies.rows import Collected


def write(names: dict[str, str], collected: Collected, folder: Path) -> None:
    """Copies the small files of runs into records.

    `names` are the names of the records' folders, by the keys of the runs. Raises ConfigError, with nothing
    copied, if the folder of a record has something else in it, or if evaluations would be lost.
    """
    targets: dict[Path, Finished | Stuck] = {}
    for key, name in names.items():
        ended: list[Finished | Stuck] = [*collected.finished.get(key, []), *collected.stuck.get(key, [])]
        for run in ended:
            device = re.sub(r"\W+", "_", str(run.environment["device"])).lower()
            target = folder / f"{name}-{run.train.precision}-{device}" / f"s{run.train.seed}"
            if target.resolve() != run.folder.resolve() and not is_shipped(run, folder):
                require_replaceable(run, target)
                targets[target] = run
    for target, run in targets.items():
        copy(run, target)


def is_shipped(run: Logged, folder: Path) -> bool:
    """Whether a run is a record of the checkout, while `folder` is that of other outputs."""
    return (
        RECORDS is not None and folder.resolve() != RECORDS and run.folder.resolve().is_relative_to(RECORDS)
    )


def require_replaceable(run: Finished | Stuck, target: Path) -> None:
    """Raises ConfigError if the record in `target` must not be replaced by this run: it is of other settings
    or another text, or would lose a result or evaluations.
    """
    ownership.require_record(target)
    if (target / CONFIG).exists():
        try:
            log = read_log(target / LOG)
            if log:
                runs.require_start(target, log)
            old = runs.with_settings(target, lambda config: Logged(target, config, log))
        except ConfigError as error:
            raise ConfigError(f"{error}; move the record away") from None
        if rows.key(old.numbers) != rows.key(run.numbers) or (old.log and old.corpus != run.corpus):
            raise ConfigError(f"{target} is the record of a run with other settings or text; move it away")
    if isinstance(run, Finished):
        require_evaluations(run, target)
    elif (target / RESULT).exists():  # which could not be read
        raise ConfigError(
            f"{target} holds a result, and would be overwritten by a run that is stuck; move it away"
        )


def require_evaluations(run: Finished, target: Path) -> None:
    """Raises ConfigError if a record has evaluations that the run lacks, unless both have the same log and
    result.
    """
    parts = [(target / name, run.folder / name) for name in (LOG, RESULT)]
    if all(files.read(old) == files.read(new) for old, new in parts if old.exists()):
        return
    own = set(map(evaluation_files.same_kind, run.evaluations))
    if lacking := [
        path.name for path in evaluations_in(target) if evaluation_files.same_kind(path) not in own
    ]:
        how = f"evaluate it in the same way (vdrop eval checkpoint={run.folder} …), or move them away"
        raise ConfigError(f"{target} would lose {', '.join(lacking)}, which {run.folder} lacks; {how}")


def evaluations_in(record: Path) -> list[Path]:
    """Files of evaluations, of any epoch."""
    names = rf"{ownership.EVALUATION}\.json"
    return [path for path in ownership.entries(record) if ownership.matches(names, path)]


def copy(run: Finished | Stuck, target: Path) -> None:
    """Replaces an older record. Its evaluations that the run lacks stay.

    All files are read before the record changes. The file with the outcome is removed first and written last.
    So if this is interrupted, the record does not count as a run that has ended. Raises ConfigError where a
    file cannot be read, RunError where the record cannot be written.
    """
    own, outcome = (run.evaluations, RESULT) if isinstance(run, Finished) else ([], STUCK)
    shared = [path for path in [run.folder / SHARED_DEVICE] if path.exists()]
    contents = {
        path.name: read(path)
        for path in (run.folder / CONFIG, run.folder / LOG, *shared, *own, run.folder / outcome)
    }
    kinds = set(map(evaluation_files.same_kind, own))
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in (*ownership.OUTCOMES, SHARED_DEVICE):
            (target / name).unlink(missing_ok=True)
        for old in evaluations_in(target):
            if evaluation_files.same_kind(old) in kinds:
                old.unlink()
    except OSError as error:
        raise RunError(
            f"{target} cannot be written ({error.strerror}); make it writable, or leave out record=true"
        ) from None
    for name, content in contents.items():
        files.replace(target / name, content)


def read(path: Path) -> bytes:
    with files.reading(path, "put it back as it was"):
        return files.read(path)
