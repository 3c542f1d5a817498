"""Which runs belong to a row: the settings that they share, and the runs and records that have these
settings.
"""

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from vdrop_cli import RECORDS, runs
from vdrop_cli.arguments import SWEEP_ADVICE, to_hydra
from vdrop_cli.errors import ConfigError, require
from vdrop_cli.explain import explain
from vdrop_cli.runs import Finished, Logged, Stuck
from vdrop_cli.settings.commands import CHOSEN_BY_REPRODUCE
from vdrop_cli.settings.compose import parse
from vdrop_cli.settings.train import Train

Run = TypeVar("Run", bound=Logged)
DATA_IDENTITY = (  # the settings of `data` that say which text it is
    "source",
    "train",
    "valid",
    "test",
    "csv",
    "delimiter",
    "name",
    "config",
    "revision",
    "column",
    "rating_column",
    "min_count",
    "vocabulary_size",
    "fraction",
)


def key(numbers: dict[str, Any]) -> str:
    """The key that all runs of a row share.

    It has the settings that change the numbers, but not the seed, device, back end and precision, nor where
    the data lie. `numbers` is the result of `Train.numbers`, which takes milliseconds.
    """
    shared = {
        name: value for name, value in numbers.items() if name not in ("device", "backend", "precision")
    }
    shared["data"] = {name: shared["data"].get(name) for name in DATA_IDENTITY}
    return json.dumps(shared, sort_keys=True)


@cache
def train_settings(choices: tuple[str, ...], overrides: str) -> Train:
    """The settings of `vdrop train` with these choices, and `overrides` after them."""
    try:
        words = to_hydra("train", shlex.split(overrides))
        for key in (word.partition("=")[0].lstrip("+~") for word in words):
            if key in CHOSEN_BY_REPRODUCE:
                advice = CHOSEN_BY_REPRODUCE[key]
                raise ConfigError(f"{key} must be unset in overrides={overrides}; {advice}")
        settings = parse(compose("train", [*choices, *words]), Train)
        require(not settings.debug, "debug", f"false in overrides={overrides}", "true")
        return settings
    except ConfigError as error:
        raise ConfigError(without_sweep_advice(str(error))) from None
    # a quotation that is not closed; a number beyond all floats
    except (HydraException, OmegaConfBaseException, ValueError, OverflowError) as error:
        where = f"overrides={overrides}: " if overrides else ""
        raise ConfigError(without_sweep_advice(f"{where}{explain(error, 'train')}")) from None


def without_sweep_advice(message: str) -> str:
    """The message on a setting of `vdrop train`, with advice for one of `overrides`, which are no sweep."""
    return message.replace(SWEEP_ADVICE, "give one; each other one needs a command of its own")


@dataclass(frozen=True)
class Collected:
    """Runs and records that have ended, by their keys, in order of seeds."""

    finished: dict[str, list[Finished]]
    stuck: dict[str, list[Stuck]]

    @property
    def all_finished(self) -> Iterator[Finished]:
        return (run for with_key in self.finished.values() for run in with_key)


# Records that pages of docs/findings are about, and that are no rows of tables; those of `moon_every_step`
# were evaluated in another way.
FINDINGS = ("moon_every_step", "uncertainty")
Conditions = tuple[str, str, str]  # precision, device and fingerprint of the text
Identity = tuple[str, int, Conditions]  # with key and seed


def identity(run: Logged) -> Identity:
    return key(run.numbers), run.train.seed, conditions(run)


def conditions(run: Logged) -> Conditions:
    """Returns what the runs of one line of a table share beside their settings.

    The text is part of it, because the same file may have had another text for an earlier run.
    """
    return *precision_and_device(run), run.corpus


def precision_and_device(run: Logged) -> tuple[str, str]:
    """Returns the precision of a run, and the name of its last device."""
    return str(run.train.precision), run.environment["device"]


def record_folders(outputs: Path) -> list[Path]:
    """Returns the folders of records: that of the checkout, then that below `outputs`."""
    shipped = [RECORDS] if RECORDS is not None and (outputs / "record").resolve() != RECORDS else []
    return [*shipped, outputs / "record"]


def collect(outputs: Path) -> Collected:
    """Reads run folders and records.

    If `outputs/train` or a folder of records has the same run twice, the folder that has the name of its run
    counts, else the one with more evaluations; a message names a run folder that is left out. A run replaces
    its record, and a record below `outputs` replaces one of the checkout. Until the new run is evaluated, the
    evaluations of what it replaces count. Records of the checkout count for other outputs, too. A stuck run
    does not count if there is a finished run with the same settings, seed and conditions: the start of the
    finished run was not judged, or by another limit. Records below `FINDINGS` do not count.
    """
    finished: dict[Identity, Finished] = {}
    stuck: dict[Identity, Stuck] = {}
    records = record_folders(outputs)
    for folder in (*records, outputs / "train"):
        here: dict[Identity, Finished] = {}
        for run in runs.below(folder):
            if folder in records and any(run.folder.is_relative_to(folder / name) for name in FINDINGS):
                continue
            counts, other = run, here.get(identity(run))
            if other is not None:
                if claim(other) >= claim(run):
                    counts, other = other, run
                if folder not in records:
                    print(
                        f"vdrop: {other.folder} has the settings and the seed of {counts.folder}; left out",
                        file=sys.stderr,
                    )
            here[identity(run)] = counts
        finished |= {
            one: replace(run, record=finished[one]) if one in finished else run for one, run in here.items()
        }
        stuck |= {identity(run): run for run in runs.stuck_below(folder)}
    return Collected(
        by_key(finished), by_key({one: run for one, run in stuck.items() if one not in finished})
    )


def claim(run: Finished) -> tuple[bool, int]:
    """Returns how strongly a folder claims to be its run rather than a copy of it: whether training or a
    record gives it this name, then its number of evaluations.
    """
    seed = f"s{run.train.seed}"
    return run.folder.name in (seed, f"{run.train.identity(run.corpus)}-{seed}"), len(run.evaluations)


def by_key(by_identity: dict[Identity, Run]) -> dict[str, list[Run]]:
    """Returns the runs by the keys of their rows, in the order of their seeds."""
    with_key: dict[str, list[Run]] = {}
    for (shared, *_), run in sorted(by_identity.items(), key=lambda item: item[0][1]):
        with_key.setdefault(shared, []).append(run)
    return with_key
