"""A run at another logger than TensorBoard: what Weights & Biases, Trackio and MLflow have in common."""

import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from vdrop_cli.errors import ConfigError, RunError, one_line
from vdrop_cli.sinks.records import (
    Epoch,
    LossMetrics,
    Record,
    Result,
    Saving,
    Step,
    position_of,
    tagged_scalars,
)

PROJECT = "vdrop"  # where no environment variable names the project or experiment


class Client(Protocol):
    """A run at a logger. Each method may raise any exception."""

    recorded: dict[str, int]  # newest step and epoch that the logger already has of a resumed run

    def log(self, kind: str, values: dict[str, float], position: int) -> None:
        """Records the numbers of a record. `kind` is `step`, `epoch` or `result`. `position` is the step, or
        the epoch that an epoch or result belongs to.
        """

    def flush(self) -> None:
        """Sends all numbers that are not sent yet, if the logger supports that. The run may be killed after
        this.
        """

    def finish(self, failed: bool) -> None:
        """Sends what is left, and closes the run."""


class Package(NamedTuple):
    """The package of a logger, and the module and class of its client."""

    name: str
    client: str

    def open(self, folder: Path, config: dict[str, Any], resumes: bool) -> Client:
        """Starts or resumes the run of a folder at the logger."""
        module = import_module(f"vdrop_cli.sinks.{self.name}")
        client: Client = getattr(module, self.client)(folder, config, resumes)
        return client


PACKAGES = {
    name: Package(name, client)
    for name, client in (("wandb", "WandbRun"), ("trackio", "TrackioRun"), ("mlflow", "MlflowRun"))
}


def require_installed(logger: str) -> None:
    """Raises ConfigError where the package of a logger is missing."""
    if logger not in PACKAGES:
        return
    spec = find_spec(logger)
    if spec is None or spec.origin is None:  # a folder of that name is no package
        raise ConfigError(f"logger={logger} is not installed; pip install 'vdrop[{logger}]'")


class Logger:
    """Sends every `log_every`-th step, every epoch and the result to a logger.

    A run that resumes does not repeat what the logger already has. After an error of the logger, the training
    continues without it.
    """

    def __init__(
        self,
        name: str,
        open_client: Callable[[Path, dict[str, Any], bool], Client],
        folder: Path,
        config: dict[str, Any],
        resumes: bool,
        loss_metrics: LossMetrics,
    ) -> None:
        self.name = name
        self.open_client = open_client
        self.folder, self.config = folder, config
        self.resumes = resumes
        self.loss_metrics = loss_metrics
        self.client: Client | None = None

    def __enter__(self) -> Self:
        try:
            self.client = self.open_client(self.folder, self.config, self.resumes)
        except ConfigError:
            raise
        except Exception as error:  # which ones a logger raises is not documented
            raise RunError(
                f"logger={self.name} cannot start: {one_line(error)}; logger=none trains without it"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.attempt(lambda client: client.finish(failed=kind is not None))

    def __call__(self, record: Record) -> None:
        if isinstance(record, Step) and record.step % self.config["log_every"] != 0:
            return
        if isinstance(record, Saving):  # a run that resumes from here does not repeat these records
            self.attempt(lambda client: client.flush())
        if isinstance(record, Step | Epoch | Result):
            position = position_of(record)
            values = tagged_scalars(record, self.loss_metrics)
            self.attempt(lambda client: self.send(client, record.kind, values, position))

    def send(self, client: Client, kind: str, values: dict[str, float], position: int) -> None:
        if position > client.recorded.get(kind, 0):
            client.log(kind, values, position)

    def attempt(self, action: Callable[[Client], object]) -> None:
        """Acts on the client. An error is reported once, and the client is closed."""
        if self.client is None:
            return
        try:
            action(self.client)
        except Exception as error:  # which ones a logger raises is not documented
            print(
                f"vdrop: logger={self.name} failed ({one_line(error)}); the training continues without it, "
                "and log.jsonl has all records",
                file=sys.stderr,
            )
            failed_client, self.client = self.client, None
            with suppress(Exception):
                failed_client.finish(failed=True)
