"""Plain data from disk: what is not strictly that is refused with a reason, quickly."""

import os
from pathlib import Path

import pytest

from vdrop_cli import stored
from vdrop_cli.files import Damaged


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b"\xff{}", "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": Infinity}', "Infinity is not a number"),
        (b'{"a": 1, "a": 2}', "a key twice"),
        (b'{"a": {"b": 1, "b": 2}}', "a key twice"),
        (b"[" * 100_000, "too deeply"),
        (b'{"a":' * 30 + b"1" + b"}" * 30, "too deeply"),
    ],
)
def test_json_is_strict(content: bytes, reason: str) -> None:
    with pytest.raises(Damaged, match=reason):
        stored.parse_json(content)


def test_a_value_need_not_be_an_object_and_is_as_strict() -> None:
    assert stored.parse_value(b'[1, {"a": null}]') == [1, {"a": None}]
    is_json = stored.readable_by(stored.parse_value)
    assert [
        is_json(content) for content in (b"[]", b"[NaN]", b'[{"a": 1, "a": 2}]', b"[" * 30 + b"]" * 30, b"")
    ] == [True, *[False] * 4]


def test_infinity_is_read_where_it_is_allowed_and_nan_never() -> None:
    assert stored.parse_json(b'{"a": [1, -Infinity]}', infinite=True) == {"a": [1, float("-inf")]}
    with pytest.raises(Damaged):
        stored.parse_json(b'{"a": NaN}', infinite=True)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(20)
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not a mapping"),
        ("[1]", "not a mapping"),
        ("a: [", "not YAML"),
        ("a: 1\n--- \nb: 2", "not YAML"),
        (f"a: {'9' * 5000}", "not YAML"),
        (LAUGHS, "anchor"),
        ("a: &x [*x]", "anchor"),
        ("a: *x", "anchor"),
        ("a: !!python/object/apply:os.getcwd []", "tag"),
        ("a: !!binary aGk=", "tag"),
        ("a: 1\na: 2", "a key twice"),
        ("1: 2", "not text"),
        ("? [a]\n: 1", "not text"),
        ("[" * 100_000, "too deeply"),
    ],
)
def test_yaml_is_plain_data(content: str, reason: str) -> None:
    with pytest.raises(Damaged, match=reason):
        stored.parse_yaml(content.encode())


def test_yaml_is_read_as_omegaconf_writes_it() -> None:
    from omegaconf import OmegaConf

    plain = {
        "a": {"b": 1.0e-07, "c": None, "d": [True, "null", "1e3", "2026-01-02", "x: y"]},
        "e": float("inf"),
        "f": "äöü\n",
    }
    assert stored.parse_yaml(OmegaConf.to_yaml(OmegaConf.create(plain)).encode()) == plain


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "large").write_bytes(b" " * (stored.YAML_LIMIT + 1))
    for read in (stored.read_json, stored.read_yaml):
        for name, reason in (("fifo", "regular file"), ("device", "regular file"), (".", "folder")):
            with pytest.raises(Damaged, match=reason):
                read(tmp_path / name)
        with pytest.raises(OSError, match="symbolic links"):
            read(tmp_path / "loop")
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")
    with pytest.raises(Damaged, match="larger than"):
        stored.read_yaml(tmp_path / "large")


def test_values_have_the_types_that_are_asked_for() -> None:
    stored.require_types(
        {"a": 1, "b": 2, "c": 0.5, "d": "x", "e": [], "f": {}},
        {"a": int, "b": float, "c": float, "d": str, "e": list, "f": dict},
    )
    for value, kind in (
        (True, int),
        (1.0, int),
        ("1", int),
        (True, float),
        (float("nan"), float),
        (float("inf"), float),
        (10**400, float),
    ):
        with pytest.raises(Damaged, match="a must be"):
            stored.require_types({"a": value}, {"a": kind})
    with pytest.raises(Damaged, match="a is missing"):
        stored.require_types({}, {"a": int})
