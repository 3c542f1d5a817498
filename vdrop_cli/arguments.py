"""Rewrites what a person types after `vdrop COMMAND` for Hydra's grammar.

- Free text and paths are taken literally: no character has a meaning in Hydra's grammar. There are three
  exceptions: `null` unsets the setting, `${…}` is an interpolation, and a value in quotes follows Hydra's
  rules. At the start of a path, `~` is the home folder. `text=…` has none of these exceptions.
- Lists: `rows=a` and `rows=a,b` mean `rows=[a,b]`. An element with a comma needs quotes.
- In a sweep (-m) a comma separates the values of runs.
"""

import os
import re
from collections.abc import Iterable
from typing import Any

import yaml

from vdrop_cli import CONF, published
from vdrop_cli.errors import ConfigError
from vdrop_cli.policies import BETWEEN, PLACES
from vdrop_cli.settings.choices import SCHEDULES
from vdrop_cli.settings.commands import ROOTS
from vdrop_cli.settings.fields import FilePath, has, is_list, is_text, rule, types, walk

SWEEP_ADVICE = "add -m to run each of them"
NAMES = (
    "device",
    "model.name",
    "dropout.name",
)  # texts that never contain a comma: a comma means a sweep, which needs -m
VERBATIM = "text"  # the text to predict from: null, ${…} and quotes are plain text, too
SWEEP_FOLDER = "hydra.sweep.dir"  # the only setting of Hydra's own that is read as a path
PATHS = {SWEEP_FOLDER} | {
    key for root in ROOTS.values() for key, f, _ in walk(root) if isinstance(rule(f), FilePath)
}
# what people type first, and the setting that they mean
ALIASES = {
    "train": {
        "lr": "schedule.lr",
        "learning_rate": "schedule.lr",
        "epochs": "schedule.epochs",
        "optimizer": "schedule.optimiser",
        "optimiser": "schedule.optimiser",
        "schedule.optimizer": "schedule.optimiser",
        "clip": "schedule.clip",
        "weight_decay": "schedule.weight_decay",
        "patience": "schedule.patience",
        "max_steps": "schedule.max_steps",
        "fraction": "data.fraction",
        "batch_size": "task.batch_size",
        "bptt": "task.bptt",
        "hidden_size": "model.hidden_size",
        "layers": "model.layers",
        "num_layers": "model.layers",
        "cell": "model.cell",
        **{name: f"dropout.{name}" for name in (*PLACES, BETWEEN)},
    }
}
QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
# text that Hydra reads unchanged without quotes, unless it is a keyword
PLAIN = r"[A-Za-z_/][A-Za-z0-9_./-]*|\.{1,2}/[A-Za-z0-9_./-]*"
KEYWORDS = ("null", "true", "false", "inf", "nan")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
SETTING = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)


def to_hydra(command: str, words: Iterable[str], sweep: bool = False) -> list[str]:
    """Returns the words as overrides in Hydra's grammar. Raises ConfigError for a mistake in them."""
    known = types(ROOTS[command]) | {SWEEP_FOLDER: str}
    words = name_runs(known, name_checkpoint(known, list(words)))
    for word in words:
        # bytes that are not UTF-8, which no file of settings could hold
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ConfigError(f"{word!r} is not UTF-8; convert it, or rename the file")
    refuse_groups_of_settings(command, words)
    refuse_numbers_as_choices(command, words)
    return [override(known, word, sweep or "hydra.mode=MULTIRUN" in words) for word in words]


def full_keys(command: str, words: Iterable[str]) -> tuple[list[str], list[str]]:
    """The words with aliases and former choices replaced, and a note for each replacement."""
    full, notes = [], []
    for word in words:
        parts = SETTING.fullmatch(word)
        if parts and (key := ALIASES.get(command, {}).get(parts[2])):
            word = f"{parts[1]}{key}={parts[3]}"
            notes.append(f"{parts[2]} is {key}")
        elif parts and (command, parts[2]) == ("train", "schedule"):
            names = parts[3].split(",")
            word = f"{parts[1]}schedule={','.join(SCHEDULES.get(name, name) for name in names)}"
            notes += [f"schedule={name} is schedule={SCHEDULES[name]}" for name in names if name in SCHEDULES]
        full.append(word)
    return full, notes


def name_checkpoint(known: dict[str, Any], words: list[str]) -> list[str]:
    """A path alone is `checkpoint=PATH`, in commands that have this setting."""
    if "checkpoint" not in known:
        return words
    named = [f"checkpoint={word}" if is_path(word) else word for word in words]
    checkpoints = [word for word in named if re.match(r"\+{0,2}checkpoint=", word)]
    if named != words and len(checkpoints) > 1:
        raise ConfigError(
            f"{checkpoints[0]} and {checkpoints[1]} are two checkpoints; name one, and write other paths as "
            "setting=path"
        )
    return named


def name_runs(known: dict[str, Any], words: list[str]) -> list[str]:
    """Paths alone are `runs=[PATH,…]`, in commands that have this setting."""
    paths = [word for word in words if "runs" in known and is_path(word)]
    if not paths:
        return words
    return [*(word for word in words if word not in paths), f"runs=[{','.join(map(in_quotes, paths))}]"]


def is_path(word: str) -> bool:
    """Whether a word is a path rather than a setting: it has no `=`, or a `/` before its first `=`."""
    if "=" not in word:
        return bool(word) and not re.fullmatch(r"\+.*|~[\w.@]+", word, re.DOTALL)
    return re.match(r"(?!\+{0,2}hydra/)[^=]*/[^=]*=", word) is not None


def groups(command: str) -> list[str]:
    """The groups of which a command takes a choice."""
    defaults = yaml.safe_load((CONF / f"{command}.yaml").read_text(encoding="utf-8"))["defaults"]
    return [name for entry in defaults if isinstance(entry, dict) for name in entry]


def choices(group: str) -> list[str]:
    """The names that can be chosen in a group."""
    rows = published.experiments() if group == "experiment" else ()
    return sorted([*rows, *(path.stem for path in (CONF / group).glob("*.yaml"))])


def refuse_groups_of_settings(command: str, words: list[str]) -> None:
    """Raises ConfigError for `checkpoint=PATH` where `checkpoint` is a group of settings without choices."""
    by_group: dict[str, list[str]] = {}
    for key in types(ROOTS[command]):
        if "." in key:
            by_group.setdefault(key.partition(".")[0], []).append(key)
    for word in words:
        match = SETTING.fullmatch(word)
        if (
            not match
            or match[2] not in by_group
            or match[2] in groups(command)
            or match[3].startswith(("{", "null"))
        ):
            continue
        hint = (
            "it says how often checkpoints are written; the same vdrop train command resumes by itself, "
            "vdrop eval reads checkpoints"
        )
        about = f"; {hint}" if (command, match[2]) == ("train", "checkpoint") else ""
        raise ConfigError(
            f"{word}: {match[2]} is a group of settings ({', '.join(by_group[match[2]])}){about}"
        )


def refuse_numbers_as_choices(command: str, words: list[str]) -> None:
    """Raises ConfigError for `dropout=0.5`, where `dropout` takes the name of a choice."""
    for word in words:
        match = SETTING.fullmatch(word)
        if match and match[2] in groups(command) and re.fullmatch(r"[-+]?\.?\d[\d.,e+-]*", match[3]):
            probabilities = ", ".join(f"dropout.{place}" for place in PLACES)
            hint = f"; probabilities are {probabilities}" if match[2] == "dropout" else ""
            raise ConfigError(
                f"{word}: {match[2]} takes the name of a choice, which vdrop {command} --help lists{hint}"
            )


def override(known: dict[str, Any], word: str, sweep: bool) -> str:
    """Returns a typed setting as an override in Hydra's grammar; other words do not change."""
    match = SETTING.fullmatch(word)
    if not match or match[2] not in known:
        return word
    prefix, key, value = match.groups()
    kind, path = known[key], key in PATHS
    if key == VERBATIM:
        value = in_quotes(value)
    elif is_list(kind):
        parts = split(word, value, brackets=True) if sweep else [value]
        are_numbers = has(kind, int) or has(kind, float)
        value = ",".join(as_list(word, part, path, are_numbers) for part in parts)
    elif is_text(kind):
        if not sweep and key in NAMES and "," in value:
            raise ConfigError(f"{word}: several values are a sweep; {SWEEP_ADVICE}")
        parts = split(word, value) if sweep and key != SWEEP_FOLDER else [value]
        value = ",".join(element(part, path) for part in parts)
    return f"{prefix}{key}={value}"


def as_list(word: str, value: str, path: bool, are_numbers: bool) -> str:
    """A list setting's value, of which brackets can be left out."""
    if value in ("", "null") or re.fullmatch(r"\$\{[^{}]*\}", value):
        return value
    inner = match[1] if (match := re.fullmatch(r"\s*\[(.*)\]\s*", value, re.DOTALL)) else value
    elements = [
        part if are_numbers and NUMBER.fullmatch(part) else element(part, path) for part in split(word, inner)
    ]
    return f"[{','.join(elements)}]" if inner.strip() else "[]"


def split(word: str, value: str, brackets: bool = False) -> list[str]:
    """Returns the parts of a value between commas; those of `choice(a,b)` are `a` and `b`.

    Commas inside quotes do not separate. With `brackets`, commas inside brackets do not separate either.
    """
    value = match[1] if (match := re.fullmatch(r"choice\((.*)\)", value, re.DOTALL)) else value
    kinds = f"{QUOTED}|\\[.*?\\]" if brackets else QUOTED
    part = re.compile(rf"\s*((?:{kinds})(?=\s*(?:,|\Z))|[^,]*)\s*(,|\Z)", re.DOTALL)
    parts, place = [], 0
    while match := part.match(value, place):
        parts.append(match[1].strip())
        place = match.end()
        if not match[2]:
            break
    if len(parts) > 1 and "" in parts:
        raise ConfigError(
            f"{word}: there is nothing between two commas; leave one out, or put the value in quotes"
        )
    return parts if len(parts) > 1 else [value]


def element(text: str, path: bool) -> str:
    """Returns one text or path as typed in Hydra's grammar."""
    if text == "null" or re.fullmatch(QUOTED, text, re.DOTALL):
        return text
    if path and text.startswith("~"):
        text = os.path.expanduser(text)
    return in_quotes(text, interpolates=True) if re.search(r"\$\{.*\}", text, re.DOTALL) else literal(text)


def literal(text: str) -> str:
    """Returns a value that Hydra reads as exactly this text."""
    return text if re.fullmatch(PLAIN, text) and text.lower() not in KEYWORDS else in_quotes(text)


def in_quotes(text: str, interpolates: bool = False) -> str:
    """Returns a text in quotes, which Hydra removes; what Hydra would read as grammar is escaped."""
    special = r"(\\*)('|\Z)" if interpolates else r"(\\*)(\$\{|'|\Z)"
    escaped = re.sub(special, lambda match: match[1] * 2 + ("\\" + match[2] if match[2] else ""), text)
    return f"'{escaped}'"
