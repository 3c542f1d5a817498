"""What all settings have in common: limits, the names and types of fields, settings as plain values."""

import dataclasses
import re
from typing import Any, get_args

from omegaconf import OmegaConf

from vdrop_cli.errors import ConfigError, nearest, require
from vdrop_cli.policies import Choice

INTEGER_LIMIT = 2**31 - 1  # of every whole number but the seeds
LIMITS = {"layers": 1000, "mc_samples": 10**6, "mc_batch": 10**6}  # of some, which would take for ever
SEEDS = ("seed", "split_seed")  # which have limits of their own
NAME_LIMIT = 100  # bytes of a name that becomes part of a folder's name
PATH_LIMIT, PART_LIMIT = 3000, 255  # bytes of a path, to which names are added; and of a name in it
PATHS = (
    "checkpoint",
    "members",
    "outputs",
    "file",
    "csv",
    "latex",
    "dir",
    "train",
    "valid",
    "test",
    "cache",
    "name",
)


FLOAT32_LIMIT = 3e38  # what is larger is infinite in the arithmetic


def require_name(key: str, name: str) -> None:
    """It becomes part of a folder's name."""
    require(re.fullmatch(r"\w[\w.-]*", name) is not None, key, "letters, digits, _ . and -", repr(name))
    require(
        len(name.encode()) <= NAME_LIMIT, key, f"at most {NAME_LIMIT} bytes long", f"{len(name.encode())}"
    )


SEED_LIMIT = 2**63
DEPTH = 4  # of groups of settings within each other, at most


def refuse_unknown(node: Any, prefix: str) -> None:
    """Hydra's `+key=value` writes past the schema; what no field reads is refused here."""
    known = {f.name for f in dataclasses.fields(node)}
    for key, value in vars(node).items():
        if key not in known:
            raise ConfigError(
                f"{prefix}{key} is not a "
                f"setting{nearest(prefix + key, [prefix + name for name in sorted(known)])}"
            )
        if dataclasses.is_dataclass(value):
            refuse_unknown(value, f"{prefix}{key}.")


def require_within_limits(node: Any, prefix: str) -> None:
    """That numbers and paths are of a size that the machine can hold."""
    for f in dataclasses.fields(node):
        value, key = getattr(node, f.name), prefix + f.name
        if dataclasses.is_dataclass(value):
            require_within_limits(value, f"{key}.")
        elif isinstance(value, int) and not isinstance(value, bool) and f.name not in SEEDS:
            limit = LIMITS.get(f.name, INTEGER_LIMIT)
            require(value <= limit, key, f"at most {limit:,}", value if value < 10**30 else "a larger number")
        elif f.name in PATHS:
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, str):
                    require_path(key, path)


def require_path(key: str, path: str) -> None:
    content = path.encode(errors="surrogatepass")
    longest = max(map(len, content.split(b"/")))
    require("\0" not in path, key, "a path", "one with a NUL in it")
    require(
        len(content) <= PATH_LIMIT and longest <= PART_LIMIT,
        key,
        f"a path of at most {PATH_LIMIT:,} bytes, and {PART_LIMIT} in each name",
        f"{len(content):,} and {longest:,}",
    )


def types(root: type, prefix: str = "") -> dict[str, Any]:
    """The type of every setting below a typed root, by its full name as written on the command line."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(root):
        inner = [
            t for t in (f.type, *get_args(f.type)) if isinstance(t, type) and dataclasses.is_dataclass(t)
        ]
        found |= types(inner[0], f"{prefix}{f.name}.") if inner else {prefix + f.name: f.type}
    return found


def keys(root: type, prefix: str = "") -> list[str]:
    """The full name of every setting below a typed root."""
    return list(types(root, prefix))


def plain(config: Any) -> dict[str, Any]:
    """The configuration as dicts, strings and numbers, to be written down."""
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)  # type: ignore[assignment]
    require_plain(values)
    return values


def require_plain(values: Any) -> None:
    """Raises ConfigError unless these are groups of texts, numbers and nulls, and nothing in them that
    OmegaConf would resolve.
    """
    groups, seen = [("", values)], set[int]()
    for prefix, group in groups:  # which grows
        where = prefix.removesuffix(".") or "the configuration"
        require(
            isinstance(group, dict) and id(group) not in seen,
            where,
            "a group of settings of its own",
            type(group).__name__,
        )
        require(prefix.count(".") <= DEPTH, where, f"at most {DEPTH} groups deep", "more")
        seen.add(id(group))
        for key, value in group.items():
            require(
                isinstance(key, str) and re.fullmatch(r"\w+", key) is not None,
                where,
                "of settings with names",
                ascii(key)[:80],
            )
            if isinstance(value, dict):
                groups.append((f"{prefix}{key}.", value))
                continue
            for one in value if isinstance(value, list) else [value]:
                require(
                    isinstance(one, str | int | float | None),
                    f"{prefix}{key}",
                    "a text, a number or null",
                    type(one).__name__,
                )
                require(
                    not isinstance(one, str) or "${" not in one,
                    f"{prefix}{key}",
                    "a text without ${",
                    ascii(one)[:80],
                )


def without_defaults(settings: Any) -> dict[str, Any]:
    """Nested settings as plain values, without those that are as their fields have them by default."""
    told: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            told[f.name] = without_defaults(value)
        elif value != f.default:
            told[f.name] = value.name if isinstance(value, Choice) else value
    return told
