"""The benchmark's own arithmetic on made-up timings, and one short run of it. No test asserts a time."""

import errno
import json
import sys
import time
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import Vdrop, settings
from tests.test_output import broken
from vdrop_cli import environment, output
from vdrop_cli.commands.bench import (
    MC_WORDS,
    OTHER_CELLS,
    Case,
    Measured,
    Rates,
    cases,
    limit,
    limit_of,
    measured,
    our_mc,
    our_ratings,
    products,
    random_ratings,
    ratio,
    rows_of_steps,
    tell,
    write,
)
from vdrop_cli.config import Backend, Bench, BenchCell, BenchPart, ConfigError, Precision, Size
from vdrop_cli.evaluate import MC_STEPS_AT_ONCE

RATES = Rates(fp32=200e9, bf16=400e9)


def made_up(cell: str, seconds: list[float], **more: Any) -> Measured:
    told = {
        "size": "medium",
        "part": "step",
        "cell": cell,
        "precision": "fp32",
        "words": 700,
        "recurrent": 6_760_000,
        "head": 6_500_000,
    }
    told |= {"limit_seconds": 0.2, "peak_megabytes": 1.0}
    return Measured(**{**told, "seconds": seconds, **more})


def test_the_limit_in_fp32_is_six_operations_a_parameter_and_word() -> None:
    assert limit(6_760_000, 6_500_000, 3, 700, Precision.fp32, RATES) == pytest.approx(
        6 * 13_260_000 * 700 / 200e9
    )


def test_the_limit_in_bf16_has_its_forward_logits_in_fp32() -> None:
    """2 of the head's 6 operations at the fp32 rate; one pass without gradients has the logits in fp32 and
    the cells in bf16.
    """
    assert limit(6_760_000, 6_500_000, 3, 700, Precision.bf16, RATES) == pytest.approx(
        2 * 6_500_000 * 700 / 200e9 + (6 * 6_760_000 + 4 * 6_500_000) * 700 / 400e9
    )
    assert limit(6_760_000, 6_500_000, 1, 700, Precision.bf16, RATES) == pytest.approx(
        (13_000_000 / 200e9 + 13_520_000 / 400e9) * 700
    )


def test_the_limit_of_a_measurement_goes_by_its_part() -> None:
    """MC evaluation multiplies forward only, a layer alone has no head."""
    size = {"words": 100, "recurrent": 5000, "head": 3000}
    assert limit_of(made_up("variational", [1.0], part="step", **size), RATES) == pytest.approx(
        6 * 8000 * 100 / 200e9
    )
    assert limit_of(made_up("variational", [1.0], part="mc", **size), RATES) == pytest.approx(
        2 * 8000 * 100 / 200e9
    )
    assert limit_of(
        made_up("variational", [1.0], part="layer", **{**size, "head": 0}), RATES
    ) == pytest.approx(6 * 5000 * 100 / 200e9)


def test_medians_speed_and_fraction() -> None:
    m = made_up("variational", [0.4, 0.1, 0.25])
    assert (m.step_seconds, m.words_per_second, m.fraction) == (0.25, 2800, 0.8)


def test_the_share_of_checkpoints_is_of_training_and_writing_together() -> None:
    """Three seconds every five minutes."""
    assert made_up("variational", [1.0, 3.0, 4.0], part="checkpoint", words=0).share == pytest.approx(3 / 303)


def test_a_ratio_is_of_times_in_the_same_turn() -> None:
    """The machine was twice as slow in the second turn, for both; medians of each for itself would say
    1.5.
    """
    ours, theirs = made_up("variational", [1.0, 4.0, 2.0]), made_up("torch_lstm", [2.0, 8.0, 3.0])
    assert ratio(ours, theirs) == 2.0
    assert ratio(theirs, ours) == 0.5


def test_the_table_sets_each_cell_beside_the_rivals_of_the_same_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rivals = [made_up("torch_lstm", [0.5]), made_up("cell_loop", [0.75])]
    tell(
        [made_up("variational", [0.25]), *rivals, made_up("naive", [0.5], precision="bf16")],
        RATES,
        torch.device("cpu"),
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == ["medium", "step", "variational", "fp32", "2,800", "250.0", "0.80", "2.00", "3.00", "1"]
    assert rows[5][-3:-1] == ["–", "–"], "there are no rivals in bf16 here"


@pytest.mark.usefixtures("composing")
def test_on_a_gpu_mc_evaluation_reads_more_and_is_said_to_be_bound_by_latency(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Long enough for graphs to be captured, when shapes are met again, and then replayed many times."""
    monkeypatch.setattr(environment, "backend", lambda wanted, on: Backend.fused)
    words = {}
    for device in ("cpu", "cuda:0"):
        case = Case(Size.small, BenchPart.mc, BenchCell.variational, Precision.fp32)
        words[device] = measured(case, Bench(device=device, mc_passes=3), [1.0], 1.0).words / 3
        for part in ("step", "mc"):
            tell([made_up("variational", [1.0], part=part)], RATES, torch.device(device))
            assert ("latency" in capsys.readouterr().out) == (device != "cpu" and part == "mc")
    assert words == {"cpu": 70, "cuda:0": 700} and words["cuda:0"] >= 20 * MC_STEPS_AT_ONCE


def test_products_alone_are_all_the_products_that_the_limit_counts() -> None:
    """6 operations a parameter and word, as torch counts them."""
    train = settings(
        "device=cpu",
        "model=lstm_small",
        "model.hidden_size=24",
        "task.bptt=3",
        "task.batch_size=2",
        "dropout=variational",
    )
    with FlopCounterMode(display=False) as counter:
        products(train, Precision.fp32, rows_of_steps(train, BenchPart.step), 10_000)()
    words, parameters = 3 * 2, 2 * 8 * 24**2 + 10_000 * 24
    assert counter.get_total_flops() == 6 * words * parameters


def test_products_of_a_step_of_ratings_are_of_the_words_that_are_there() -> None:
    train = settings(
        "device=cpu", "task=sentiment", "model.hidden_size=24", "task.batch_size=8", "task.chunk_words=9"
    )
    rows = rows_of_steps(train, BenchPart.ratings)
    assert rows[0] == 8 and rows[-1] == 5 and rows == sorted(rows, reverse=True)
    with FlopCounterMode(display=False) as counter:
        products(train, Precision.fp32, rows, 0)()
    assert counter.get_total_flops() == 6 * int(random_ratings(train)[1].sum()) * 8 * 24**2


def test_which_cases_there_are() -> None:
    """MC evaluation needs dropout, Keras has no bf16 that compares, and the products alone are those of a
    whole step.
    """
    groups = cases(
        settings("sizes=[small]", "cells=[none,variational,products,torch_lstm,keras]", command="bench")
    )
    assert {str(case) for group in groups for case in group} == {
        *(
            f"small {part} {cell} {p}"
            for part in ("step", "layer")
            for cell in ("none", "variational", "torch_lstm")
            for p in ("fp32", "bf16")
        ),
        *(
            f"small {part} variational {p}"
            for part in ("mc", "checkpoint", "directions")
            for p in ("fp32", "bf16")
        ),
        *(f"small cell_step {cell} fp32" for cell in ("variational", "torch_lstm")),
        *(f"small step products {p}" for p in ("fp32", "bf16")),
        "small step keras fp32",
    }
    assert all(len({(case.size, case.part, case.precision) for case in group}) == 1 for group in groups)
    assert not Case(Size.small, BenchPart.mc, BenchCell.none, Precision.fp32).exists


def test_directions_are_compared_for_both_cells_and_a_step_with_torchs() -> None:
    groups = cases(
        settings(
            "sizes=[sentiment,small]", "parts=[directions,cell_step]", "precisions=[fp32]", command="bench"
        )
    )
    assert [[str(case.cell) for case in group] for group in groups] == [
        ["variational", "torch_lstm", "gru", "torch_gru"],
        ["variational", "bidirectional", "gru", "bidirectional_gru"],
        ["variational", "torch_lstm", "gru", "torch_gru"],
    ]


def test_layers_of_two_directions_are_told_beside_those_of_one_and_steps_in_microseconds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    directions = [
        made_up(cell, [s], part="directions")
        for cell, s in (("gru", 0.2), ("bidirectional_gru", 0.5), ("bidirectional", 1.0))
    ]
    tell(
        [*directions, made_up("gru", [6.15e-5], part="cell_step", size="sentiment")],
        RATES,
        torch.device("cpu"),
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[2:5]] == ["gru", "bidirectional_gru", "bidirectional"], (
        "and no row of a step"
    )
    assert lines[5:] == [
        "medium fp32: bidirectional_gru takes 2.50 times as long as gru",
        "sentiment: one step of a cell, gru, takes 61.5 µs",
    ]


@pytest.mark.usefixtures("composing")
def test_the_products_of_layers_go_by_gates_and_directions() -> None:
    """2 · 4 · 650² parameters of an LSTM, 3 for 4 in a GRU, twice as many in two directions; a step of a cell
    reads one word.
    """
    found = {}
    for part in (BenchPart.directions, BenchPart.cell_step):
        for cell in OTHER_CELLS[part]:
            m = measured(Case(Size.medium, part, cell, Precision.fp32), Bench(device="cpu"), [1.0], 1.0)
            found[part.name, cell.name] = (m.words, m.recurrent / 650**2, m.head)
    assert {cell: rest for (part, cell), rest in found.items() if part == "directions"} == {
        "variational": (700, 8, 0),
        "bidirectional": (700, 16, 0),
        "gru": (700, 6, 0),
        "bidirectional_gru": (700, 12, 0),
    }
    assert {rest for (part, _), rest in found.items() if part == "cell_step"} == {(1, 8, 0), (1, 6, 0)}
    assert limit_of(made_up("gru", [1.0], part="cell_step", words=1, head=0), RATES) == pytest.approx(
        2 * 6_760_000 / 200e9
    )


def test_the_model_of_ratings_has_a_part_of_its_own() -> None:
    groups = cases(
        settings(
            "sizes=[small,sentiment]",
            "cells=[none,products,torch_lstm]",
            "precisions=[fp32]",
            command="bench",
        )
    )
    told = [str(case) for group in groups for case in group]
    assert [case for case in told if "ratings" in case or "sentiment" in case] == [
        *(
            "sentiment ratings none fp32",
            "sentiment ratings products fp32",
            "sentiment ratings torch_lstm fp32",
        ),
        "sentiment cell_step torch_lstm fp32",
    ]


def test_a_step_of_ratings_is_of_texts_like_the_reviews_and_learns() -> None:
    train = settings(
        "device=cpu",
        "task=sentiment",
        "model.hidden_size=24",
        "task.batch_size=8",
        "task.chunk_words=9",
        "dropout=none",
    )
    ids_TB, lengths_B, targets_B = random_ratings(train)
    assert (
        ids_TB.shape == (9, 8)
        and lengths_B.tolist()[:5] == [9] * 5
        and all(1 <= length < 9 for length in lengths_B[5:])
    )
    assert int(ids_TB.max()) + 1 == 20_002 and targets_B.shape == (8,)
    (before, after) = (our_ratings(train, Precision.fp32)().read() for _ in range(2))  # type: ignore[attr-defined]
    assert before == after, "the same start"
    step = our_ratings(train, Precision.fp32)
    losses = [step().read()[0] for _ in range(30)]  # type: ignore[attr-defined]
    assert losses[-1] < losses[0], "it learns"


def test_mc_evaluation_reads_the_text_with_all_passes() -> None:
    """Products forward only, of every pass and word. torch counts its own, and not those that add to what is
    there: the recurrent ones.
    """
    train = settings(
        "device=cpu", "backend=fused", "model=lstm_small", "model.hidden_size=24", "dropout=variational"
    )
    with FlopCounterMode(display=False) as counter:
        our_mc(train, Precision.fp32, passes=7)()
    assert counter.get_total_flops() == 2 * MC_WORDS["cpu"] * 7 * (2 * 4 * 24**2 + 10_000 * 24)


def test_settings_that_leave_nothing_to_measure(vdrop: Vdrop) -> None:
    ran = vdrop("bench", "parts=[mc]", "cells=[torch_lstm]")
    assert ran.returncode == 2 and "leave nothing to measure" in ran.stderr


def test_a_device_that_is_not_there(vdrop: Vdrop) -> None:
    ran = vdrop("bench", "device=cuda:7")
    assert ran.returncode == 2 and "device=cuda:7 is not on this machine" in ran.stderr


@pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed")
def test_keras_beside_the_rest(vdrop: Vdrop, tmp_path: Path) -> None:
    ran = vdrop(
        "bench",
        "sizes=[small]",
        "parts=[step]",
        "cells=[keras]",
        "precisions=[fp32]",
        "starts=1",
        "turns=1",
        "outputs=o",
    )
    assert ran.returncode == 0, ran.stderr
    (m,) = json.loads(next((tmp_path / "o" / "bench").glob("*.json")).read_text())["measured"]
    assert (m["cell"], m["words"]) == ("keras", 400)


@pytest.mark.parametrize(
    "override",
    [
        "starts=0",
        "turns=0",
        "mc_passes=0",
        "sizes=[]",
        "parts=[]",
        "cells=[]",
        "precisions=[]",
        "precisions=[auto]",
        "cells=[none,none]",
    ],
)
def test_values_out_of_bounds(override: str) -> None:
    with pytest.raises(ConfigError, match=f"^{override.split('=')[0]} must be"):
        settings(override, command="bench")


@pytest.mark.parametrize("size", ["small", "sentiment"])
def test_a_short_run(size: str, vdrop: Vdrop, tmp_path: Path) -> None:
    cells = {"variational", "torch_lstm"}
    ran = vdrop(
        "bench",
        f"sizes=[{size}]",
        f"cells=[{','.join(sorted(cells))}]",
        "precisions=[bf16]",
        "starts=1",
        "turns=2",
        "outputs=o",
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(next((tmp_path / "o" / "bench").glob("*.json")).read_text())
    assert sorted(path.suffix for path in (tmp_path / "o" / "bench").iterdir()) == [".json"], (
        "the checkpoints are gone"
    )
    ratings_words = sum(random_ratings(settings("task=sentiment", "device=cpu"))[1].tolist())
    of_small = {
        "step": (400, 640_000, 2_000_000),
        "layer": (400, 320_000, 0),
        "mc": (4480, 640_000, 2_000_000),
        "checkpoint": (0, 0, 0),
    }
    of_small["directions"] = (400, 320_000, 0)
    expected = of_small if size == "small" else {"ratings": (ratings_words, 131_072, 0)}
    assert {m["part"]: (m["words"], m["recurrent"], m["head"]) for m in told["measured"]} == expected
    compared = {(part, cell) for part in {"step", "layer", "ratings"} & expected.keys() for cell in cells}
    alone = {(part, "variational") for part in {"mc", "checkpoint", "directions"} & expected.keys()}
    assert {(m["part"], m["cell"]) for m in told["measured"]} == compared | alone
    for m in told["measured"]:
        known = Measured(**{f.name: m[f.name] for f in fields(Measured)})
        assert len(known.seconds) == 2 and known.peak_megabytes > 50
        assert known.limit_seconds == pytest.approx(limit_of(known, Rates(**told["rates"])))
    assert {"torch", "device", "threads"} <= told["environment"].keys() and told["rates"]["bf16"] > 0
    assert "× torch_lstm" in ran.stdout and ("small: writing a checkpoint takes" in ran.stdout) == (
        size == "small"
    )


def test_benches_that_end_in_the_same_second_keep_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    asked = Bench(outputs=str(tmp_path), device="cpu")
    paths = [write(asked, [made_up("variational", [seconds])], RATES) for seconds in (1.0, 2.0, 3.0)]
    assert [path.name for path in paths] == ["now.json", "now-2.json", "now-3.json"]
    assert [json.loads(path.read_text())["measured"][0]["seconds"] for path in paths] == [[1.0], [2.0], [3.0]]


def test_a_result_that_cannot_be_written_is_shown_and_where_that_is_lost_too_it_is_said_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench").touch()
    asked = Bench(outputs=str(tmp_path), device="cpu")
    with pytest.raises(ConfigError, match=r"/bench cannot be written \(File exists\); the table is above"):
        write(asked, [made_up("variational", [1.0])], RATES)
    assert "variational" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdout", broken(errno.ENOSPC))
    output.prepare()
    with pytest.raises(ConfigError, match=r"/bench cannot be written \(File exists\)$"):
        write(asked, [made_up("variational", [1.0])], RATES)


def test_a_short_run_of_steps_of_cells(vdrop: Vdrop, tmp_path: Path) -> None:
    ran = vdrop(
        "bench",
        "sizes=[sentiment]",
        "parts=[cell_step]",
        "cells=[gru,torch_gru]",
        "precisions=[fp32]",
        "starts=1",
        "turns=1",
        "outputs=o",
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(next((tmp_path / "o" / "bench").glob("*.json")).read_text())
    assert {(m["cell"], m["words"], m["recurrent"]) for m in told["measured"]} == {
        (cell, 1, 6 * 128**2) for cell in ("gru", "torch_gru")
    }
    assert ran.stdout.count("sentiment: one step of a cell, ") == 2
