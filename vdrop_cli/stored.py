"""Reads JSON and YAML from disk as plain data: strictly, with limits, of the required types."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml

from vdrop_cli import files
from vdrop_cli.files import Damaged

MAX_DEPTH = 20  # of nested lists and dicts
JSON_LIMIT = 2**26  # bytes of a result or an evaluation; the largest so far has some hundred kilobytes
YAML_LIMIT = 2**20  # bytes of a configuration; they have some kilobytes


def read_json(path: Path) -> dict[str, Any]:
    """Reads an object; raises FileNotFoundError, Damaged, or OSError where it cannot be read now."""
    return parse_json(files.read(path, JSON_LIMIT))


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a mapping; raises FileNotFoundError, Damaged, or OSError where it cannot be read now."""
    return parse_yaml(files.read(path, YAML_LIMIT))


def parse_json(content: bytes, infinite: bool = False) -> dict[str, Any]:
    """Parses an object as `parse_value` does; raises Damaged."""
    value = parse_value(content, infinite)
    if not isinstance(value, dict):
        raise Damaged("it is not a JSON object")
    return value


def parse_value(content: bytes, infinite: bool = False) -> Any:
    """Parses strict JSON in UTF-8 without repeated keys; raises Damaged.

    `infinite` allows Infinity, which some settings may have.
    """

    def constant(name: str) -> float:
        if infinite and name != "NaN":
            return float(name)
        raise Damaged(f"{name} is not a number")

    try:
        value = json.loads(content.decode(), parse_constant=constant, object_pairs_hook=without_repeats)
    except RecursionError:
        raise Damaged("it is nested too deeply") from None
    except ValueError:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise Damaged("it is not JSON") from None
    if any(depth >= MAX_DEPTH for depth, _ in enumerate(levels(value))):
        raise Damaged("it is nested too deeply")
    return value


def levels(value: Any) -> Iterator[list[Any]]:
    """Yields a value in a list, then the values inside it, then the values inside those.

    Lists, tuples and dicts count as containers; each of them must be in one place only.
    """
    level = [value]
    while level:
        yield level
        containers = [inner for inner in level if isinstance(inner, list | tuple | dict)]
        level = [
            inner for outer in containers for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]


def readable_by(parse: Callable[[bytes], object]) -> Callable[[bytes], bool]:
    """Returns a predicate: whether `parse` accepts a content without raising Damaged."""

    def is_readable(content: bytes) -> bool:
        try:
            parse(content)
        except Damaged:
            return False
        return True

    return is_readable


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise Damaged("it names a key twice")
    return mapping


class PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """A YAML loader for plain data; it refuses anchors, aliases and tags before it expands anything.

    Dates stay strings, as in OmegaConf.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            self.refuse("it has an anchor or an alias")
        if getattr(event, "tag", None) not in (None, "!"):
            self.refuse("it has a tag")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.refuse("it is nested too deeply")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[str, Any]:
        pairs = [
            (self.construct_object(key), self.construct_object(value, deep=True)) for key, value in node.value
        ]
        if not all(isinstance(key, str) for key, _ in pairs):
            self.refuse("it has a key that is not text")
        return without_repeats(pairs)

    def refuse(self, why: str) -> NoReturn:
        raise Damaged(why)


def parse_yaml(content: bytes) -> dict[str, Any]:
    """Parses a mapping of plain data; raises Damaged."""
    try:
        value = yaml.load(content.decode(), Loader=PlainLoader)  # derived from SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError):
        raise Damaged("it is not YAML") from None
    if not isinstance(value, dict):
        raise Damaged("it is not a mapping")
    return value


def require_types(values: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    """Raises Damaged unless every field exists and has its type.

    A float must be finite, and may be written as an integer.
    """
    for name, kind in fields.items():
        if name not in values:
            raise Damaged(f"{name} is missing")
        value = values[name]
        is_of_kind = (
            is_finite(value)
            if kind is float
            else isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        )
        if not is_of_kind:
            raise Damaged(f"{name} must be {KINDS[kind]}")


KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "text",
    dict: "an object",
    list: "a list",
}


def is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer larger than any float
        return False
