"""Which cases exist and which take turns with each other."""

import pytest

from tests.conftest import settings
from vdrop_cli.bench.cases import Case, cases
from vdrop_cli.kernels import compiler
from vdrop_cli.settings.choices import BenchCell, BenchPart, BenchSize, Precision


def test_which_cases_exist() -> None:
    """MC evaluation needs dropout, Keras has no bf16 that compares, and the products alone are those of a
    whole step.
    """
    chosen = ["sizes=[small]", "cells=[none,variational,products,torch_lstm,keras]", "precisions=[fp32,bf16]"]
    groups = cases(settings(*chosen, command="bench"))
    assert {str(case) for group in groups for case in group} == {
        *(
            f"small {part} {cell} {p}"
            for part in ("step", "layer")
            for cell in ("none", "variational", "torch_lstm")
            for p in ("fp32", "bf16")
        ),
        *(f"small {part} variational {p}" for part in ("mc", "checkpoint") for p in ("fp32", "bf16")),
        *(f"small directions {cell} {p}" for cell in ("variational", "torch_lstm") for p in ("fp32", "bf16")),
        *(f"small cell_step {cell} fp32" for cell in ("variational", "torch_lstm")),
        *(f"small step products {p}" for p in ("fp32", "bf16")),
        "small step keras fp32",
    }
    assert all(len({(case.size, case.part, case.precision) for case in group}) == 1 for group in groups)
    assert not Case(BenchSize.small, BenchPart.mc, BenchCell.none, Precision.fp32).exists


@pytest.mark.parametrize(("flags", "expected"), [("avx2", ["fp32"]), ("avx512_bf16", ["fp32", "bf16"])])
def test_bf16_is_measured_by_default_where_the_processor_has_it(
    flags: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "cpuinfo", lambda name: flags)
    chosen = ["device=cpu", "sizes=[small]", "parts=[layer]", "cells=[variational]"]
    groups = cases(settings(*chosen, command="bench"))
    assert [str(case.precision) for group in groups for case in group] == expected
    ((case,),) = cases(settings(*chosen, "precisions=[bf16]", command="bench"))
    assert case.precision is Precision.bf16


def test_directions_are_compared_for_both_cells_and_a_step_with_torchs() -> None:
    groups = cases(
        settings(
            "sizes=[sentiment,small]", "parts=[directions,cell_step]", "precisions=[fp32]", command="bench"
        )
    )
    assert [[str(case.cell) for case in group] for group in groups] == [
        ["variational", "torch_lstm", "gru", "torch_gru"],
        ["variational", "torch_lstm", "bidirectional", "gru", "bidirectional_gru", "torch_gru"],
        ["variational", "torch_lstm", "gru", "torch_gru"],
    ]


def test_the_model_of_ratings_has_a_part_of_its_own() -> None:
    groups = cases(
        settings(
            "sizes=[small,sentiment]",
            "cells=[none,products,torch_lstm]",
            "precisions=[fp32]",
            command="bench",
        )
    )
    names = [str(case) for group in groups for case in group]
    assert [case for case in names if "ratings" in case or "sentiment" in case] == [
        *(
            "sentiment ratings none fp32",
            "sentiment ratings products fp32",
            "sentiment ratings torch_lstm fp32",
        ),
        "sentiment cell_step torch_lstm fp32",
    ]
