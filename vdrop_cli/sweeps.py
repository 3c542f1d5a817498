"""Sweeps: records the outcome of each job, under any launcher; prints results and a summary at the end."""

import importlib
import os
import re
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra.plugins.sweeper
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, read_write
from omegaconf.errors import OmegaConfBaseException

from vdrop_cli import interruption, launchers, outcomes, output, ownership, stored, text_tables
from vdrop_cli.errors import ConfigError, RunError, lacks_memory, require
from vdrop_cli.explain import explain
from vdrop_cli.files import Damaged
from vdrop_cli.outcomes import DONE, Outcome
from vdrop_cli.settings.commands import ROOTS
from vdrop_cli.settings.compose import config_folder_options, parse, register
from vdrop_cli.settings.train import Train

SWEEPER = "vdrop"  # a choice of the group hydra/sweeper
SAVING = ("train", "eval")  # commands that save their state when they are asked to stop
STOPPED = "the sweep was stopped"
CONTINUES = "it is no longer waited for, and continues where it runs"
POOL_BROKE = "a process of the pool was killed, for example for lack of memory, which ended the pool"
NO_MEMORY = "there is not enough memory"
MEMORY_ADVICE = {  # by command
    "train": " for a model and batch of that size; make model.hidden_size, model.layers or task.batch_size "
    "smaller",
    "eval": "; with mc_samples of a language model, make mc_batch smaller",
    "bench": " for that; choose smaller sizes",
}
SETTINGS = "multirun.yaml"  # in the folder of a sweep; Hydra writes it
STOP = "stop"  # in the folder of a sweep: its existence asks the processes of a pool to stop
# A SLURM job that has reached its time limit so often is no longer requeued, because something must be wrong.
TIMEOUTS = 1000


def is_slurm(launcher: str) -> bool:
    return launcher.endswith(".SlurmLauncher")


def starts_over(override: str) -> bool:
    return re.fullmatch(r"\+{0,2}force=.*", override) is not None


def resume_command(command: str, overrides: Sequence[str]) -> str:
    """The command line that resumes a job."""
    again = [one for one in overrides if not starts_over(one)]
    return shlex.join(["vdrop", command, *config_folder_options(), *again])


@dataclass
class Job:
    """What Hydra calls with each composed configuration, in this process or in another."""

    command: str
    composed: bool = False
    outcome: Outcome = field(default_factory=lambda: Outcome([]))
    folder: Path | None = None  # of the sweep
    pool_parent: int | None = None  # the process that owns the pool, with the launcher joblib
    is_parallel: bool = False  # whether the launcher runs several jobs at a time on this machine
    names: list[str] = field(default_factory=list)  # of all jobs of the sweep: the overrides that differ

    def __call__(self, config: DictConfig) -> None:
        output.prepare()  # in a worker process, too
        hydra_config = HydraConfig.get()
        self.composed = True
        self.outcome = Outcome([str(override) for override in hydra_config.overrides.task])
        if hydra_config.mode is not RunMode.MULTIRUN:
            self.perform(config, None)
            return
        assert self.folder is not None, "the sweeper sets it"
        number = hydra_config.job.num
        if self.pool_parent not in (None, os.getpid()):
            interruption.enter_pool_job(self.folder / STOP, self.pool_parent, self.command in SAVING)
        try:
            if not interruption.stop_requested():
                print(f"[{number + 1}/{len(self.names)}] {self.names[number]}", file=sys.stderr, flush=True)
            self.perform(config, outcomes.path_of(self.folder, number))
        finally:
            interruption.leave_pool_job()

    def perform(self, config: DictConfig, path: Path | None) -> None:
        """Runs the command and writes the outcome to `path`."""
        outcome = self.outcome
        # A job that SLURM requeues must not start over again.
        outcome.started_over = path is not None and outcomes.read(path).started_over
        outcomes.write(outcome, path)
        try:
            register()
            settings: object = parse(config, ROOTS[self.command])
            with interruption.listening() if self.command in SAVING else nullcontext():
                try:
                    interruption.check()
                    outcome.status = self.run_command(settings, path)
                except interruption.Interrupted as stop:
                    self.record_interruption(stop)
                    outcomes.write(outcome, path)  # now, because this process may end before the next line
                    raise
        except interruption.Interrupted:
            return
        except Exception as error:
            if not self.record_failure(error, is_sweep=path is not None):
                raise
        if outcome.reason:
            report(outcome)
        outcomes.write(outcome, path)

    def run_command(self, settings: object, path: Path | None) -> str:
        """Runs the command and returns its status, by default done.

        For training, `path` also records that force=true has had its effect.
        """
        outcome = self.outcome
        run = importlib.import_module(f"vdrop_cli.commands.{self.command}").run

        def report_started_over() -> None:
            outcome.started_over = True
            outcomes.write(outcome, path)

        def report_folder(folder: Path) -> None:
            if self.folder is not None:
                outcome.folder = os.path.relpath(folder, self.folder)
                outcomes.write(outcome, path)  # so that vdrop compare finds the run while it is trained

        if isinstance(settings, Train):
            run = partial(
                run,
                report_started_over=report_started_over,
                continues_shorter=not settings.force,
                report_folder=report_folder,
                shares_device=self.is_parallel and len(self.names) > 1,
            )
            settings = replace(settings, force=settings.force and not outcome.started_over)
        return run(settings) or "done"

    def record_interruption(self, stop: interruption.Interrupted) -> None:
        """Sets and prints the outcome of a command that a signal has stopped."""
        outcome = self.outcome
        outcome.status = "interrupted"
        outcome.code = stop.exit_code
        outcome.reason = str(stop)
        if stop.progress:
            outcome.reason += f"; resume with: {resume_command(self.command, outcome.overrides)}"
        report(outcome)

    def record_failure(self, error: Exception, is_sweep: bool) -> bool:
        """Sets the outcome of a command that has failed; returns False for an error to raise again."""
        outcome, message = self.outcome, f"{type(error).__name__}: {error}"
        if isinstance(error, ConfigError | OmegaConfBaseException):
            outcome.status, outcome.code = "failed", 2
            outcome.reason = explain(error, self.command)
        elif isinstance(error, RunError):
            outcome.status, outcome.code = "failed", 1
            outcome.reason = str(error)
        elif output.is_stdout_error(error):
            outcome.status, outcome.code = "failed", output.finish()
        elif outcome.status == "interrupted":  # the job has saved; an earlier handler of the signal failed
            outcome.reason += f" ({message})"
        else:
            outcome.status, outcome.code = "failed", 1
            if lacks_memory(error):
                outcome.reason = NO_MEMORY + MEMORY_ADVICE.get(self.command, "")
            elif not is_sweep:
                return False
            else:
                outcome.reason = message
                traceback.print_exc()
        return True


def report(outcome: Outcome) -> None:
    """Prints the reason as one line."""
    outcome.reason = " ".join(outcome.reason.split())
    print(f"vdrop: {outcome.reason}", file=sys.stderr, flush=True)


def parse_settings(content: bytes) -> dict[str, Any]:
    """The configuration that Hydra writes for a sweep of vdrop. Raises Damaged for one of another program."""
    values = stored.parse_yaml(content)
    name: Any = values
    for key in ("hydra", "help", "app_name"):
        name = name.get(key) if isinstance(name, dict) else None
    if name != "vdrop":
        raise Damaged("it is not of a sweep of vdrop")
    return values


def require_own_folder(folder: Path) -> None:
    """Raises ConfigError if a sweep would overwrite or remove a file that no sweep has written."""
    settings = folder / SETTINGS
    kinds: list[tuple[Path, Callable[[bytes], bool]]] = [
        *((path, stored.readable_by(outcomes.parse)) for path in sorted(outcomes.paths(folder))),
        (folder / outcomes.SUMMARY, stored.readable_by(outcomes.parse_summary)),
        (folder / STOP, lambda content: not content),
    ]
    if not settings.is_char_device():  # such as /dev/null, which holds nothing
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


class Sweeper(hydra.plugins.sweeper.Sweeper):
    """Hydra's basic sweeper; it prints results and a summary, and exits with the highest code of the jobs."""

    def __init__(self, max_batch_size: int | None, params: dict[str, str] | None = None) -> None:
        # Not imported at the top: Hydra executes the modules of its plugins again when it looks for plugins.
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        self.basic = BasicSweeper(max_batch_size, params)
        self.jobs: list[list[str]] = []  # the overrides of each job

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        assert isinstance(task_function, Job)
        self.job, self.folder = task_function, Path(config.hydra.sweep.dir).absolute()
        self.launcher_name: str = config.hydra.launcher._target_
        is_limited = any("launcher.max_num_timeout=" in one for one in config.hydra.overrides.hydra)
        if self.job.command in SAVING and is_slurm(self.launcher_name) and not is_limited:
            with read_write(config):
                config.hydra.launcher.max_num_timeout = TIMEOUTS
        self.job.folder = self.folder  # before the launcher copies the job
        is_pool = "joblib" in self.launcher_name
        self.job.pool_parent = os.getpid() if is_pool else None
        is_local = self.launcher_name.endswith(".LocalLauncher")  # submitit's, which starts all jobs at once
        self.job.is_parallel = is_local or (is_pool and config.hydra.launcher.n_jobs != 1)
        # before Hydra makes the folder of the sweep in it
        require(config.get("outputs") != "", "outputs", "a folder; . is the current one", "nothing")
        self.parser = OverridesParser.create(config_loader=hydra_context.config_loader)
        self.basic.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def read_jobs(self, arguments: Sequence[str]) -> None:
        """Sets the overrides and the name of each job, as the basic sweeper combines them.

        Raises ConfigError where there is no job, or one twice.
        """
        params = [f"{key}={value}" for key, value in self.basic.params.items()]
        (self.jobs,) = self.basic.split_arguments(self.parser.parse_overrides([*params, *arguments]), None)
        line = shlex.join(arguments)
        if not self.jobs:
            raise ConfigError(f"{line}: there is nothing to run; a value matches no choice, or is empty")
        counts = Counter(map(tuple, self.jobs))
        repeated = next((job for job, count in counts.items() if count > 1), None)
        if repeated is not None:
            raise ConfigError(f"{line}: {' '.join(repeated)} is listed twice; give each value once")
        self.job.names = distinct(self.jobs)

    def sweep(self, arguments: list[str]) -> None:
        failure, losses = "", list[str]()
        created = [folder for folder in (self.folder, *self.folder.parents) if not os.path.lexists(folder)]
        require_own_folder(self.folder)
        self.read_jobs(arguments)
        # hydra.sweep.dir may name the folder of an earlier sweep.
        for path in (*outcomes.paths(self.folder), self.folder / outcomes.SUMMARY, self.folder / STOP):
            remove(path)
        try:
            with ExitStack() as stack:
                if "joblib" in self.launcher_name:
                    stack.enter_context(interruption.listening(self.stop))
                if "submitit" in self.launcher_name:
                    losses = stack.enter_context(launchers.waiting_for_all())
                if is_slurm(self.launcher_name):
                    stack.enter_context(interruption.keyboard_interrupts())
                self.basic.sweep(arguments)
        except Exception as error:
            if not self.has_begun():
                if self.folder in created:
                    self.remove_empty(created)
                raise
            first_line = (str(error).strip().splitlines() or [""])[0]
            is_pool = type(error).__name__ in ("BrokenProcessPool", "TerminatedWorkerError")
            failure = POOL_BROKE if is_pool else f"{type(error).__name__}: {first_line}"
        except BaseException:
            self.summarise(CONTINUES if is_slurm(self.launcher_name) else STOPPED, losses)
            if interruption.received:
                sys.exit(128 + interruption.received[0])
            raise
        code = self.summarise(failure, losses)
        if interruption.received:
            code = 128 + interruption.received[0]
        if code:
            sys.exit(code)

    def has_begun(self) -> bool:
        """Whether any job has begun."""
        traces = outcomes.paths(self.folder) or (self.folder / ".submitit").exists()
        return self.basic.overrides is not None and bool(traces)

    def remove_empty(self, created: Sequence[Path]) -> None:
        """Removes the folders that this sweep has created, if they hold nothing but Hydra's settings."""
        with suppress(OSError):
            (self.folder / SETTINGS).unlink(missing_ok=True)
            for folder in created:
                folder.rmdir()

    def stop(self) -> None:
        """Asks the processes of the pool to stop."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / STOP).touch()
        except OSError as error:
            message = (
                f"\nvdrop: {self.folder / STOP} cannot be made ({error.strerror}), so jobs continue; "
                "stop the processes themselves\n"
            )
            with suppress(OSError):
                os.write(2, message.encode())

    def summarise(self, failure: str, losses: Sequence[str]) -> int:
        """Writes how the jobs ended, and prints it after the results; returns the highest exit code.

        `failure` is what ended the sweep early; `losses` says, for each job, how it was lost.
        """
        ended = [
            replace(outcomes.read(outcomes.path_of(self.folder, number)), overrides=overrides)
            for number, overrides in enumerate(self.jobs)
        ]
        is_news = "submitit" in self.launcher_name  # jobs elsewhere have printed nothing here
        for number, outcome in enumerate(ended):
            if not outcome.is_done and not outcome.code:
                self.explain_loss(outcome, "".join(losses[number : number + 1]) or failure)
                is_news = True
        outcomes.write(ended, self.folder / outcomes.SUMMARY)
        if ended and (len(ended) > 1 or is_news):
            with output.stdout_errors_deferred():
                self.print_results(ended)
            print(summary(ended, skips=self.job.command == "train"), file=sys.stderr)
        return max((outcome.code for outcome in ended), default=0)

    def explain_loss(self, outcome: Outcome, reason: str) -> None:
        """Sets code and reason of a job that has not ended, and its status if it was lost."""
        unknown = (
            "its process was killed"
            if outcome.status == "begun"
            else "its outcome could not be written; see above"
        )
        outcome.code = 1
        outcome.reason = reason or (STOPPED if interruption.stop_requested() else unknown)
        if outcome.status == "begun" and outcome.reason not in (STOPPED, CONTINUES):
            outcome.status = "lost"
            if self.job.command in SAVING:
                outcome.reason += f"; resume with: {resume_command(self.job.command, outcome.overrides)}"

    def print_results(self, ended: Sequence[Outcome]) -> None:
        """Prints a table of the runs that were trained, the best configuration first."""
        from vdrop_cli import comparison, runs
        from vdrop_cli.comparison import Configuration

        if self.job.command != "train":
            return
        without_seeds = [
            [override for override in outcome.overrides if not re.match(r"\+{0,2}seed=", override)]
            for outcome in ended
        ]
        configurations: dict[str, dict[str, Configuration]] = {}  # by label, then by the hash of the runs
        unfinished: dict[str, list[str]] = {}  # states by label
        folders = set[Path]()  # a run counts once, also where it was asked for in two ways, as lr=1,1.0
        for label, outcome in zip(distinct(without_seeds), ended, strict=True):
            run, status = None, outcome.status
            if outcome.is_done and outcome.folder:
                folder = outcomes.run_folder(self.folder, outcome)
                if folder in folders:
                    continue
                folders.add(folder)
                try:
                    run = runs.read_any(folder)
                except ConfigError as error:
                    print(f"vdrop: {error}", file=sys.stderr)
                    status = "unreadable"
            alike = configurations.setdefault(label, {})
            if run is None:
                unfinished.setdefault(label, []).append(status)
            else:
                one = alike.setdefault(comparison.identity(run), Configuration(label))
                one.add(run)
                one.label = one.label or comparison.own_label(one)  # no setting but the seed differs
        for label, states in unfinished.items():
            first = next(iter(configurations[label].values()), None)
            if first is None:
                first = configurations[label][""] = Configuration(label)
            first.unfinished += states
        every = [one for alike in configurations.values() for one in alike.values()]
        comparison.distinguish(every)
        if any(one.measured for one in every):
            print("\n" + "\n".join(text_tables.aligned(comparison.ranked_rows(every))))


def distinct(jobs: Sequence[Sequence[str]]) -> list[str]:
    """A name for each job: its overrides without those that all jobs share, if there are several jobs."""
    shared = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set[str]()
    return [" ".join(override for override in job if override not in shared) for job in jobs]


def summary(ended: Sequence[Outcome], skips: bool) -> str:
    """The number of jobs by status, and a line for each job that is not done.

    `skips`: whether the same command skips jobs that are done.
    """
    statuses = [outcome.status for outcome in ended]
    counts = ", ".join(
        f"{statuses.count(status)} {status}"
        for status in dict.fromkeys([*DONE, *statuses])
        if status in statuses
    )
    names = distinct([outcome.overrides for outcome in ended])
    lines = [f"\nvdrop: {len(ended)} run{'s' if len(ended) > 1 else ''}: {counts}"]
    for name, outcome in zip(names, ended, strict=True):
        if not outcome.is_done:
            lines.append(f"  {outcome.status}: {name}: {outcome.reason}")
    if any(outcome.reason == CONTINUES for outcome in ended):
        lines.append(
            "  wait for these (squeue), or cancel them (scancel), before you give the same command again"
        )
    elif len(lines) > 1:
        is_forced = all(any(map(starts_over, outcome.overrides)) for outcome in ended)
        without = " without force=…" if is_forced else ""
        lines.append(
            f"  the same command again{without} {'skips what is done and ' if skips else ''}continues with "
            "the rest"
        )
    return "\n".join(lines)


def register_sweeper() -> None:
    """Makes the sweeper known to Hydra as the choice `hydra/sweeper=vdrop`."""
    name = "hydra_plugins.vdrop.Sweeper"  # Hydra accepts names in the package hydra_plugins only
    Plugins.instance().class_name_to_class[name] = Sweeper
    node = {"_target_": name, "max_batch_size": None, "params": None}  # as of Hydra's basic sweeper
    ConfigStore.instance().store(group="hydra/sweeper", name=SWEEPER, node=node, provider="vdrop")
