"""From files and overrides, which Hydra composes, to typed settings."""

from dataclasses import Field, dataclass, fields
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf

from vdrop_cli import published
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.choices import SCHEDULES
from vdrop_cli.settings.commands import ROOTS, ListData
from vdrop_cli.settings.data import RATED, AnyData
from vdrop_cli.settings.fields import refuse_unknown, require_plain
from vdrop_cli.settings.task import AnyTask
from vdrop_cli.settings.train import FORMER_SIZE, Train
from vdrop_cli.settings.variants import Variants

Root = TypeVar("Root")


@dataclass
class ComposedTrain(Train):
    """What Hydra composes for `vdrop train`: the settings of every corpus and task."""

    data: AnyData = MISSING
    task: AnyTask = MISSING


@dataclass
class ComposedListData(ListData):
    """What Hydra composes for `vdrop data`: the settings of every corpus."""

    data: AnyData | None = None


SCHEMAS = ROOTS | {"train": ComposedTrain, "data": ComposedListData}


def register() -> None:
    """Registers the typed roots, the experiments of Table 1 and the resolvers of conf/ with Hydra."""
    for command, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{command}_schema", node=schema)
    for name, node in published.experiments().items():
        ConfigStore.instance().store(name, node, group="experiment", package="_global_")
    OmegaConf.register_new_resolver("by_size", by_size, replace=True)
    OmegaConf.register_new_resolver("by_source", by_source, replace=True)
    # the choice of the group schedule for one of the group dropout
    OmegaConf.register_new_resolver("schedule_of", lambda name: SCHEDULES.get(name, name), replace=True)


def config_folder_options() -> list[str]:
    """The option `--config-dir` of this process, for other commands with choices from that folder."""
    hydra = GlobalHydra.instance()
    sources = hydra.config_loader().get_sources() if hydra.is_initialized() else []
    return [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]


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


def variant_groups(root: type) -> list[tuple["Field[Any]", Variants[Any]]]:
    return [(f, f.metadata["variants"]) for f in fields(root) if "variants" in f.metadata]


def parse(config: DictConfig, root: type[Root]) -> Root:
    """The configuration as typed objects, every value checked."""
    values = {
        str(name): OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
        for name, node in config.items()
    }
    refuse_unknown(root, values)
    for f, variants in variant_groups(root):
        if values[f.name] is not None:
            values[f.name] = variants.typed(vars(values[f.name]))
    return root(**values)


def restore(values: dict[str, Any]) -> Train:
    """The settings of a training run, from the values that `plain` wrote.

    The values are data: nothing in them is resolved, and interpolations are refused. Raises ConfigError, or
    an error of OmegaConf, for any other values.
    """
    require_plain(values)
    model, data = values.get("model"), values.get("data")
    if isinstance(model, dict) and model.get("size") == FORMER_SIZE:
        values = values | {"model": model | {"size": None}}
    # versions until November 2026 wrote the published numbers of a row with the settings of its runs, and a
    # cache for texts with ratings, which had none
    values = {name: value for name, value in values.items() if name != "published"}
    if isinstance(data, dict) and data.get("source") in [str(source) for source in RATED]:
        values["data"] = {name: value for name, value in data.items() if name != "cache"}
    composed = OmegaConf.merge(OmegaConf.structured(ComposedTrain), values)
    return parse(composed, Train)  # type: ignore[arg-type]
