"""MC passes that stop and resume: the progress of an evaluation, in a file beside the result file."""

import sys
import time
from pathlib import Path
from typing import Any

from vdrop_cli import files, interruption, stored
from vdrop_cli.errors import ConfigError
from vdrop_cli.files import Damaged
from vdrop_cli.interruption import Interrupted
from vdrop_cli.mc_passes import McPasses
from vdrop_cli.settings.commands import Eval
from vdrop_cli.sinks import progress_bar
from vdrop_cli.tasks import EvaluationTask
from vdrop_cli.trained_model import checksum


class PartialEvaluation:
    """The progress of MC passes, and the file that stores it, whose name ends in `.partial`."""

    def __init__(self, path: Path, identity: dict[str, str], minutes: float) -> None:
        """`identity`: all that the numbers depend on. `minutes`: the time between two saves."""
        self.path = path
        self.identity = identity
        self.minutes = minutes
        self.metrics: dict[str, float] = {}  # of the standard approximation, which comes first
        self.seconds = 0.0  # of the passes
        self.clock = self.saved = time.perf_counter()

    @classmethod
    def for_settings(
        cls,
        target: Path,
        paths: list[Path],
        task: EvaluationTask,
        mc_batch: int,
        described: dict[str, Any],
        settings: Eval,
    ) -> "PartialEvaluation":
        """Returns the partial evaluation that belongs to the result file `target`.

        On one machine, evaluations with the same identity have the same results to the last bit. `paths` are
        the checkpoints of all models, `described` is the environment.
        """
        checkpoints = " ".join(map(checksum, paths))
        identity = {"checkpoint": checkpoints, "corpus": task.fingerprint, "mc_batch": mc_batch}
        identity |= {"calibration": True} if settings.calibration else {}
        identity |= {"factors": settings.dropout_factors} if settings.dropout_factors else {}
        code = ("code", "dirty", "changes", "files")  # by git, or without a checkout
        decisive = ("vdrop", *code, "torch", "device_type", "backend", "precision")
        identity |= {name: described[name] for name in decisive if name in described}
        texts = {key: str(value) for key, value in identity.items()}
        return cls(target.with_suffix(".partial"), texts, settings.save_minutes)

    def load(self, passes: McPasses) -> bool:
        """Resumes the passes from the file, and returns whether this was possible.

        It is not where the file is missing, is damaged or belongs to another evaluation. Raises ConfigError
        where the file cannot be read.
        """
        try:
            content = files.read_tensors(self.path)
            if content.get("of") == self.identity:
                metrics, seconds = content.get("metrics"), content.get("seconds")
                numbers = [*metrics.values(), seconds] if isinstance(metrics, dict) else [None]
                if not all(map(stored.is_finite, numbers)):
                    raise Damaged("its metrics are not numbers")
                if not isinstance(content.get("passes"), dict):
                    raise Damaged("it holds no passes")
                passes.load_state_dict(content["passes"])
                self.metrics, self.seconds = metrics or {}, float(seconds)  # type: ignore[arg-type]
                print(f"resuming after {passes.words:,} words of MC passes", file=sys.stderr)
                return True
            print(f"vdrop: {self.path} is of other settings or code; starting over", file=sys.stderr)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be read ({error.strerror}); make it readable, or remove it"
            ) from None
        except (Damaged, ValueError) as damage:
            print(f"vdrop: {self.path} is damaged ({damage}); starting over", file=sys.stderr)
        return False

    def tick(self) -> None:
        """Adds the time since the last tick to `seconds`."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    @property
    def is_due(self) -> bool:
        """Whether a save is due: `minutes` have passed since the last one."""
        return time.perf_counter() - self.saved >= 60 * self.minutes

    def save(self, passes: McPasses) -> None:
        """Replaces the file by one with the present progress of the passes."""
        content = {"passes": passes.state_dict(), "metrics": self.metrics, "seconds": self.seconds}
        files.write_tensors(self.path, {"of": self.identity, **content})
        self.saved = time.perf_counter()


def run_passes(passes: McPasses, partial: PartialEvaluation) -> None:
    """Runs passes to the end, and saves them from time to time.

    Raises Interrupted where the process was asked to stop, after it has saved all finished work.
    """
    words = passes.total
    partial.clock = time.perf_counter()
    with progress_bar(words, passes.words, "word") as count:
        for more in passes.run():
            count(more)
            partial.tick()
            is_stopped = interruption.stop_requested()  # asked once: what says "saved" must have saved
            if is_stopped or partial.is_due:
                partial.save(passes)
            if is_stopped:
                reason = f"saved after {passes.words:,} of {words:,} words of MC passes in {partial.path}"
                raise Interrupted(interruption.received[0], reason)
