"""Stuck starts: the loss of some runs stays as high as at first, and training does not recover.

This happens at a high learning rate with loose clipping.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from vdrop_cli import files, stored
from vdrop_cli.errors import RunError
from vdrop_cli.files import Damaged
from vdrop_cli.run_files import STUCK
from vdrop_cli.settings.train import StartCheck


@dataclass(frozen=True)
class StuckStart:
    """The losses that a start was judged by, in nats per word, with dropout on."""

    step: int  # after which it was judged
    loss: float  # mean of the last quarter of the steps until then
    limit: float

    def __post_init__(self) -> None:
        if not (self.step >= 1 and self.loss > self.limit):
            raise Damaged(
                f"a loss of {self.loss} after step {self.step}, with a limit of {self.limit}, is not that of "
                "a stuck start"
            )

    def __str__(self) -> str:
        first = self.step - judged_steps(self.step) + 1
        steps = f"steps {first} to {self.step}" if first < self.step else f"step {self.step}"
        return (
            f"the mean training loss of {steps} is {self.loss:.4g} nats a word, above "
            f"stuck.loss={self.limit:g}"
        )

    def is_stuck(self, check: StartCheck) -> bool:
        """Whether the start is known to be stuck by these settings; False for another number of steps."""
        return check.steps == self.step and self.loss > check.loss


class StuckError(RunError):
    """A run is not trained further, because its start is stuck."""

    def __init__(self, folder: Path, start: StuckStart) -> None:
        super().__init__(f"{folder}: {start}: this start is stuck; take another seed")
        self.start = start


def judged_steps(steps: int) -> int:
    """Returns how many of the first `steps` steps, from their end, a start is judged by."""
    return max(1, steps // 4)


def judge(losses: list[float], check: StartCheck) -> StuckStart | None:
    """Judges a start by the losses of the first steps; None if it is not stuck or cannot be judged yet."""
    if check.steps is None or len(losses) < check.steps:
        return None
    loss = fmean(losses[: check.steps][-judged_steps(check.steps) :])
    return StuckStart(check.steps, loss, check.loss) if loss > check.loss else None


def read(folder: Path) -> StuckStart | None:
    """The stuck start of a run or of its record; None if the start is not stuck. Raises ConfigError."""
    path = folder / STUCK
    advice = "delete it and give the same vdrop train command again"
    with files.reading(path, advice), suppress(FileNotFoundError):
        values = stored.read_json(path)
        stored.require_types(values, {"step": int, "loss": float, "limit": float})
        return StuckStart(values["step"], values["loss"], values["limit"])
    return None


def remembered(folder: Path, check: StartCheck) -> StuckStart | None:
    """Returns the recorded start of a run if it is stuck by these settings, else None."""
    start = None if check.steps is None else read(folder)
    return start if start is not None and start.is_stuck(check) else None


def remember(start: StuckStart, folder: Path) -> None:
    """Records a stuck start. Raises RunError if the file cannot be written."""
    files.replace(folder / STUCK, (json.dumps(asdict(start), indent=2) + "\n").encode())


def forget(folder: Path) -> None:
    """Removes the record of a start that no longer counts as stuck. Raises RunError if that fails."""
    try:
        (folder / STUCK).unlink(missing_ok=True)
    except OSError as error:
        raise files.file_error(folder / STUCK, error) from None
