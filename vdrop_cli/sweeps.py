"""One job after the other, or many at once: what becomes of each, whatever launcher runs it, and the summary at the end."""

import importlib
import json
import shlex
import shutil
import sys
import traceback
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vdrop_cli import interruption
from vdrop_cli.config import ROOTS, ConfigError, RunError, parse, register
from vdrop_cli.explain import explain


@dataclass
class Outcome:
    """What became of a job. `status`: done, resumed, was done, failed, interrupted, or begun and not ended."""

    overrides: list[str]
    status: str = "begun"
    code: int = 0  # as an exit code
    reason: str = ""


RESUMES = ("train", "eval")  # commands that save what they have when they are asked to stop
GOOD = ("done", "resumed", "was done")


@dataclass
class Job:
    """What Hydra calls with each composed configuration, in this process or another."""

    command: str
    composed: bool = False
    outcome: Outcome = field(default_factory=lambda: Outcome([]))
    folder: str | None = None  # of the sweep, where outcomes are written

    def __call__(self, config: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        self.composed, self.outcome = True, Outcome(OmegaConf.to_container(hydra_config.overrides.task, resolve=False))  # type: ignore[arg-type]
        sweeping = hydra_config.mode is RunMode.MULTIRUN
        if sweeping:
            self.note(hydra_config.job.num)
        self.perform(config, sweeping)
        if sweeping:
            self.note(hydra_config.job.num)

    def perform(self, config: DictConfig, sweeping: bool) -> None:
        outcome = self.outcome
        try:
            register()
            settings: object = parse(config, ROOTS[self.command])
            run = importlib.import_module(f"vdrop_cli.commands.{self.command}").run
            with interruption.listening() if self.command in RESUMES else nullcontext():
                interruption.check()
                outcome.status = run(settings) or "done"
            return
        except interruption.Interrupted as stop:
            outcome.status, outcome.code, outcome.reason = "interrupted", stop.exit_code, str(stop)
            if stop.told:
                outcome.reason += f"; go on with: vdrop {self.command} {shlex.join(o for o in outcome.overrides if o != 'force=true')}"
        except (ConfigError, OmegaConfBaseException) as error:
            outcome.status, outcome.code, outcome.reason = "failed", 2, explain(error, self.command)
        except RunError as error:
            outcome.status, outcome.code, outcome.reason = "failed", 1, str(error)
        except Exception as error:
            outcome.status, outcome.code = "failed", 1
            memory = out_of_memory(error)
            if not (sweeping or memory):
                raise
            outcome.reason = memory or f"{type(error).__name__}: {error}"
            if not memory:
                traceback.print_exc()
        outcome.reason = " ".join(outcome.reason.split())  # one line, whatever was typed
        print(f"vdrop: {outcome.reason}", file=sys.stderr, flush=True)

    def note(self, number: int) -> None:
        assert self.folder is not None
        path = Path(self.folder) / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(asdict(self.outcome), indent=1) + "\n")
        beside.replace(path)


def out_of_memory(error: Exception) -> str:
    """A line for it; empty where an error is another one."""
    told = str(error).lower()
    if isinstance(error, MemoryError) or "not enough memory" in told or "out of memory" in told or "storage size calculation" in told:
        return (
            "there is not enough memory for a model and batch of that size; make model.hidden_size, model.layers or task.batch_size smaller"
        )
    return ""


@dataclass
class Sweeper:
    """Around Hydra's own: each job ends for itself; it tells what became of them, and exits with the worst of their codes."""

    hydra: Any
    folder: Path
    others_work: bool  # whether jobs run in processes that this one starts

    def sweep(self, arguments: list[str]) -> None:
        broke = ""
        try:
            with interruption.listening(interruption.pass_on) if self.others_work else nullcontext():
                self.hydra.sweep(arguments)
        except Exception as error:
            if not any(self.folder.glob("*.json")) and not (self.folder / ".submitit").exists():  # nothing begun, nothing left behind
                shutil.rmtree(self.folder, ignore_errors=True)
                with suppress(OSError):
                    for folder in (self.folder.parent, self.folder.parent.parent):
                        folder.rmdir()  # where it is empty
                raise
            broke = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        except BaseException:
            self.summarise("")
            raise
        code = self.summarise(broke)
        if code:
            sys.exit(code)

    def outcomes(self) -> list[Outcome]:
        """Of every job, those that did not begin too."""
        jobs = [list(overrides) for batch in self.hydra.overrides or [] for overrides in batch]
        found = []
        for number, overrides in enumerate(jobs):
            path = self.folder / f"{number}.json"
            found.append(Outcome(**json.loads(path.read_text())) if path.exists() else Outcome(overrides, "not begun"))
        return found

    def summarise(self, broke: str) -> int:
        """Prints and writes what became of the jobs; returns the exit code of the sweep."""
        outcomes = self.outcomes()
        for outcome in outcomes:
            if outcome.status not in GOOD and not outcome.code:
                outcome.code = 1
                outcome.reason = broke or {"begun": "its process ended without a word, or goes on elsewhere"}.get(
                    outcome.status, "the sweep was stopped"
                )
        (self.folder / "summary.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
        if len(outcomes) > 1:
            print(summary(outcomes), file=sys.stderr)
        return max((outcome.code for outcome in outcomes), default=0)


def summary(outcomes: list[Outcome]) -> str:
    """How many ended in which way, and a line for each that is not done."""
    statuses = [outcome.status for outcome in outcomes]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys([*GOOD, *statuses]) if status in statuses)
    shared = set.intersection(*(set(outcome.overrides) for outcome in outcomes))
    lines = [f"\nvdrop: {len(outcomes)} runs: {counts}"]
    for outcome in outcomes:
        if outcome.status not in GOOD:
            name = " ".join(override for override in outcome.overrides if override not in shared)
            lines.append(f"  {outcome.status}: {name}: {outcome.reason}")
    if len(lines) > 1:
        lines.append("  the same command again skips what is done and goes on with the rest")
    return "\n".join(lines)


def sweeper(*, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> Sweeper:
    assert isinstance(task_function, Job)
    folder = Path(config.hydra.sweep.dir).absolute()
    task_function.folder = str(folder)  # before the launcher takes a copy of it along
    plugins = Plugins.instance()
    theirs = Plugins.instantiate_sweeper(plugins, hydra_context=hydra_context, task_function=task_function, config=config)
    return Sweeper(theirs, folder, "joblib" in config.hydra.launcher._target_)


def take_over() -> None:
    """Has Hydra use ours; of itself it takes sweepers from packages named `hydra_plugins` alone."""
    Plugins.instance().instantiate_sweeper = sweeper  # type: ignore[method-assign,assignment]
