"""The words of this repository: identifiers name what a thing is, prose is plain.

`held` is said of a mask, `found` of what is searched for, in prose alone.
"""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import ROOT

SUFFIXES = {".py", ".c", ".md", ".yaml", ".yml", ".toml", ".cff"}
WITHOUT_SUFFIX = {"Makefile", "Dockerfile"}
NOT_OURS = ("outputs", "data", "site", "dist", "LICENSE", "RESULTS.md")
PARTICIPLES = {"found", "held", "kept", "told", "wanted"}
ALLOWED = {"found_inf"}  # an attribute of torch's optimisers
PHRASES = (
    "told",
    "tells?",
    "kept",
    "wanted",
    "way back",
    "goes on",
    "go on",
    "gone on",
    "what becomes of",
    "be had",
    "of ours",
    "for itself",
    "as it lies",
)
PROSE = re.compile(rf"(?<![\w.])({'|'.join(PHRASES)})(?![\w(])", re.IGNORECASE)
HELD = re.compile(r"(?<![\w.])held(?!\w)", re.IGNORECASE)


def files() -> list[Path]:
    """Source, documents and configuration, but for what is generated or written by others."""
    paths = [*ROOT.glob("*")]
    for folder in ("vdrop_cli", "conf", "tests", "examples", "docs"):
        paths += (ROOT / folder).rglob("*")
    return sorted(
        path
        for path in paths
        if path.is_file()
        and (path.suffix in SUFFIXES or path.name in WITHOUT_SUFFIX)
        and not path.name.startswith(".")
        and path.relative_to(ROOT).parts[0] not in NOT_OURS
        and path != Path(__file__)
    )


def bad_identifiers(source: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = token.string
        if token.type != tokenize.NAME or name in ALLOWED:
            continue
        is_test = name.startswith("test_")
        words = set() if is_test else PARTICIPLES & set(name.lower().split("_"))
        if words or name.startswith("of_") or (is_test and PROSE.search(name.replace("_", " "))):
            yield f"line {token.start[0]}: {name}"


def bad_phrases(text: str) -> Iterator[str]:
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if match := PROSE.search(line):
            yield f"line {number}: {match[1]}"
        near = " ".join(lines[max(number - 4, 0) : number + 3])
        if HELD.search(line) and not re.search("mask|moon", near, re.IGNORECASE):
            yield f"line {number}: held"


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("found = 1", 1),
        ("def of_run(kept_rows): pass", 2),
        ("def test_a_run_goes_on(): pass", 1),
        ("def test_held_masks_are_found(): pass", 0),
        ("inner.found_inf = holds", 0),
    ],
)
def test_identifiers_are_recognized(source: str, bad: int) -> None:
    assert len(list(bad_identifiers(source))) == bad


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("The run goes on.", 1),
        ("It is told and\nkept.", 2),
        ("A file is held.", 1),
        ("The mask is\nheld over the sequence.", 0),
        ("file.tell() is found", 0),
    ],
)
def test_phrases_are_recognized(text: str, bad: int) -> None:
    assert len(list(bad_phrases(text))) == bad


def test_identifiers_and_prose_use_the_fields_words() -> None:
    paths = files()
    assert {"README.md", "Makefile", "native.c", "layers.py", "test_layers.py"} <= {
        path.name for path in paths
    }
    bad = []
    for path in paths:
        text = path.read_text()
        identifiers = bad_identifiers(text) if path.suffix == ".py" else ()
        bad += [f"{path.relative_to(ROOT)}, {each}" for each in (*identifiers, *bad_phrases(text))]
    assert not bad, "\n".join(bad)
