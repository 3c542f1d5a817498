"""Completion in bash: commands, options, settings, choices, lists and paths that complete the last word."""

import os
import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, get_args

from vdrop_cli import published
from vdrop_cli.arguments import PATHS, choices, groups
from vdrop_cli.settings.commands import ROOTS
from vdrop_cli.settings.fields import is_list, walk

LAUNCHER = "hydra/launcher"
LAUNCHERS = ["basic", "joblib", "submitit_local", "submitit_slurm"]
SPECIAL = re.compile(r"([\s\\'\"`$&|;<>()*?#!{}])")  # characters that bash reads in its own way


def answer(commands: Iterable[str], options: list[str]) -> None:
    """Prints a line for each completion of what stands before the cursor."""
    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT") or 1_000_000)]
    _, *words = (re.sub(r"\\(.)", r"\1", word) for word in re.split(r"(?<!\\) ", line))
    for word in completions(words or [""], commands, options):
        print(SPECIAL.sub(r"\\\1", word) + (" " if word in commands else ""))


def completions(words: list[str], commands: Iterable[str], options: list[str]) -> list[str]:
    """Returns the possible completions of the last word."""
    last, command = words[-1], next((word for word in words[:-1] if word in commands), None)
    if last.startswith("-"):
        return [option for option in options if option.startswith(last)]
    if command is None:
        return [name for name in commands if name.startswith(last)]
    if command not in ROOTS:
        return []  # bash then takes file names
    known = settings_of(command, words)
    named = re.match(r"(\+{0,2}([\w./]+)=\[?(?:.*,)?\s*)(.*)", last, re.DOTALL)
    if named is None or ("/" in named[2] and named[2] != LAUNCHER):
        paths = files(last) if {"checkpoint", "runs"} & known.keys() and last else []
        return [*next_names(last, [*known, *groups(command), LAUNCHER]), *paths]
    start, key, stem = named.groups()
    taken = re.split(r"[\[,=]\s*", start)
    if key in PATHS:
        return [start + path for path in files(stem)]
    return [
        start + value
        for value in values(command, key, known.get(key))
        if value.startswith(stem) and value not in taken
    ]


def settings_of(command: str, words: list[str]) -> dict[str, Any]:
    """The types of a command's settings; only those that suit the corpus and the task in `words`, if any."""
    every = [*walk(ROOTS[command])]
    chosen = {choice.partition("=")[0]: choice for _, _, choice in every if choice in words}
    return {key: f.type for key, f, choice in every if choice == chosen.get(choice.partition("=")[0], choice)}


def next_names(stem: str, keys: list[str]) -> list[str]:
    """Keys up to their next dot: `schedule.` for `sche`; a group is a key, too."""
    words_of_level: dict[str, None] = {}
    for key in keys:
        if key.startswith(stem):
            head, dot, _ = key[len(stem) :].partition(".")
            words_of_level[f"{stem}{head}{dot or '='}"] = None
    return list(words_of_level)


def values(command: str, key: str, kind: Any) -> list[str]:
    """Returns the values of a setting or group that has a fixed set of them; an empty list for others."""
    if key == LAUNCHER:
        return LAUNCHERS
    if key in groups(command):
        return choices(key)
    if key == "device":
        return ["auto", "cpu", "cuda"]
    if key == "dropouts":
        return choices("dropout")
    if key == "rows":
        names = {row for size in published.sizes().values() for row in size["rows"]}
        names |= set(published.baselines()["rows"]) if command == "reproduce" else set()
        return sorted([*names, *published.experiments()])
    inner = [one for t in (kind, *get_args(kind)) for one in (t, *get_args(t))]
    values = [value.name for t in inner if isinstance(t, type) and issubclass(t, Enum) for value in t]
    values += ["true", "false"] if bool in inner else []
    return [*dict.fromkeys(values)] + (["null"] if type(None) in get_args(kind) and not is_list(kind) else [])


def files(stem: str) -> list[str]:
    """Returns the files and folders whose path begins with `stem`; folders end in a slash."""
    folder, slash, name = stem.rpartition("/")
    try:
        entries = sorted(Path(os.path.expanduser(folder + slash) or ".").iterdir())
    except OSError:
        return []
    shown = (
        path
        for path in entries
        if path.name.startswith(name) and (name.startswith(".") or not path.name.startswith("."))
    )
    return [f"{folder}{slash}{path.name}{'/' if path.is_dir() else ''}" for path in shown]
