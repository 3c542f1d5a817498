"""Records as they are written and as loggers show them."""

from dataclasses import replace

from tests.sinks.examples import EPOCH, RESULT, loss_metrics, step
from vdrop_cli.sinks.records import tagged_scalars, to_dict


def test_a_result_is_written_without_what_it_lacks() -> None:
    assert "warnings" not in to_dict(RESULT) and to_dict(RESULT)["test_ppl"] == RESULT.metrics["test_ppl"]
    assert to_dict(replace(RESULT, warnings=["a"]))["warnings"] == ["a"]


def test_numbers_are_tagged_by_the_kind_of_record() -> None:
    for record, tag in ((step(3), "step/"), (EPOCH, "per_epoch/"), (RESULT, "result/")):
        tagged = tagged_scalars(record, loss_metrics)
        assert tagged and all(name.startswith(tag) for name in tagged)
        assert all(type(value) is float for value in tagged.values())
    assert tagged_scalars(step(3), loss_metrics)["step/loss"] == step(3).loss
