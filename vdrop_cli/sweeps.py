"""Sweeps: records the outcome of each job, under any launcher, and prints the summary at the end."""

import importlib
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_origin

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, read_write
from omegaconf.errors import OmegaConfBaseException

from vdrop_cli import files, interruption, launchers, output, ownership, stored
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.explain import explain
from vdrop_cli.files import Damaged, lacks_memory
from vdrop_cli.settings.commands import ROOTS
from vdrop_cli.settings.compose import parse, register
from vdrop_cli.settings.train import Train


@dataclass
class Outcome:
    """What became of a job. `status`: done, resumed, was done, failed, interrupted, or begun and not
    ended.
    """

    overrides: list[str]
    status: str = "begun"
    code: int = 0  # as an exit code
    reason: str = ""
    started_over: bool = False  # force=true has had its effect, and is not to have it again


FIELDS: dict[str, Any] = {f.name: get_origin(f.type) or f.type for f in fields(Outcome)}
RESUMES = ("train", "eval")  # commands that save what they have when they are asked to stop
GOOD = ("done", "resumed", "was done")
STOPPED = "the sweep was stopped"
CONTINUES = "it is no longer waited for, and continues where it runs"
TOO_LARGE = (
    "there is not enough memory for a model and batch of that size; make model.hidden_size, "
    "model.layers or task.batch_size smaller"
)
SUMMARY = "summary.json"  # in the folder of a sweep
SETTINGS = "multirun.yaml"  # there, by Hydra
OUTCOME_SIZE = 10_000_000  # bytes, at most
STOP = "stop"  # in the folder of a sweep: the processes of a pool that work for it are to stop
# after so many time limits a job of SLURM's is not requeued any more, as something must be wrong with it
TIMEOUTS = 1000


def is_slurm(launcher: str) -> bool:
    return launcher.endswith(".SlurmLauncher")


def starts_over(override: str) -> bool:
    return re.fullmatch(r"\+{0,2}force=.*", override) is not None


@dataclass
class Job:
    """What Hydra calls with each composed configuration, in this process or another."""

    command: str
    composed: bool = False
    outcome: Outcome = field(default_factory=lambda: Outcome([]))
    folder: Path | None = None  # of the sweep, where outcomes are written
    pool_of: int | None = None  # the process in whose pool it is called

    def __call__(self, config: DictConfig) -> None:
        output.prepare()  # of a worker, too
        hydra_config = HydraConfig.get()
        self.composed = True
        self.outcome = Outcome([str(override) for override in hydra_config.overrides.task])
        if hydra_config.mode is RunMode.MULTIRUN:
            assert self.folder is not None
            if self.pool_of not in (None, os.getpid()):
                interruption.join_pool(self.folder / STOP, self.pool_of, job_saves=self.command in RESUMES)
            try:
                self.perform(config, outcome_path(self.folder, hydra_config.job.num))
            finally:
                interruption.leave_job()
        else:
            self.perform(config, None)

    def perform(self, config: DictConfig, path: Path | None) -> None:
        """Runs it, and writes its outcome."""
        outcome = self.outcome
        outcome.started_over = (
            path is not None and read(path).started_over
        )  # as of a job that SLURM has requeued
        write(outcome, path)

        def started_over() -> None:
            outcome.started_over = True
            write(outcome, path)

        try:
            register()
            settings: object = parse(config, ROOTS[self.command])
            run = importlib.import_module(f"vdrop_cli.commands.{self.command}").run
            if isinstance(settings, Train):
                run = partial(run, started_over=started_over, from_nothing=settings.force)
                settings = replace(settings, force=settings.force and not outcome.started_over)
            with interruption.listening() if self.command in RESUMES else nullcontext():
                try:
                    interruption.check()
                    outcome.status = run(settings) or "done"
                except interruption.Interrupted as stop:
                    outcome.status, outcome.code, outcome.reason = "interrupted", stop.exit_code, str(stop)
                    if stop.told:
                        again = shlex.join(
                            override for override in outcome.overrides if not starts_over(override)
                        )
                        outcome.reason += f"; resume with: vdrop {self.command} {again}"
                    tell(outcome)
                    write(outcome, path)  # now, as this process may end before the next line
                    raise
        except interruption.Interrupted:
            return
        except (ConfigError, OmegaConfBaseException) as error:
            outcome.status, outcome.code, outcome.reason = "failed", 2, explain(error, self.command)
        except RunError as error:
            outcome.status, outcome.code, outcome.reason = "failed", 1, str(error)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            if output.is_lost(error):
                outcome.status, outcome.code = "failed", output.finish()
            elif (
                outcome.status == "interrupted"
            ):  # and saved; it is who was told of the signal that is at a loss
                outcome.reason += f" ({told})"
            else:
                outcome.status, outcome.code = "failed", 1
                if lacks_memory(error):
                    outcome.reason = TOO_LARGE
                elif path is None:
                    raise
                else:
                    outcome.reason = told
                    traceback.print_exc()
        if outcome.reason:
            tell(outcome)
        write(outcome, path)


def tell(outcome: Outcome) -> None:
    outcome.reason = " ".join(outcome.reason.split())  # one line, whatever was typed
    print(f"vdrop: {outcome.reason}", file=sys.stderr, flush=True)


def outcome_path(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


def outcome_of(held: object) -> Outcome:
    """From a value of JSON, which has its fields and no others. Raises Damaged."""
    if not isinstance(held, dict) or held.keys() != FIELDS.keys():
        raise Damaged("it is not an outcome")
    stored.require(held, FIELDS)
    if not all(isinstance(override, str) for override in held["overrides"]):
        raise Damaged("overrides must be a list of texts")
    return Outcome(**held)


def parse_outcome(content: bytes) -> Outcome:
    """Raises Damaged."""
    return outcome_of(stored.parse_value(content))


def parse_summary(content: bytes) -> list[Outcome]:
    """Raises Damaged."""
    held = stored.parse_value(content)
    if not isinstance(held, list):
        raise Damaged("it is not a list")
    return [outcome_of(one) for one in held]


def parse_settings(content: bytes) -> dict[str, Any]:
    """Those of a sweep of ours, going by the name of the application in its help, which nobody sets. Raises
    Damaged.
    """
    held = stored.parse_yaml(content)
    name: Any = held
    for key in ("hydra", "help", "app_name"):
        name = name.get(key) if isinstance(name, dict) else None
    if name != "vdrop":
        raise Damaged("it is not of a sweep of vdrop")
    return held


def read(path: Path) -> Outcome:
    """One that was written, or of a job that has not begun."""
    try:
        return parse_outcome(files.read(path, OUTCOME_SIZE))
    except (OSError, Damaged):
        return Outcome([], "not begun")


def outcome_paths(folder: Path) -> list[Path]:
    """Of names that outcomes have."""
    return [path for path in folder.glob("*.json") if re.fullmatch("0|[1-9][0-9]*", path.stem)]


def require_own_folder(folder: Path) -> None:
    """Raises ConfigError where a sweep would overwrite or remove a file that none has written."""
    settings = folder / SETTINGS
    kinds: list[tuple[Path, Callable[[bytes], bool]]] = [
        *((path, stored.readable_by(parse_outcome)) for path in sorted(outcome_paths(folder))),
        (folder / SUMMARY, stored.readable_by(parse_summary)),
        (folder / STOP, lambda content: not content),
    ]
    if not settings.is_char_device():  # such as /dev/null: it holds nothing
        kinds.append((settings, stored.readable_by(parse_settings)))
    for path, is_own in kinds:
        ownership.require_own(path, is_own, "choose another hydra.sweep.dir")


def remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be removed ({error.strerror}); choose another hydra.sweep.dir"
        ) from None


def write(outcome: Outcome | list[Outcome], path: Path | None) -> None:
    """Where there is a path. That it cannot be written is no reason not to run."""
    if path is not None:
        plain = asdict(outcome) if isinstance(outcome, Outcome) else [asdict(one) for one in outcome]
        try:
            files.replace(path, (json.dumps(plain, indent=1) + "\n").encode())
        except RunError as error:
            print(f"vdrop: {error}", file=sys.stderr, flush=True)


@dataclass
class Sweeper:
    """Around Hydra's own: each job ends for itself; it tells what became of them, and exits with the worst of
    their codes.
    """

    hydra: Any
    folder: Path
    launcher: str  # its class
    command: str

    def sweep(self, arguments: list[str]) -> None:
        broke, lost = "", list[str]()
        new = [folder for folder in (self.folder, *self.folder.parents) if not os.path.lexists(folder)]
        require_own_folder(self.folder)
        for old in (
            *outcome_paths(self.folder),
            self.folder / STOP,
        ):  # where hydra.sweep.dir names the folder of an earlier one
            remove(old)
        try:
            with ExitStack() as stack:
                if "joblib" in self.launcher:
                    stack.enter_context(interruption.listening(self.stop))
                    self.hydra.launcher.launch = launchers.outliving(
                        self.hydra.launcher.launch, lambda number: self.outcome(number).status
                    )
                if "submitit" in self.launcher:
                    lost = stack.enter_context(launchers.waiting_for_all())
                self.hydra.sweep(arguments)
        except Exception as error:
            if not self.hydra.overrides or not (
                outcome_paths(self.folder) or (self.folder / ".submitit").exists()
            ):  # nothing begun
                if self.folder in new:  # nothing left behind
                    with suppress(OSError):
                        (self.folder / SETTINGS).unlink(missing_ok=True)
                        for folder in new:
                            folder.rmdir()  # where it is empty
                raise
            broke = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            )
        except BaseException:
            self.summarise(CONTINUES if is_slurm(self.launcher) else STOPPED, lost)
            raise
        code = self.summarise(broke, lost)
        if interruption.received:
            code = 128 + interruption.received[0]
        if code:
            sys.exit(code)

    def stop(self) -> None:
        """Asks the processes of the pool to stop."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / STOP).touch()
        except OSError as error:
            told = (
                f"\nvdrop: {self.folder / STOP} cannot be made ({error.strerror}), so jobs continue; "
                "stop the processes themselves\n"
            )
            with suppress(OSError):
                os.write(2, told.encode())

    def outcome(self, number: int) -> Outcome:
        return read(outcome_path(self.folder, number))

    def summarise(self, broke: str, lost: list[str]) -> int:
        """Prints and writes what became of the jobs, those that did not begin too; returns the worst of their
        codes.

        `broke` is what ended the sweep; `lost` how jobs were lost, by number.
        """
        jobs = [list(overrides) for batch in self.hydra.overrides or [] for overrides in batch]
        outcomes = [
            replace(self.outcome(number), overrides=overrides) for number, overrides in enumerate(jobs)
        ]
        is_news = "submitit" in self.launcher  # jobs elsewhere have told nothing here
        for number, outcome in enumerate(outcomes):
            if outcome.status not in GOOD and not outcome.code:
                unknown = (
                    "its process was killed"
                    if outcome.status == "begun"
                    else "what became of it could not be written; see above"
                )
                outcome.code = 1
                outcome.reason = (
                    "".join(lost[number : number + 1])
                    or broke
                    or (STOPPED if interruption.asked() else unknown)
                )
                is_news = True
        if outcomes and (len(outcomes) > 1 or is_news):
            print(summary(outcomes, skips=self.command == "train"), file=sys.stderr)
        write(outcomes, self.folder / SUMMARY)
        return max((outcome.code for outcome in outcomes), default=0)


def summary(outcomes: list[Outcome], skips: bool) -> str:
    """How many ended in which way, and a line for each that is not done; `skips` is whether the same command
    leaves out what is done.
    """
    statuses = [outcome.status for outcome in outcomes]
    counts = ", ".join(
        f"{statuses.count(status)} {status}"
        for status in dict.fromkeys([*GOOD, *statuses])
        if status in statuses
    )
    shared = set.intersection(*(set(outcome.overrides) for outcome in outcomes))
    apart = shared if len(outcomes) > 1 else set()
    lines = [f"\nvdrop: {len(outcomes)} run{'s' if len(outcomes) > 1 else ''}: {counts}"]
    for outcome in outcomes:
        if outcome.status not in GOOD:
            name = " ".join(override for override in outcome.overrides if override not in apart)
            lines.append(f"  {outcome.status}: {name}: {outcome.reason}")
    if any(outcome.reason == CONTINUES for outcome in outcomes):
        lines.append(
            "  wait for these (squeue), or cancel them (scancel), before you give the same command again"
        )
    elif len(lines) > 1:
        without = " without force=…" if any(starts_over(override) for override in shared) else ""
        lines.append(
            f"  the same command again{without} {'skips what is done and ' if skips else ''}continues with "
            "the rest"
        )
    return "\n".join(lines)


def sweeper(*, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> Sweeper:
    assert isinstance(task_function, Job)
    folder = Path(config.hydra.sweep.dir).absolute()
    launcher = config.hydra.launcher._target_
    resumes = task_function.command in RESUMES
    if (
        resumes
        and is_slurm(launcher)
        and not any("launcher.max_num_timeout=" in override for override in config.hydra.overrides.hydra)
    ):
        with read_write(config):
            config.hydra.launcher.max_num_timeout = TIMEOUTS
    task_function.folder = folder  # before the launcher takes a copy of it along
    task_function.pool_of = os.getpid() if "joblib" in launcher else None
    plugins = Plugins.instance()
    theirs = Plugins.instantiate_sweeper(
        plugins, hydra_context=hydra_context, task_function=task_function, config=config
    )
    return Sweeper(theirs, folder, launcher, task_function.command)


def take_over() -> None:
    """Has Hydra use ours; of itself it takes sweepers from packages named `hydra_plugins` alone."""
    Plugins.instance().instantiate_sweeper = sweeper  # type: ignore[method-assign,assignment]
