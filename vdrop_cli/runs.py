"""Runs that are finished, as they lie on disk: what they were set to, how they went, how they ended."""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # of omegaconf

from vdrop_cli.config import ConfigError, Published, Train, plain, restore
from vdrop_cli.explain import explain
from vdrop_cli.sinks import flat, read_log, read_result


@dataclass(frozen=True)
class Finished:
    """A run folder, or a record of one."""

    folder: Path
    config: dict[str, Any]
    log: list[dict[str, Any]]
    result: dict[str, Any]

    @cached_property
    def train(self) -> Train:
        return restore(self.config)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """By their full names, those that it was made without as they are by default; of what was published nothing."""
        return flat({name: value for name, value in plain(self.train).items() if name != "published"})

    @property
    def epochs(self) -> list[dict[str, Any]]:
        return [record for record in self.log if record["kind"] == "epoch"]

    @property
    def environments(self) -> list[dict[str, Any]]:
        """In which it was started, and then gone on with."""
        return [record["environment"] for record in self.log if record["kind"] == "start"]

    @property
    def environment(self) -> dict[str, Any]:
        """The last of them."""
        return self.environments[-1]

    @property
    def words_per_second(self) -> float:
        """Of training, the median over its epochs."""
        return float(median(epoch["words_per_second"] for epoch in self.epochs))

    @property
    def evaluations(self) -> list[Path]:
        """Files that `vdrop eval` wrote of the epoch that is reported."""
        return sorted(self.folder.glob(f"eval-{self.result['epoch']:04}-*.json"))


MADE = ("precision", "device", "date", "commit")


def made(environments: Iterable[dict[str, Any]]) -> list[str]:
    """A text for each of MADE; of environments that differ in it all."""
    return ["; ".join(dict.fromkeys(told)) for told in zip(*map(made_in, environments), strict=True)]


def code_differed(environments: Iterable[dict[str, Any]]) -> bool | None:
    """Whether any was made with code that differed from its commit; None: unknown."""
    dirty = [environment.get("dirty") for environment in environments]
    return True if True in dirty else None if None in dirty else False


def made_in(environment: dict[str, Any]) -> list[str]:
    """The device with its threads, the commit with a star where the code differed from it, a question mark where that is unknown."""
    threads = environment.get("threads")
    device = str(environment["device"]) + (f", {threads} thread{'s' if threads != 1 else ''}" if threads else "")
    mark = {True: "*", None: "?" if "commit" in environment else ""}.get(environment.get("dirty"), "")
    commit = str(environment.get("commit", "–"))[:7] + mark
    return [str(environment["precision"]), device, str(environment.get("date", "–")), commit]


def read(folder: Path) -> Finished | None:
    """A run that has a result; one that has none yet is passed over, and said so."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not a run folder, it has no config.yaml; name folders below outputs/train")
    if not (folder / "result.json").is_file():
        print(f"vdrop: {folder} is not finished, left out", file=sys.stderr)
        return None
    log, result = read_log(folder / "log.jsonl"), read_result(folder)
    if not {"start", "epoch"} <= {record["kind"] for record in log}:
        raise ConfigError(f"{folder / 'log.jsonl'} is damaged, its start or its epochs are not there; train again with force=true")
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        found = Finished(folder, config, log, result)
        _ = found.train  # which it keeps
    except (ConfigError, OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{folder / 'config.yaml'} is of another version of vdrop, or damaged ({explain(error, 'train')})") from None
    return found


def below(folder: Path) -> list[Finished]:
    """All that are finished, however deep; what this version cannot read is left out, and said so."""
    return [run for path in sorted(folder.rglob("result.json")) if (run := read_if_possible(path.parent)) is not None]


def read_if_possible(folder: Path) -> Finished | None:
    try:
        return read(folder)
    except ConfigError as error:
        print(f"vdrop: {error}; left out", file=sys.stderr)
        return None


def evaluation_of(run: Finished, published: Published) -> dict[str, Any] | None:
    """What `vdrop eval` wrote of a run in the way that a row is evaluated, beyond the standard one; None where it has not yet."""
    kind = rf"mc{published.mc_samples}-s\d+" if published.mc_samples else rf"ensemble{published.members}-[0-9a-f]+"
    found = (evaluation(path) for path in run.evaluations if re.fullmatch(rf"eval-\d+-{kind}\.json", path.name))
    return next((told for told in found if published.mc_samples or are_one_row(told["members"])), None)


def are_one_row(members: list[str]) -> bool:
    """Whether checkpoints, by their paths, are ends of epochs of runs that differ by their seeds alone, and these are 1, 2, …"""
    if not all(re.fullmatch(r"checkpoint-\d+\.pt", Path(member).name) for member in members):
        return False
    folders = [Path(member).parent.name for member in members]
    settings = folders[0].rpartition("-s")[0]
    return sorted(folders) == sorted(f"{settings}-s{seed}" for seed in range(1, len(folders) + 1))


def evaluation(path: Path) -> dict[str, Any]:
    """What `vdrop eval` wrote."""
    try:
        told = json.loads(path.read_text(errors="replace"))
        if isinstance(told, dict) and isinstance(told.get("metrics"), dict):
            return told
    except ValueError:
        pass
    raise ConfigError(f"{path} is damaged; delete it and give the same vdrop eval command again")
