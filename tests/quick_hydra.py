"""Hydra and OmegaConf remember what they have parsed, read and composed, which saves most of the time."""

import os
import pickle
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import hydra
import omegaconf._utils
import omegaconf.base
import omegaconf.grammar_parser
from hydra import initialize_config_dir, version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.utils import JobRuntime
from omegaconf import DictConfig

from vdrop_cli import CONF


def search_path(repository: ConfigRepository) -> tuple[str, ...]:
    return tuple(source.path for source in repository.get_sources())


def is_fixed(repository: ConfigRepository) -> bool:
    """Whether all settings come from the package and Hydra, whose files do not change during tests."""
    return set(search_path(repository)) <= {str(CONF), "hydra.conf", ""}


def remembering(function: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose results are remembered, each returned as a copy, by what `key` makes of its arguments.

    Where the key is None, nothing is remembered.
    """
    results = dict[Any, bytes]()

    def method(*arguments: Any, **options: Any) -> Any:
        name = key(*arguments, **options)
        if name in results:
            return pickle.loads(results[name])
        result = function(*arguments, **options)
        if name is not None:
            results[name] = pickle.dumps(result)
        return result

    return method


def file_key(repository: ConfigRepository, config_path: str) -> Any:
    return (search_path(repository), config_path) if is_fixed(repository) else None


def composition_key(loader: ConfigLoaderImpl, *arguments: Any, **options: Any) -> Any:
    named = {**dict(zip(("config_name", "overrides", "run_mode"), arguments, strict=False)), **options}
    overrides = tuple(named.pop("overrides"))
    if not is_fixed(loader.repository) or any("hydra." in override for override in overrides):
        return None
    state = JobRuntime.instance().conf.get("name"), version.getbase(), search_path(loader.repository)
    return overrides, tuple(sorted(named.items())), state


def load_configuration(*arguments: Any, **options: Any) -> DictConfig:
    """A composition that may be remembered from another working directory."""
    composed = remembered_composition(*arguments, **options)
    composed.hydra.runtime.cwd = os.getcwd()
    return composed


remembered_composition = remembering(ConfigLoaderImpl.load_configuration, composition_key)


def compose(command: str, overrides: Sequence[str]) -> DictConfig:
    """What Hydra's function of this name returns. The choices of groups are composed once; values are set in
    a copy, as Hydra does last.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [override for override in parsed if is_value(override)]
    others = [override.input_line for override in parsed if not is_value(override)]
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        if any(line.startswith(("+", "~")) or "@" in line or "hydra" in line for line in others):
            return hydra.compose(command, list(overrides))
        composed: DictConfig = pickle.loads(composed_groups(command, tuple(others)))
    ConfigLoaderImpl._apply_overrides_to_config(values, composed)
    return composed


def is_value(override: Override) -> bool:
    """Whether an override sets the value of a setting that there is, rather than the choice of a group."""
    return (
        override.type is OverrideType.CHANGE
        and override.package is None
        and not override.is_sweep_override()
        and not override.is_hydra_override()
        and not (CONF / override.key_or_group).is_dir()
    )


@lru_cache(1000)
def composed_groups(command: str, overrides: tuple[str, ...]) -> bytes:
    return pickle.dumps(hydra.compose(command, list(overrides)))


@cache
def install() -> None:
    """Takes effect in this process, from now on."""
    parse = lru_cache(10_000)(omegaconf.grammar_parser.parse)
    for module in (omegaconf.grammar_parser, omegaconf._utils, omegaconf.base):
        module.parse = parse  # type: ignore[attr-defined]
    ConfigRepository.load_config = remembering(ConfigRepository.load_config, file_key)  # type: ignore[method-assign]
    ConfigLoaderImpl.load_configuration = load_configuration  # type: ignore[method-assign,assignment]
