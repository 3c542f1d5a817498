"""Records and the helpers for them."""

from vdrop_cli.sinks.records import flatten, ppl


def test_small_helpers() -> None:
    assert flatten({"a": {"b": 1, "c": None}, "d": "x"}) == {"a.b": 1, "d": "x"}
    assert ppl(1000) == float("inf") and ppl(0) == 1
