"""Makes the runs and evaluations that a plan lacks, by other vdrop commands, each in a process of its own."""

import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable

from hydra import compose
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from vdrop_cli import interruption
from vdrop_cli.arguments import literal, to_hydra
from vdrop_cli.errors import ConfigError
from vdrop_cli.explain import explain
from vdrop_cli.settings.commands import Reproduce, seconds
from vdrop_cli.settings.compose import config_folder_options
from vdrop_cli.studies.plan import PlannedEvaluation, Training


def train_arguments(trainings: list[Training], settings: Reproduce) -> list[str]:
    """The arguments of a `vdrop train` that makes all of these runs. It skips runs that are finished."""
    together = zip(*(training.row.choices for training in trainings), strict=True)
    choices = []
    for same_setting in together:
        names = dict.fromkeys(choice.partition("=")[0] for choice in same_setting)
        values = dict.fromkeys(choice.partition("=")[2] for choice in same_setting)
        choices.append(f"{next(iter(names))}={','.join(values)}")
    seeds = dict.fromkeys(str(training.settings.seed) for training in trainings)
    first = trainings[0].settings
    return [
        "-m",
        *config_folder_options(),
        *choices,
        f"seed={','.join(seeds)}",
        *launcher_words(settings),
        f"device={first.device}",
        f"backend={first.backend}",
        f"precision={first.precision}",
        f"outputs={literal(settings.outputs)}",
        *to_hydra("train", shlex.split(settings.overrides)),  # a comma in them is no sweep
    ]


def launcher_words(settings: Reproduce) -> list[str]:
    """The words of a sweep's command line that choose its launcher; none where runs follow each other."""
    launcher = settings.launcher or (
        f"joblib hydra.launcher.n_jobs={settings.jobs}" if settings.jobs > 1 else ""
    )
    return shlex.split(f"hydra/launcher={launcher}") if launcher else []


def require_launcher(settings: Reproduce) -> None:
    """Raises ConfigError for a launcher that is not installed, or that lacks a setting that is given."""
    words = launcher_words(settings)
    if not words:
        return
    try:
        compose("train", words, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        name = "launcher" if settings.launcher else "jobs"
        raise ConfigError(f"{name}={settings.launcher or settings.jobs}: {explain(error, 'train')}") from None


class Commands:
    """Runs commands; where `until` is set, only until that time has passed."""

    def __init__(self, settings: Reproduce) -> None:
        self.until = until = settings.until
        words = ["-m", *config_folder_options(), *launcher_words(settings)]
        self.sweep_words = words if settings.uses_other_machines else []
        self.ends = math.inf if until is None else time.monotonic() + seconds(until)

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() >= self.ends

    def vdrop(self, command: str, *arguments: str) -> None:
        """Runs a command. It is asked to stop when this process is asked to stop, or when the time is up.

        The exit code of the command is not read: its files show whether it has finished.
        """
        if self.time_is_up:
            return
        line = ["vdrop", command, *arguments]
        print(f"\n{shlex.join(line)}", file=sys.stderr, flush=True)
        # this process has set HYDRA_FULL_ERROR, with which Hydra shows a user's mistakes as tracebacks
        environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
        process = subprocess.Popen([sys.executable, "-m", "vdrop_cli", *line[1:]], env=environment)
        with interruption.listening(process.terminate):
            try:
                process.wait(None if self.until is None else max(0.0, self.ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(
                    f"vdrop: until={self.until} has passed; stopping what runs", file=sys.stderr, flush=True
                )
                process.terminate()
                process.wait()
            interruption.check()

    def evaluate_all(self, evaluations: Iterable[PlannedEvaluation]) -> None:
        """Makes the evaluations that are not finished yet and whose runs are finished.

        They run on the machines that make the runs.
        """
        for evaluation in evaluations:
            if all(training.is_finished for training in evaluation.trainings) and not evaluation.is_finished:
                self.vdrop("eval", *self.sweep_words, *evaluation.arguments)
