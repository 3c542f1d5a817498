"""A field that documents itself: its help, unit and limits; and settings as plain values."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, get_args, get_origin

from vdrop_cli.errors import ConfigError, require
from vdrop_cli.policies import Choice

INTEGER_LIMIT = 2**31 - 1  # the largest value of a whole number that has no limit of its own
SEED_LIMIT = 2**63
FLOAT32_LIMIT = 3e38  # a larger number is infinite in the arithmetic
NAME_LIMIT = 100  # bytes of a name that becomes part of a folder's name
PATH_LIMIT = 3000  # bytes of a path, to which names are appended
PART_LIMIT = 255  # bytes of each name in a path
MAX_DEPTH = 4  # groups of settings within each other


class Rule(Protocol):
    """What a value must be."""

    def violation(self, value: Any) -> tuple[str, str] | None:
        """Returns what the value must be and what it is, as two texts for a message; None if it obeys the
        rule.
        """


@dataclass(frozen=True)
class Limits:
    """The range of a number."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def violation(self, value: Any) -> tuple[str, str] | None:
        low = self.at_least is None or value >= self.at_least
        above = self.above is None or value > self.above
        high = self.at_most is None or value <= self.at_most
        below = self.below is None or value < self.below
        shown = "a larger number" if isinstance(value, int) and value >= 10**30 else str(value)
        if not (low and above and high and below):
            return str(self), shown
        if isinstance(value, int) and self.at_most is None and self.below is None and value > INTEGER_LIMIT:
            return f"at most {INTEGER_LIMIT:,}", shown
        return None

    def __str__(self) -> str:
        low = self.at_least if self.at_least is not None else self.above
        high = self.at_most if self.at_most is not None else self.below
        if low == -math.inf and high == math.inf:
            return "finite"
        lower = "at least" if self.at_least is not None else "above"
        upper = "at most" if self.at_most is not None else "below"
        if low is None and high is None:
            return f"at most {INTEGER_LIMIT:,}"
        if low is None:
            return f"{upper} {digits(high)}"
        if high is None:
            return f"{lower} {digits(low)}"
        if high in (math.inf, FLOAT32_LIMIT):
            return f"{lower} {digits(low)}, and finite"
        left, right = "[" if lower == "at least" else "(", "]" if upper == "at most" else ")"
        return f"in {left}{digits(low)}, {digits(high)}{right}"


POSITIVE = Limits(at_least=1)


def digits(number: float | None) -> str:
    """A bound as a person writes it: 2^63 for large powers of two."""
    if isinstance(number, int) and number > 2**20 and number & (number - 1) == 0:
        return f"2^{number.bit_length() - 1}"
    return f"{number:,}"


@dataclass(frozen=True)
class FolderName:
    """A name without spaces, which can be part of a folder's name."""

    def violation(self, value: Any) -> tuple[str, str] | None:
        if re.fullmatch(r"\w[\w.-]*", value) is None:
            return "letters, digits, _ . and -", repr(value)
        length = len(value.encode())
        return (f"at most {NAME_LIMIT} bytes long", str(length)) if length > NAME_LIMIT else None

    def __str__(self) -> str:
        return f"letters, digits, _ . and -; at most {NAME_LIMIT} bytes"


@dataclass(frozen=True)
class FilePath:
    """A path of a file or folder, or the name of a data set, which can be a local folder."""

    def violation(self, value: Any) -> tuple[str, str] | None:
        content = value.encode(errors="surrogatepass")
        longest = max(map(len, content.split(b"/")))
        if "\0" in value:
            return "a path", "one with a NUL in it"
        if len(content) > PATH_LIMIT or longest > PART_LIMIT:
            limits = f"a path of at most {PATH_LIMIT:,} bytes, and {PART_LIMIT} in each name"
            return limits, f"{len(content):,} and {longest:,}"
        return None


@dataclass(frozen=True)
class FolderPath(FilePath):
    """A folder to write to. An empty path would be the root of the file system where a name is appended."""

    def violation(self, value: Any) -> tuple[str, str] | None:
        return super().violation(value) if value else ("a folder; . is the current one", "nothing")


@dataclass(frozen=True)
class Items:
    """A list with at least one item; `unique`: and no item twice."""

    unique: bool = False

    def violation(self, value: Any) -> tuple[str, str] | None:
        items = [str(item) for item in value]
        if not items:
            return "a list with at least one item", "[]"
        return (
            ("a list without repetitions", str(items))
            if self.unique and len(set(items)) < len(items)
            else None
        )

    def __str__(self) -> str:
        return "at least one, none twice" if self.unique else "at least one"


@dataclass(frozen=True)
class Help:
    """The documentation of a field: help, unit, and the rule for its values."""

    text: str
    unit: str = ""
    limits: Rule | None = None


def setting(default: Any, help: str, unit: str = "", limits: Rule | None = None) -> Any:
    """A field of a settings dataclass. A default that is a list or a function makes a new value each time."""
    metadata = {"help": Help(help, unit, limits)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def rule(f: "dataclasses.Field[Any]") -> Rule | None:
    """The rule of a field's values; groups have none."""
    return f.metadata["help"].limits if "help" in f.metadata else None


def require_limits(settings: Any, group: str = "") -> None:
    """Raises ConfigError unless each value of one dataclass of settings obeys its field's rule."""
    for f in dataclasses.fields(settings):
        value, own_rule = getattr(settings, f.name), rule(f)
        if isinstance(value, int) and not isinstance(value, bool):
            own_rule = own_rule or Limits()
        if value is None or own_rule is None:
            continue
        for one in value if isinstance(value, list) and not isinstance(own_rule, Items) else [value]:
            if violation := own_rule.violation(one):
                expected, got = violation
                null = ", or null" if isinstance(own_rule, Limits) and is_optional(f.type) else ""
                raise ConfigError(f"{group}{f.name} must be {expected}{null}, got {got}")


def is_optional(kind: Any) -> bool:
    return type(None) in get_args(kind)


def is_list(kind: Any) -> bool:
    return any(get_origin(one) is list for one in (kind, *get_args(kind)))


@cache
def has(kind: Any, element: type) -> bool:
    """Whether it is `element`, perhaps as an alternative or in a list."""
    return kind is element or any(has(one, element) for one in get_args(kind))


def is_text(kind: Any) -> bool:
    return str in (kind, *get_args(kind))


def refuse_unknown(kind: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """Refuses values that no field of the dataclass `kind` reads: Hydra's `+key=value` writes past the
    schema.
    """
    known = {f.name for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            hint = suggestion(prefix + key, [prefix + name for name in sorted(known)])
            raise ConfigError(f"{prefix}{key} is not a setting{hint}")
        if dataclasses.is_dataclass(value):
            refuse_unknown(type(value), vars(value), f"{prefix}{key}.")


def walk(root: type, prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]", str]]:
    """The full name and the field of every setting below a typed root, and the choice that it applies to.

    The choice is empty for settings that apply to all. A name that several choices have is there for each.
    """
    for f in dataclasses.fields(root):
        inner = [
            t for t in (f.type, *get_args(f.type)) if isinstance(t, type) and dataclasses.is_dataclass(t)
        ]
        if "variants" in f.metadata:
            for choice, kind in f.metadata["variants"].kinds.items():
                for key, inner_field, _ in walk(kind, f"{prefix}{f.name}."):
                    yield key, inner_field, f"{f.name}={choice}"
        elif inner:
            yield from walk(inner[0], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, ""


def types(root: type) -> dict[str, Any]:
    """The type of every setting below a typed root, by its full name."""
    return {key: f.type for key, f, _ in walk(root)}


def keys(root: type) -> list[str]:
    """The full name of every setting below a typed root, once."""
    return list(types(root))


def suggestion(key: str, known: list[str], aliases: dict[str, str] | None = None) -> str:
    """A hint with the most similar key, to be appended to a message; empty if no key is similar.

    Keys are compared whole and by their last parts. `aliases` are other names of keys: if an alias is the
    most similar name, the hint has the key that it stands for.
    """
    from difflib import get_close_matches

    aliases = aliases or {}
    names = {name: name for name in known} | aliases
    last: dict[str, str] = {}
    for other in known:
        last.setdefault(other.rpartition(".")[2], other)
    last |= aliases
    close = get_close_matches(key, list(names), n=1, cutoff=0.6)
    ends = get_close_matches(key.rpartition(".")[2], list(last), n=1, cutoff=0.75)
    if not close and not ends:
        return ""
    return f"; did you mean {names[close[0]] if close else last[ends[0]]}?"


def plain(config: Any) -> dict[str, Any]:
    """The configuration as dicts, strings and numbers, to be written down."""
    values = plain_group(config)
    require_plain(values)
    return values


def plain_group(group: Any) -> dict[str, Any]:
    return {f.name: plain_value(getattr(group, f.name), f.type) for f in dataclasses.fields(group)}


def plain_value(value: Any, kind: Any) -> Any:
    """A setting of the type `kind`. A whole number is a float where the setting is one."""
    if dataclasses.is_dataclass(value):
        return plain_group(value)
    if isinstance(value, list):
        return [plain_value(one, kind) for one in value]
    if isinstance(value, Choice):
        return value.name
    return float(value) if type(value) is int and has(kind, float) else value


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their full names, `{"model": {"layers": 2}}` as `{"model.layers": 2}`; unset ones
    are left out, and lists become text.
    """
    settings: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            settings |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            settings |= {prefix + key: ", ".join(map(str, value))} if value else {}
        elif value is not None:
            settings[prefix + key] = value
    return settings


def require_plain(values: Any) -> None:
    """Raises ConfigError unless these are groups of texts, numbers and nulls without OmegaConf's
    interpolations.
    """
    groups, seen = [("", values)], set[int]()
    for prefix, group in groups:  # which grows
        where = prefix.removesuffix(".") or "the configuration"
        is_new_group = isinstance(group, dict) and id(group) not in seen
        require(is_new_group, where, "a group of settings of its own", type(group).__name__)
        require(prefix.count(".") <= MAX_DEPTH, where, f"at most {MAX_DEPTH} groups deep", "more")
        seen.add(id(group))
        for key, value in group.items():
            is_name = isinstance(key, str) and re.fullmatch(r"\w+", key) is not None
            require(is_name, where, "of settings with names", ascii(key)[:80])
            if isinstance(value, dict):
                groups.append((f"{prefix}{key}.", value))
                continue
            for one in value if isinstance(value, list) else [value]:
                full_key = f"{prefix}{key}"
                is_plain = isinstance(one, str | int | float | None)
                require(is_plain, full_key, "a text, a number or null", type(one).__name__)
                interpolates = isinstance(one, str) and "${" in one
                require(not interpolates, full_key, "a text without ${", ascii(one)[:80])


def without_defaults(settings: Any) -> dict[str, Any]:
    """Nested settings as plain values, without those that a user left at their fields' defaults."""
    changed: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if dataclasses.is_dataclass(value):
            changed[f.name] = without_defaults(value)
        elif value != default or not f.init:  # a field with one value names the variant of a group
            changed[f.name] = value.name if isinstance(value, Choice) else value
    return changed
