"""Writes `docs/api.md` from signatures and docstrings; `tests/test_api.py` checks that it is current."""

import inspect
import re
import textwrap
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from vdrop_cli import cells, dropout, layers, modules, policies, sampling
from vdrop_cli.kernels import masks

PAGE = Path(__file__).with_name("api.md")
WIDTH = 110  # of a line of text
SIGNATURE_WIDTH = 90
# prefixes that annotations have in their representation
PREFIXES = re.compile(r"\b(?:typing|collections\.abc|contextlib|vdrop_cli(?:\.\w+)+|torch\.nn(?:\.\w+)+)\.")
START = """# API

Signatures, shapes, defaults and errors of the public names. This page is generated from the docstrings by
`make docs-api`. [Layers](layers.md) and [MC dropout and uncertainty](uncertainty.md) show how to use them;
the [glossary](glossary.md) explains the terms.

| letter | size |
|---|---|
| T | time, the number of steps |
| B | batch, the number of sequences |
| D | input size |
| H | hidden size |
| E | size of a word's vector |
| P | size of the hidden state: H, or that of a projection |
| G | gates: 4 of an LSTM (i f g o), 3 of a GRU (r z n) |
| L | layers |

All probabilities are probabilities of dropping, in [0, 1).
"""
SECTIONS: list[tuple[str, ModuleType, list[str]]] = [  # heading, module, public names
    ("Layers", layers, ["LSTM", "GRU"]),
    ("Cells", cells, ["LSTMCell", "GRUCell"]),
    ("Dropout policy", policies, ["Dropout", "Policy", "Tie", "WordMask"]),
    ("Masks", masks, ["Masks"]),
    ("Masks of a model", dropout, ["ModelMasks", "WordMasks"]),
    ("Other modules", modules, ["LockedDropout", "WordDropout", "WeightDrop"]),
    ("MC dropout", sampling, ["mc_dropout", "predict_mc", "Prediction"]),
]
METHODS = {  # described beside the class
    "LSTM": ["forward", "masks", "mean_masks", "zero_state", "from_torch", "to_torch"],
    "LSTMCell": ["masks", "forward"],
    "GRUCell": ["forward"],
    "ModelMasks": ["rows", "repeat", "to"],
    "WordMasks": ["keep", "rows", "repeat", "to"],
    "LockedDropout": ["masks", "forward"],
    "WordDropout": ["masks", "forward"],
}
BASES = {  # classes whose docstrings hold for several names
    "LSTM": ("LSTM and GRU", layers.Recurrent),
    "LSTMCell": ("LSTMCell and GRUCell", cells.RecurrentCell),
}
# modules whose names are part of another one
IMPORTS = {policies: "vdrop_cli.layers", masks: "vdrop_cli.layers", dropout: "vdrop_cli.layers"}


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Returns the parameters without `self` and `cls`."""
    return [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]


def signature(name: str, function: Callable[..., Any]) -> str:
    """Writes a signature, with a line for each parameter where it is long."""
    items: list[str] = []
    for parameter in parameters(function):
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in items:
            items.append("*")
        items.append(PREFIXES.sub("", re.sub(r"<(\w+\.\w+): '\w+'>", r"\1", str(parameter))))
    returned = "" if isinstance(function, type) else inspect.signature(function).return_annotation
    if isinstance(returned, type):
        returned = returned.__name__
    result = f" -> {PREFIXES.sub('', str(returned))}" if returned else ""
    line = f"{name}({', '.join(items)}){result}"
    if len(line) <= SIGNATURE_WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {item}," for item in items), f"){result}"])


def markdown(doc: str) -> str:
    """Writes a docstring as Markdown, with a blank line before a list."""
    blocks = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        text, *items = re.split(r"(?:^|\n)(?=- )", paragraph)
        if text:
            blocks.append(textwrap.fill(" ".join(text.split()), WIDTH))
        if items:
            blocks.append("\n".join(" ".join(item.split()) for item in items))
    return "\n\n".join(blocks)


def fields(kind: type) -> str:
    """Writes the fields of a tuple or dataclass, or the members of an enumeration, with their comments."""
    names = getattr(kind, "__members__", None) or inspect.signature(kind).parameters
    lines, above = [], ""
    for line in inspect.getsource(kind).splitlines():
        if comment := re.fullmatch(r"    # (.*)", line):
            above = comment[1]
        elif (field := re.fullmatch(r"    (\w+)((?::| =) .*?)(?:  # (.*))?", line)) and field[1] in names:
            note = field[3] or above
            lines.append(
                f"- `{field[1]}{'' if issubclass(kind, Enum) else field[2]}`{f': {note}' if note else ''}"
            )
            above = ""
    return "\n".join(lines)


def describe(name: str, item: Any) -> list[str]:
    """Returns the blocks of one public name."""
    blocks = [f"### {name}"]
    if not (isinstance(item, type) and issubclass(item, Enum)):
        blocks.append(f"```python\n{signature(name, item)}\n```")
    if item.__doc__:
        blocks.append(markdown(item.__doc__))
    if isinstance(item, type) and (issubclass(item, Enum | tuple) or name in ("Dropout", "ModelMasks")):
        blocks.append(fields(item))
    if name in BASES:
        names, base = BASES[name]
        assert base.__doc__ is not None
        blocks.append(markdown(f"**{names}.** {inspect.cleandoc(base.__doc__)}"))
    for method in METHODS.get(name, []):
        function = getattr(item, method)
        blocks += [f"```python\n{signature(f'{name}.{method}', function)}\n```"]
        if function.__doc__:
            blocks.append(markdown(function.__doc__))
    return blocks


def page() -> str:
    """Returns the whole page."""
    blocks = [START.strip()]
    for heading, module, names in SECTIONS:
        blocks += [
            f"## {heading}",
            f"`from {IMPORTS.get(module, module.__name__)} import {', '.join(names)}`",
        ]
        for name in names:
            blocks += describe(name, getattr(module, name))
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
