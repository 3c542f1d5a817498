"""Records and the helpers for them."""

from vdrop_cli.sinks.records import flatten, ppl
from vdrop_cli.sinks.terminal import duration


def test_small_helpers() -> None:
    assert flatten({"a": {"b": 1, "c": None}, "d": "x"}) == {"a.b": 1, "d": "x"}
    assert [duration(s) for s in (0, 59.6, 61, 3_725)] == ["0:00", "1:00", "1:01", "1:02:05"]
    assert ppl(1000) == float("inf") and ppl(0) == 1
