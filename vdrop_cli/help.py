"""Help for a command and for a setting, and the page docs/settings.md, from the settings' metadata."""

import textwrap
from collections.abc import Iterator
from dataclasses import Field
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin

from hydra import compose, initialize_config_dir
from omegaconf import MISSING, DictConfig, OmegaConf

from vdrop_cli import CONF
from vdrop_cli.arguments import ALIASES, choices, groups, literal
from vdrop_cli.errors import ConfigError
from vdrop_cli.policies import Choice
from vdrop_cli.settings.commands import ROOTS
from vdrop_cli.settings.compose import register, variant_groups
from vdrop_cli.settings.fields import FilePath, Help, is_optional, rule, suggestion, walk

WIDTH = 110
KEY_WIDTH = 34  # columns of a setting and its value
PAGE_HEAD = """# Settings

Every setting of every command, generated from the code by `make docs-settings`. The option `--help` of a
command shows the same with the values of a command line. `vdrop help schedule.lr` shows one setting, and
`vdrop help schedule` a group.

A section such as `data=text` lists the settings that apply with that choice.

Defaults are those of the command without arguments, apart from the choice in the heading. For `vdrop train`
these are `model=lstm_medium`, `dropout=variational` and `data=ptb`. Values that were published per size
follow the model. `null` unsets a setting that allows it. A whole number without another upper limit is at
most 2,147,483,647.
"""


def composed(command: str, words: list[str]) -> DictConfig:
    """The configuration of a command line. Raises what Hydra raises."""
    register()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose(command, words)


def command_help(command: str, words: list[str]) -> str:
    """The groups of a command and a line for each setting with the value that `words` lead to.

    Where a corpus or a task is chosen, settings of others are left out.
    """
    config = composed(command, words)
    chosen = chosen_variants(config, ROOTS[command])
    sections: dict[str, list[str]] = {}
    for key, f, choice in walk(ROOTS[command]):
        group = key.rpartition(".")[0]
        if group in chosen and choice != chosen[group]:
            continue
        source = config if not choice or group in chosen else with_choice(command, choice)
        text = line(f"{key}={shown(value(source, key, f))}", described(f))
        sections.setdefault(choice or group, []).append(text)
    parts = [line_of_choices(name) for name in groups(command)]
    parts = ["groups, as group=choice:", *parts, ""] if parts else []
    for group in (*filter(None, sections), *(("",) if "" in sections else ())):
        parts += [f"{group or 'settings'}:", *sections[group], ""]
    return "\n".join(parts)


def chosen_variants(config: DictConfig, root: type) -> dict[str, str]:
    """The choice of each group with variants, such as data=ptb; groups without a choice are left out."""
    groups = [variants for f, variants in variant_groups(root) if config[f.name] is not None]
    return {one.group: f"{one.group}={config[one.group][one.selector]}" for one in groups}


def line_of_choices(group: str) -> str:
    text = f"{group}: {', '.join(choices(group))}"
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False)


def line(key: str, text: str) -> str:
    """A key and its description in two columns."""
    indent = " " * (KEY_WIDTH + 3)
    wrapped = textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
    if len(key) > KEY_WIDTH:
        return f"  {key}\n{wrapped}"
    return f"  {key:<{KEY_WIDTH}} {wrapped.lstrip()}"


def described(f: "Field[Any]") -> str:
    """The meaning of a setting, and the values that it can have."""
    about: Help = f.metadata["help"]
    return f"{about.text} [{allowed(f, about.unit)}]"


def allowed(f: "Field[Any]", unit: str = "") -> str:
    """The type or unit of a setting, its limits, and whether it can be null."""
    if not f.init:
        return str(f.default)  # the name of a variant
    kind: Any = f.type
    if is_optional(kind):
        kind = next(one for one in get_args(kind) if one is not NoneType)
    limits = rule(f)
    if isinstance(limits, FilePath):
        name = "paths" if kind == list[str] else "path"
    elif get_origin(kind) is list:
        (item,) = get_args(kind)
        name = f"list of {', '.join(one.name for one in item)}" if issubclass(item, Choice) else "list"
    elif issubclass(kind, Choice):
        name = ", ".join(one.name for one in kind)
    else:
        name = unit or {bool: "true or false", int: "whole number", float: "number", str: "text"}[kind]
    bounds = f"; {limits}" if limits is not None and not isinstance(limits, FilePath) else ""
    return f"{name}{bounds}{'; or null' if is_optional(f.type) else ''}"


def value(config: DictConfig, key: str, f: "Field[Any]") -> Any:
    """Returns the value of a setting in a configuration; MISSING where a required setting is not set."""
    value = OmegaConf.select(config, key, throw_on_missing=False)
    return MISSING if value is None and f.default is MISSING and not is_optional(f.type) else value


def shown(value: Any) -> str:
    """A value as it is typed."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if OmegaConf.is_list(value):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, Choice):
        return value.name
    if value == MISSING:
        return ""
    return literal(value) if isinstance(value, str) else str(value)


def key_help(query: str) -> str:
    """The meaning, unit, limits and default of a setting, by its full key, last part, group or alias.

    Raises ConfigError if no command has it.
    """
    blocks: dict[str, dict[str, list[str]]] = {}  # by text and command: the choices that have this text
    known: list[str] = []
    for command, root in ROOTS.items():
        full = ALIASES.get(command, {}).get(query, query)
        for key, f, choice in walk(root):
            known.append(key)
            if full == key or key.endswith(f".{full}") or key.startswith(f"{full}."):
                config = with_choice(command, choice)
                block = "\n".join(
                    [
                        *textwrap.wrap(described(f), WIDTH - 2, initial_indent="  ", subsequent_indent="  "),
                        f"  default: {shown(value(config, key, f)) or 'none'}",
                    ]
                )
                blocks.setdefault(f"{key}\n{block}", {}).setdefault(command, []).append(choice)
    if not blocks:
        aliases = {name: key for names in ALIASES.values() for name, key in names.items()}
        hint = suggestion(query, known, aliases) or "; vdrop COMMAND --help lists them"
        raise ConfigError(f"{query} is neither a setting nor a group{hint}")
    texts = []
    for block, commands in blocks.items():
        key, _, rest = block.partition("\n")
        where = [
            f"vdrop {command} {joined_choices(choices)}".rstrip() for command, choices in commands.items()
        ]
        texts.append(f"{key} ({'; '.join(where)})\n{rest}\n")
    return "\n".join(texts)


def joined_choices(choices: list[str]) -> str:
    """Choices of one group as one word: data=text,hub."""
    group, _, _ = choices[0].partition("=")
    return f"{group}={','.join(choice.partition('=')[2] for choice in choices)}" if group else ""


@cache
def with_choice(command: str, choice: str) -> DictConfig:
    """The configuration of a command with no other argument than a choice of a group."""
    return composed(command, [choice] if choice else [])


def page() -> str:
    """The text of docs/settings.md."""
    parts = [PAGE_HEAD]
    for command, root in ROOTS.items():
        parts.append(f"## vdrop {command}")
        section = None
        for key, f, choice in walk(root):
            config, title = with_choice(command, choice), choice or key.rpartition(".")[0]
            if title != section:
                parts += ["", *table_head(title or ("" if section is None else "other settings"))]
                section = title
            about: Help = f.metadata["help"]
            cells = [f"`{key}`", about.text, about.unit, code(shown(value(config, key, f))), allowed(f)]
            parts.append("| " + " | ".join(cell.replace("<", "&lt;") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def table_head(group: str) -> Iterator[str]:
    if group:
        yield f"### {group}\n"
    yield "| setting | meaning | unit | default | values |"
    yield "|---|---|---|---|---|"


def code(text: str) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    print(page(), end="")
