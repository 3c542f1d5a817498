"""Limits, ratios, the table and the record, on made-up timings. No test asserts a time."""

import errno
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_output import broken
from vdrop_cli import files, output
from vdrop_cli.bench import report
from vdrop_cli.bench.cases import CELLS_BY_PART, Case
from vdrop_cli.bench.report import (
    Measurement,
    Rates,
    limit,
    measurement,
    measurement_limit,
    print_results,
    speed_ratio,
    write,
)
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.monte_carlo import PASS_STEPS
from vdrop_cli.settings.choices import Backend, BenchCell, BenchPart, BenchSize, Precision
from vdrop_cli.settings.commands import Bench

RATES = Rates(fp32=200e9, bf16=400e9)
CPU = Bench(device="cpu")


def example(cell: str, seconds: list[float], **more: Any) -> Measurement:
    values = {
        "size": "medium",
        "part": "step",
        "cell": cell,
        "precision": "fp32",
        "words": 700,
        "recurrent": 6_760_000,
        "head": 6_500_000,
    }
    values |= {"limit_seconds": 0.2, "peak_megabytes": 1.0}
    return Measurement(**{**values, "seconds": seconds, **more})


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


def test_the_limit_has_three_bf16_products_for_the_logits_where_one_in_fp32_takes_longer() -> None:
    """As with AMX and on a GPU."""
    rates = Rates(100e9, 600e9)
    assert limit(0, 1000, 1, 10, Precision.bf16, rates) == pytest.approx(2 * 1000 * 10 * 3 / 600e9)
    assert limit(0, 1000, 1, 10, Precision.fp32, rates) == pytest.approx(2 * 1000 * 10 / 100e9)


def test_the_limit_of_a_measurement_goes_by_its_part() -> None:
    """MC evaluation multiplies forward only, a layer alone has no head."""
    size = {"words": 100, "recurrent": 5000, "head": 3000}
    assert measurement_limit(example("variational", [1.0], part="step", **size), RATES) == pytest.approx(
        6 * 8000 * 100 / 200e9
    )
    assert measurement_limit(example("variational", [1.0], part="mc", **size), RATES) == pytest.approx(
        2 * 8000 * 100 / 200e9
    )
    assert measurement_limit(
        example("variational", [1.0], part="layer", **{**size, "head": 0}), RATES
    ) == pytest.approx(6 * 5000 * 100 / 200e9)


def test_medians_speed_and_fraction() -> None:
    m = example("variational", [0.4, 0.1, 0.25])
    assert (m.step_seconds, m.words_per_second, m.fraction) == (0.25, 2800, 0.8)


def test_the_share_of_checkpoints_is_of_training_and_writing_together() -> None:
    """Three seconds every five minutes."""
    assert example("variational", [1.0, 3.0, 4.0], part="checkpoint", words=0).share == pytest.approx(3 / 303)


def test_a_ratio_is_of_times_in_the_same_turn() -> None:
    """The machine was twice as slow in the second turn, for both; the ratio of the medians would be
    1.5.
    """
    ours, theirs = example("variational", [1.0, 4.0, 2.0]), example("torch_lstm", [2.0, 8.0, 3.0])
    assert speed_ratio(ours, theirs) == 2.0
    assert speed_ratio(theirs, ours) == 0.5


def test_the_table_sets_each_cell_beside_the_alternatives_of_the_same_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    alternatives = [example("torch_lstm", [0.5]), example("cell_loop", [0.75])]
    print_results(
        [example("variational", [0.25]), *alternatives, example("naive", [0.5], precision="bf16")],
        RATES,
        torch.device("cpu"),
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == ["medium", "step", "variational", "fp32", "2,800", "250.0", "0.80", "2.00", "3.00", "1"]
    assert rows[5][-3:-1] == ["–", "–"], "no alternative in bf16 here"


@pytest.mark.parametrize(
    ("precisions", "rates"),
    [(["fp32"], "fp32 200 GFLOP/s"), (["fp32", "bf16"], "fp32 200, bf16 400 GFLOP/s")],
)
def test_the_rates_of_the_measured_precisions_are_printed(
    precisions: list[str], rates: str, capsys: pytest.CaptureFixture[str]
) -> None:
    measurements = [example("variational", [0.25], precision=precision) for precision in precisions]
    print_results(measurements, RATES, torch.device("cpu"))
    assert f"2048³ product: {rates}" in capsys.readouterr().out


@pytest.mark.usefixtures("composing")
def test_on_a_gpu_mc_evaluation_reads_more_and_has_a_note_on_latency(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Long enough for graphs to be captured, when shapes are met again, and then replayed many times."""
    monkeypatch.setattr(report, "choose_backend", lambda name, device: Backend.fused)
    words = {}
    for device in ("cpu", "cuda:0"):
        case = Case(BenchSize.small, BenchPart.mc, BenchCell.variational, Precision.fp32)
        words[device] = measurement(case, Bench(device=device, mc_passes=3), [1.0], 1.0).words / 3
        for part in ("step", "mc"):
            print_results([example("variational", [1.0], part=part)], RATES, torch.device(device))
            assert ("latency" in capsys.readouterr().out) == (device != "cpu" and part == "mc")
    assert words == {"cpu": 70, "cuda:0": 700} and words["cuda:0"] >= 20 * PASS_STEPS


def test_two_directions_are_compared_with_one_and_steps_of_cells_are_printed_in_microseconds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    directions = [
        example(cell, [s], part="directions")
        for cell, s in (
            ("gru", 0.2),
            ("bidirectional_gru", 0.5),
            ("bidirectional", 1.0),
            ("torch_gru", 0.3),
            ("torch_lstm", 0.6),
        )
    ]
    print_results(
        [*directions, example("gru", [6.15e-5], part="cell_step", size="sentiment")],
        RATES,
        torch.device("cpu"),
    )
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[2:7]]
    over_torch = {row[2]: row[-3] for row in rows}
    assert over_torch == {  # a GRU beside torch's GRU; and no row of a step
        "gru": "1.50",
        "bidirectional_gru": "0.60",
        "bidirectional": "0.60",
        "torch_gru": "1.00",
        "torch_lstm": "1.00",
    }
    assert lines[7:] == [
        "medium fp32: bidirectional_gru takes 2.50 times as long as gru",
        "sentiment: one step of a cell, gru, takes 61.5 µs",
    ]


@pytest.mark.usefixtures("composing")
def test_the_words_and_parameters_of_a_step_go_by_its_part() -> None:
    """Both layers and the head, one layer, or none; 64 passes over 70 words."""
    counts = {}
    for part in (BenchPart.step, BenchPart.layer, BenchPart.mc, BenchPart.checkpoint):
        m = measurement(Case(BenchSize.small, part, BenchCell.variational, Precision.fp32), CPU, [1.0], 1.0)
        counts[part.name] = (m.words, m.recurrent, m.head)
    case = Case(BenchSize.sentiment, BenchPart.ratings, BenchCell.none, Precision.fp32)
    ratings = measurement(case, CPU, [1.0], 1.0)
    assert counts == {
        "step": (20 * 20, 2 * 8 * 200**2, 10_000 * 200),
        "layer": (20 * 20, 8 * 200**2, 0),
        "mc": (64 * 70, 2 * 8 * 200**2, 10_000 * 200),
        "checkpoint": (0, 0, 0),
    }
    assert (ratings.recurrent, ratings.head) == (8 * 128**2, 0)
    assert 5 / 8 * 128 * 200 < ratings.words < 128 * 200, "no padding"


@pytest.mark.usefixtures("composing")
def test_the_products_of_layers_go_by_gates_and_directions() -> None:
    """2 · 4 · 650² parameters of an LSTM, 3 for 4 in a GRU, twice as many in two directions; a step of a cell
    reads one word.
    """
    results = {}
    for part in (BenchPart.directions, BenchPart.cell_step):
        for cell in CELLS_BY_PART[part]:
            case = Case(BenchSize.medium, part, cell, Precision.fp32)
            m = measurement(case, CPU, [1.0], 1.0)
            results[part.name, cell.name] = (m.words, m.recurrent / 650**2, m.head)
    assert {cell: rest for (part, cell), rest in results.items() if part == "directions"} == {
        "variational": (700, 8, 0),
        "bidirectional": (700, 16, 0),
        "gru": (700, 6, 0),
        "bidirectional_gru": (700, 12, 0),
        "torch_lstm": (700, 8, 0),
        "torch_gru": (700, 6, 0),
    }
    assert {rest for (part, _), rest in results.items() if part == "cell_step"} == {(1, 8, 0), (1, 6, 0)}
    assert measurement_limit(
        example("gru", [1.0], part="cell_step", words=1, head=0), RATES
    ) == pytest.approx(2 * 6_760_000 / 200e9)


def test_benches_that_end_in_the_same_second_keep_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    request = Bench(outputs=str(tmp_path), device="cpu")
    paths = [write(request, [example("variational", [seconds])], RATES) for seconds in (1.0, 2.0, 3.0)]
    assert [path.name for path in paths] == ["now.json", "now-2.json", "now-3.json"]
    assert [json.loads(path.read_text())["measured"][0]["seconds"] for path in paths] == [[1.0], [2.0], [3.0]]


def test_an_earlier_record_is_replaced_and_stays_where_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Bench(outputs=str(tmp_path), device="cpu")
    path = write(request, [example("variational", [1.0])], RATES)
    both = [example("variational", [1.0]), example("none", [2.0])]
    assert write(request, both, RATES, path) == path and list(path.parent.iterdir()) == [path]
    content = path.read_bytes()
    assert len(json.loads(content)["measured"]) == 2

    def fail(*_: object) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(files, "replace", fail)
    with pytest.raises(ConfigError, match="the disk is full"):
        write(request, both[:1], RATES, path)
    assert path.read_bytes() == content


def test_a_record_that_cannot_be_written_is_printed_and_an_error_in_any_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench").touch()
    request = Bench(outputs=str(tmp_path), device="cpu")
    with pytest.raises(ConfigError, match=r"/bench cannot be written \(File exists\); the table is above"):
        write(request, [example("variational", [1.0])], RATES)
    assert "variational" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdout", broken(errno.ENOSPC))
    output.prepare()
    with pytest.raises(ConfigError, match=r"/bench cannot be written \(File exists\)$"):
        write(request, [example("variational", [1.0])], RATES)
