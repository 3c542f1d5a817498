"""The experiments that stand for rows of a published table, conf/experiment/table1_<size>_<row>.yaml, and the
runs that belong to them.
"""

import itertools
import json
import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from vdrop_cli.arguments import prepared
from vdrop_cli.errors import ConfigError, nearest
from vdrop_cli.explain import explain
from vdrop_cli.settings.choices import TABLE_1, Size
from vdrop_cli.settings.compose import parse
from vdrop_cli.settings.train import Published, Train

TABLE = "table1"
OF_TEXT = (
    "source",
    "csv",
    "delimiter",
    "name",
    "config",
    "revision",
    "column",
    "rating_column",
    "min_count",
    "vocabulary_size",
)  # what tells it
ORDER = (
    "none",
    "moon",
    "moon_word",
    "zaremba",
    "variational",
    "variational_mc",
    "untied",
    "untied_mc",
)  # as in the paper; then others


@dataclass(frozen=True)
class Row:
    name: str
    size: Size
    settings: Train

    @property
    def experiment(self) -> str:
        return f"{TABLE}_{self.size}_{self.name}"

    @property
    def published(self) -> Published:
        assert self.settings.published is not None
        return self.settings.published

    @cached_property
    def key(self) -> str:
        return key(self.settings.numbers())


def key(numbers: dict[str, Any]) -> str:
    """What a run must share with a row to be one of it: all settings but the seed, the machine's, and where
    things lie.

    `numbers` are those of `Train.numbers`, which take milliseconds.
    """
    told = {name: value for name, value in numbers.items() if name not in ("device", "backend", "precision")}
    told["data"] = {name: told["data"][name] for name in OF_TEXT}
    return json.dumps(told, sort_keys=True)


def settings_of(choices: list[str], overrides: str) -> Train:
    """Of `vdrop train` with these choices, and `overrides` after them."""
    try:
        return parse(compose("train", [*choices, *prepared("train", shlex.split(overrides))]), Train)
    except ConfigError:
        raise
    except (
        HydraException,
        OmegaConfBaseException,
        ValueError,
        OverflowError,
    ) as error:  # a quotation not closed; a number beyond all floats
        raise ConfigError(
            f"{f'overrides={overrides}: ' if overrides else ''}{explain(error, 'train')}"
        ) from None


def rows(sizes: Iterable[Size], names: list[str] | None, overrides: str) -> list[Row]:
    """Of these sizes and names, in the paper's order; `overrides` are of every row's settings."""
    there = {size: names_of(size) for size in TABLE_1}
    chosen = [
        (size, name) for size in sizes for name in there.get(size, []) if names is None or name in names
    ]
    for name in names or []:
        if name not in [of_size for _, of_size in chosen]:
            others = [str(size) for size, of_size in there.items() if name in of_size]
            known = list(dict.fromkeys(known for of_size in there.values() for known in of_size))
            hint = f" of these sizes, it is of {', '.join(others)}" if others else nearest(name, known)
            raise ConfigError(f"rows: {name} is not a row{hint}")
    return [
        Row(name, size, settings_of([f"experiment={TABLE}_{size}_{name}"], overrides))
        for size, name in chosen
    ]


def seeds(count: int, stuck: Collection[int]) -> list[int]:
    """Of so many runs of a row: 1, 2, … without those that are stuck."""
    return list(islice((seed for seed in itertools.count(1) if seed not in stuck), count))


def names_of(size: Size) -> list[str]:
    """Of the rows of a size, in the paper's order."""
    prefix, there = f"{TABLE}_{size}_", GlobalHydra.instance().config_loader().get_group_options("experiment")
    of_size = (name.removeprefix(prefix) for name in there if name.startswith(prefix))
    return sorted(of_size, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
