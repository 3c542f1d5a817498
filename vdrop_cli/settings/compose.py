"""From files and overrides, which Hydra composes, to typed settings."""

from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from vdrop_cli import published
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.choices import SCHEDULES
from vdrop_cli.settings.commands import ROOTS
from vdrop_cli.settings.fields import refuse_unknown, require_plain
from vdrop_cli.settings.train import FORMER_SIZE, Train

Root = TypeVar("Root")


def register() -> None:
    """Registers the typed roots, the experiments of Table 1 and the resolvers of conf/ with Hydra."""
    for command, root in ROOTS.items():
        ConfigStore.instance().store(name=f"{command}_schema", node=root)
    for name, node in published.experiments().items():
        ConfigStore.instance().store(name, node, group="experiment", package="_global_")
    OmegaConf.register_new_resolver("by_size", by_size, replace=True)
    OmegaConf.register_new_resolver("by_source", by_source, replace=True)
    OmegaConf.register_new_resolver("schedule_of", schedule_of, replace=True)


def config_folder_options() -> list[str]:
    """The option `--config-dir` of this process, for other commands with choices from that folder."""
    hydra = GlobalHydra.instance()
    sources = hydra.config_loader().get_sources() if hydra.is_initialized() else []
    return [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]


def schedule_of(dropout: str) -> str:
    """The choice of the group schedule for one of the group dropout."""
    return SCHEDULES.get(dropout, dropout)


def by_size(table: DictConfig, *, _root_: DictConfig) -> Any:
    """The value for the chosen model's size: `${by_size:{small:…,medium:…,large:…,other:…}}` in a YAML file.

    `other` is for models without a size.
    """
    size = "other" if _root_.model.size is None else str(_root_.model.size)
    if size not in table:
        sizes = ", ".join(f"model.size={name}" for name in map(str, table))
        raise ConfigError(
            f"nothing is published for model={_root_.model.name}, only for {sizes}; set this value, or "
            "choose another model"
        )
    return table[size]


def by_source(table: dict[str, Any], *, _root_: DictConfig) -> Any:
    """The value for the chosen corpus, or for others: `${by_source:{cornell:…,other:…}}` in a YAML file."""
    return table.get(str(OmegaConf.select(_root_, "data.source")), table["other"])


def parse(config: DictConfig, root: type[Root]) -> Root:
    """The configuration as typed objects, every value checked."""
    parsed = OmegaConf.to_object(config)
    assert isinstance(parsed, root)
    refuse_unknown(parsed, "")
    return parsed


def restore(values: dict[str, Any]) -> Train:
    """The configuration of a training run from what `plain` wrote. It is data: nothing in it is resolved.

    Raises ConfigError, or what OmegaConf raises, if it is something else.
    """
    require_plain(values)
    model = values.get("model")
    if isinstance(model, dict) and model.get("size") == FORMER_SIZE:
        values = values | {"model": model | {"size": None}}
    # versions until November 2026 wrote the published numbers of a row with the settings of its runs
    values = {name: value for name, value in values.items() if name != "published"}
    return parse(OmegaConf.merge(OmegaConf.structured(Train), values), Train)  # type: ignore[arg-type]
