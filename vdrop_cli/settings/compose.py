"""From files and overrides, which Hydra composes, to typed settings."""

from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.commands import ROOTS
from vdrop_cli.settings.fields import refuse_unknown, require_plain, require_within_limits
from vdrop_cli.settings.train import Train

Root = TypeVar("Root")


def register() -> None:
    """Makes the typed roots and the resolvers `by_size` and `by_source` known to Hydra."""
    for command, root in ROOTS.items():
        ConfigStore.instance().store(name=f"{command}_schema", node=root)
    OmegaConf.register_new_resolver("by_size", by_size, replace=True)
    OmegaConf.register_new_resolver("by_source", by_source, replace=True)


def by_size(table: DictConfig, *, _root_: DictConfig) -> Any:
    """`${by_size:{small:…,medium:…,large:…}}` in a YAML file: the value published for the size of the chosen
    model.
    """
    size = str(_root_.model.size)
    if size not in table:
        raise ConfigError(
            f"nothing is published for model.size={size} there, only for {', '.join(map(str, table))}; set "
            "it, or choose another model"
        )
    return table[size]


def by_source(table: dict[str, Any], *, _root_: DictConfig) -> Any:
    """`${by_source:{cornell:…,other:…}}` in a YAML file: the value for the source of the chosen data, or for
    all others.
    """
    return table.get(str(OmegaConf.select(_root_, "data.source")), table["other"])


def parse(config: DictConfig, root: type[Root]) -> Root:
    """The configuration as typed objects, every value checked."""
    parsed = OmegaConf.to_object(config)
    assert isinstance(parsed, root)
    refuse_unknown(parsed, "")
    require_within_limits(parsed, "")
    return parsed


def restore(values: dict[str, Any]) -> Train:
    """The configuration of a training run from what `plain` wrote down. It is data: nothing in it is
    resolved.

    Raises ConfigError, or what OmegaConf raises, where it is something else.
    """
    require_plain(values)
    return parse(OmegaConf.merge(OmegaConf.structured(Train), values), Train)  # type: ignore[arg-type]
