"""Groups of settings that are one of several dataclasses, such as a dataclass for each corpus."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from omegaconf import MISSING

from vdrop_cli.errors import ConfigError, require
from vdrop_cli.policies import Choice
from vdrop_cli.settings.fields import Help, refuse_unknown

Group = TypeVar("Group")


def selector(choice: Choice, help: str) -> Any:
    """The field that names a variant; its value is fixed."""
    return field(default=choice, init=False, metadata={"help": Help(help)})


@dataclass(frozen=True)
class Variants(Generic[Group]):
    """The dataclasses that the group `group` can be, by the value of its setting `selector`."""

    group: str
    selector: str
    kinds: Mapping[Choice, type[Group]]

    @cached_property
    def schema(self) -> type:
        """A dataclass with the settings of all variants, for Hydra to compose.

        Pickle looks it up in the module of the variants, under the name `Any` and the group.
        """
        kinds: list[Any] = [*self.kinds.values()]
        every: dict[str, Any] = {f.name: f for kind in kinds for f in fields(kind)}
        members = []
        for name, f in every.items():
            if not f.init or all(getattr(kind, name, None) is MISSING for kind in kinds):
                members.append((name, f.type, MISSING))
            elif f.default is MISSING:
                members.append((name, f.type | None, None))
            else:
                members.append((name, f.type, f.default))
        schema = make_dataclass(f"Any{self.group.title()}", members)
        schema.__module__ = kinds[0].__module__
        return schema

    def typed(self, values: Mapping[str, Any]) -> Group:
        """The variant that `values`, the settings of all variants, select.

        Raises ConfigError where a setting of another variant is set, or one that the variant needs is not.
        """
        refuse_unknown(self.schema, values, f"{self.group}.")
        choice = values[self.selector]
        kind: Any = self.kinds[choice]
        own = {f.name: f for f in fields(kind)}
        for f in fields(self.schema):
            value, key, chosen = (
                values.get(f.name, f.default),
                f"{self.group}.{f.name}",
                f"{self.group}={choice}",
            )
            if f.name not in own:
                if value != f.default:
                    raise ConfigError(
                        f"{key} must be unset with {chosen}, got {value}; "
                        f"it is for {self.choices_with(f.name)}"
                    )
            elif own[f.name].default is MISSING:
                require(value not in (None, ""), key, f"set with {chosen}", "nothing")
        return kind(**{name: values[name] for name, f in own.items() if f.init})  # type: ignore[no-any-return]

    def choices_with(self, name: str) -> str:
        """The choices that have a setting, as they are typed."""
        return " and ".join(
            f"{self.group}={choice}"
            for choice, kind in self.kinds.items()
            if name in kind.__dataclass_fields__  # type: ignore[attr-defined]
        )

    def changed(self, settings: Group, changes: Mapping[str, Any]) -> Group:
        """The same variant with some settings changed. Raises ConfigError as `typed` does."""
        values = {f.name: getattr(settings, f.name) for f in fields(settings)}  # type: ignore[arg-type]
        return self.typed(values | dict(changes))


def group_field(variants: Variants[Any], default: Any = MISSING) -> Any:
    """A field of a settings dataclass that is a group with variants."""
    return field(default=default, metadata={"variants": variants})
