"""Runs on disk: their settings, logs and results."""

import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from omegaconf.errors import OmegaConfBaseException

from vdrop_cli import evaluation_files, files, stored, stuck_starts
from vdrop_cli.errors import ConfigError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.explain import explain
from vdrop_cli.files import Damaged
from vdrop_cli.run_files import CONFIG, LOG, RESULT, SHARED_DEVICE, STUCK, checkpoint_name
from vdrop_cli.settings.compose import restore
from vdrop_cli.settings.fields import flatten, plain
from vdrop_cli.settings.train import Train
from vdrop_cli.sinks import ADVICE, read_log, read_result
from vdrop_cli.stuck_starts import StuckStart


@dataclass(frozen=True)
class Logged:
    """A run folder or a record of one: settings and log."""

    folder: Path
    config: dict[str, Any]
    log: list[dict[str, Any]]

    @cached_property
    def train(self) -> Train:
        return restore(self.config)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings by their full names. Missing ones have their defaults."""
        return flatten(plain(self.train))

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """The settings that change the numbers; runs of one row share them."""
        return self.train.numbers()

    @property
    def corpus(self) -> str:
        """Returns the fingerprint of the run's corpus."""
        return str(self.log[0]["corpus"])

    @property
    def environments(self) -> list[dict[str, Any]]:
        """The environments in which the run was started and resumed."""
        return [record["environment"] for record in self.log if record["kind"] == "start"]

    @property
    def environment(self) -> dict[str, Any]:
        """The last environment."""
        return self.environments[-1]

    @property
    def machines(self) -> set[tuple[Any, ...]]:
        """Device, model of the processor and threads of every start; what is not known is None."""
        return {tuple(map(one.get, ("device", "processor_model", "threads"))) for one in self.environments}


def are_on_one_machine(runs: Iterable[Logged]) -> bool:
    """Returns whether all starts of some runs were on one machine with one number of threads."""
    return len({machine for run in runs for machine in run.machines}) <= 1


@dataclass(frozen=True)
class Finished(Logged):
    """A run that has a result."""

    result: dict[str, Any]
    record: "Finished | None" = None  # of an earlier run with the same settings, which this run replaces

    @property
    def epochs(self) -> list[dict[str, Any]]:
        return [record for record in self.log if record["kind"] == "epoch"]

    @property
    def has_whole_log(self) -> bool:
        """Whether the log begins at the first step. A log that was lost begins where the run resumed."""
        return bool(self.epochs) and self.epochs[0]["epoch"] == 1

    @property
    def has_shared_device(self) -> bool:
        """Whether other runs shared the device, so that the times in the log do not show the run's speed."""
        return (self.folder / SHARED_DEVICE).exists()

    @property
    def words_per_second(self) -> float | None:
        """Returns words per second in training, the median over the epochs.

        None where the log has no epochs, where the device was shared, or where the run was resumed on another
        machine or with another number of threads.
        """
        timed = [] if self.has_shared_device or not are_on_one_machine([self]) else self.epochs
        return float(median(epoch["words_per_second"] for epoch in timed)) if timed else None

    @property
    def hours(self) -> float:
        """Hours of training with its validations, without the evaluation at the end.

        Where the device was shared, the run alone would have taken fewer.
        """
        return float(self.result["seconds"]) / 3600

    @property
    def evaluations(self) -> list[Path]:
        """The files that `vdrop eval` wrote for the epoch that is reported.

        Evaluations of other texts, and of checkpoints within the epoch after it, are left out.
        """
        epoch = f"{self.result['epoch']:04}"
        made = {
            path: evaluation_files.from_file(path, f"checkpoint-{epoch}")
            for path in sorted(self.folder.glob(f"eval-{epoch}-*.json"))
        }
        return [path for path, how in made.items() if how is not None and not how.text_digest]

    @property
    def lineage(self) -> Iterator["Finished"]:
        """Yields the run itself, then the records of earlier runs that it replaces."""
        one: Finished | None = self
        while one is not None:
            yield one
            one = one.record

    @property
    def passes(self) -> set[int]:
        """Returns the numbers of MC samples of those evaluations that otherwise have the default options."""
        made = map(evaluation_files.from_file, self.evaluations)
        return {
            one.samples
            for one in made
            if one is not None and one.samples and Evaluation(one.samples).includes(one)
        }


@dataclass(frozen=True)
class Stuck(Logged):
    """A run that has ended after its first steps, because its start is stuck."""

    start: StuckStart


@dataclass(frozen=True)
class Unfinished(Logged):
    """A run without a result. `state`: stuck or unfinished; the latter may still be trained."""

    state: str


Read = TypeVar("Read", bound=Logged)
ENVIRONMENT_COLUMNS = ("precision", "device", "date", "commit")


def merge_environments(environments: Iterable[dict[str, Any]]) -> list[str]:
    """Returns a text for each of ENVIRONMENT_COLUMNS; where environments differ, it has all their values."""
    columns = zip(*map(environment_cells, environments), strict=True)
    return ["; ".join(dict.fromkeys(texts)) for texts in columns]


def code_differed(environments: Iterable[dict[str, Any]]) -> bool | None:
    """Whether any was made with code that differed from its commit; None: unknown."""
    dirty = [environment.get("dirty") for environment in environments]
    return True if True in dirty else None if None in dirty else False


def environment_cells(environment: dict[str, Any]) -> list[str]:
    """Returns a text for each of ENVIRONMENT_COLUMNS.

    The device has its number of threads. The commit has a star where the code differed from it, and a
    question mark where this is unknown.
    """
    threads = environment.get("threads")
    device = str(environment.get("device", "–")) + (
        f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
    )
    mark = {True: "*", None: "?" if "commit" in environment else ""}.get(environment.get("dirty"), "")
    commit = str(environment.get("commit", "–"))[:7] + mark
    return [str(environment.get("precision", "–")), device, str(environment.get("date", "–")), commit]


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder."""
    return os.path.lexists(folder / CONFIG)


def read_any(folder: Path) -> Finished | Unfinished:
    """A run, whether it is finished or not. Raises ConfigError."""
    if os.path.lexists(folder / RESULT):
        return read(folder)
    require_run(folder)
    state = "stuck" if os.path.lexists(folder / STUCK) else "unfinished"
    log = read_log(folder / LOG)
    if log:
        require_start(folder, log)
    return with_settings(folder, lambda config: Unfinished(folder, config, log, state))


def require_run(folder: Path) -> None:
    if not is_run(folder):
        raise ConfigError(
            f"{folder} is not a run folder, it has no config.yaml; name folders below outputs/train"
        )


def read(folder: Path) -> Finished:
    """A finished run. Raises ConfigError."""
    require_run(folder)
    log, result = read_log(folder / LOG), read_result(folder)
    require_start(folder, log)
    if not log[0].get("step") and all(record["kind"] != "epoch" for record in log):
        raise ConfigError(f"{folder / LOG} is damaged, its epochs are not there; {ADVICE}")
    run = with_settings(folder, lambda config: Finished(folder, config, log, result))
    last = run.epochs[-1]["epoch"] if run.epochs else log[0]["epoch"]
    if last != result["epochs"]:
        raise ConfigError(
            f"{folder / LOG} is damaged, its last epoch is {last}, of {result['epochs']} that were "
            f"trained; {ADVICE}"
        )
    return run


def read_stuck(folder: Path) -> Stuck | None:
    """A run whose start is stuck; None where it is not."""
    start = stuck_starts.read(folder)
    if start is None:
        return None
    log = read_log(folder / LOG)
    require_start(folder, log)
    return with_settings(folder, lambda config: Stuck(folder, config, log, start))


def require_start(folder: Path, log: list[dict[str, Any]]) -> None:
    """Raises ConfigError unless a log begins with a start that names the text, and all name a device."""
    path, kinds = folder / LOG, [record["kind"] for record in log]
    if kinds[:1] != ["start"]:
        raise ConfigError(f"{path} is damaged: its start is missing; {ADVICE}")
    if not isinstance(log[0].get("corpus"), str):
        raise ConfigError(f"{path} is damaged: its start does not name the text; {ADVICE}")
    if not all(
        isinstance(record["environment"].get("device"), str) for record in log if record["kind"] == "start"
    ):
        raise ConfigError(
            f"{path} is damaged, a start names no device; put it back as it was, or train again with "
            "force=true"
        )


def with_settings(folder: Path, make: Callable[[dict[str, Any]], Read]) -> Read:
    """Returns `make(config)` for a run's configuration; raises ConfigError where it cannot be read."""
    path = folder / CONFIG
    try:
        made = make(stored.read_yaml(path))
        _ = made.train  # computed now, so that its errors are reported here
        return made
    except OSError as error:
        raise files.read_error(path, error) from None
    except (Damaged, ConfigError, OmegaConfBaseException, ValueError, OverflowError, TypeError) as error:
        raise ConfigError(
            f"{path} is of another version of vdrop, or damaged ({explain(error, 'train')})"
        ) from None


def below(folder: Path) -> list[Finished]:
    """All finished runs below a folder; prints a message for each that this version cannot read."""
    return read_all(folder, RESULT, read)


def stuck_below(folder: Path) -> list[Stuck]:
    """All stuck runs below a folder, in the same way."""
    return read_all(folder, STUCK, read_stuck)


def read_all(folder: Path, name: str, read: Callable[[Path], Read | None]) -> list[Read]:
    """Returns what `read` returns for each folder below that has a file of this name.

    Prints a message for each that cannot be read; None is left out.
    """
    runs_below = []
    for run_folder in folders_with(folder, name):
        try:
            run = read(run_folder)
        except ConfigError as error:
            print(f"vdrop: {error}; left out", file=sys.stderr)
        else:
            runs_below += [run] if run is not None else []
    return runs_below


def folders_with(folder: Path, name: str) -> list[Path]:
    """Returns the folder and those below in which something has this name, sorted.

    Links to folders are followed, each folder counts once: by its own path where it lies below, else by that
    of a link. Prints a message for each folder that cannot be read.
    """

    def report(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # missing, or removed meanwhile
            print(f"vdrop: {error.filename} cannot be read ({error.strerror}); left out", file=sys.stderr)

    with_name, visited = list[Path](), set[tuple[int, int]]()
    tops = [folder]
    while tops:  # links come after all that is here without them
        for place, inner, names in os.walk(tops.pop(0), onerror=report):
            try:
                status = os.stat(place)
            except OSError as error:
                report(error)
                continue
            if (status.st_dev, status.st_ino) in visited:
                inner.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            inner.sort()
            tops += [path for one in inner if (path := Path(place, one)).is_symlink()]
            if name in (*names, *inner):
                with_name.append(Path(place))
    return sorted(with_name)


def evaluation_of(
    run: Finished, evaluation: Evaluation, members: Collection[int] = ()
) -> dict[str, Any] | None:
    """Returns the results of a run's evaluation; None where no such evaluation exists.

    Where the run has none, the evaluations of the records that it replaces count. `members` are the seeds of
    the runs that are averaged.
    """
    for path in (path for one in run.lineage for path in one.evaluations):
        made = evaluation_files.from_file(path)
        if made is None or not evaluation.includes(made):
            continue
        results = evaluation_files.read(path)
        if evaluation.members > 1:
            evaluation_files.require_fields(results, path, "members")
            names = results["members"]
            is_of_row = evaluation_files.are_seeds_of_one_run(names, members)
            sums = results.get("checksums", [""] * len(names))
            if not is_of_row or not are_reported_models(run.folder.parent, names, sums):
                continue
        if evaluation.samples:
            evaluation_files.require_fields(results, path, "mc")
        return results
    return None


def reports(folder: Path, checkpoint: str) -> bool:
    """Whether a run is finished and reports the checkpoint of this name."""
    return (folder / RESULT).exists() and checkpoint_name(read_result(folder)["epoch"]) == checkpoint


def are_reported_models(folder: Path, members: Iterable[str], checksums: Iterable[str]) -> bool:
    """Whether checkpoints, by their paths, are still those that their runs report.

    Each must be of the epoch that its run reports, and still have its checksum, since a run may have been
    trained again. A checkpoint of a run that is not finished does not count. Runs, records and checkpoints
    that are missing from the folder are not checked.
    """
    for path, checksum in zip(map(Path, members), checksums, strict=False):
        present = evaluation_files.checksum_of(folder / path.parent.name / path.name)
        if checksum and present and checksum != present:
            return False
        seed = path.parent.name.rpartition("-s")[2]
        same_run = filter(is_run, (folder / path.parent.name, folder / f"s{seed}"))
        if not all(reports(run_folder, path.name) for run_folder in same_run):
            return False
    return True
