"""The command from its settings to its record; the long form measures every part in real time."""

import json
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra import compose

from tests.bench.test_worker import QUICK
from tests.conftest import Vdrop, require_torch_lstm, settings
from vdrop_cli.bench import worker
from vdrop_cli.bench.report import Measurement, Rates, measurement_limit
from vdrop_cli.bench.steps import random_ratings
from vdrop_cli.commands import bench
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.choices import Precision
from vdrop_cli.settings.commands import Bench
from vdrop_cli.settings.compose import parse


@pytest.mark.usefixtures("composing")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["parts=[mc]", "cells=[torch_lstm]"], "leave nothing to measure"),
        (["device=cuda:7"], "^device=cuda:7"),
    ],
)
def test_settings_that_cannot_be_measured(override: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.run(parse(compose("bench", override), Bench))


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


def records(outputs: Path) -> list[Path]:
    return list((outputs / "bench").glob("*.json"))


@pytest.mark.usefixtures("composing")
def test_a_run_prints_and_records_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "TIMING", QUICK)
    chosen = ["sizes=[sentiment]", "parts=[cell_step]", "cells=[gru,torch_gru]", "precisions=[fp32]"]
    chosen += ["starts=1", "turns=3", f"outputs={tmp_path}"]
    bench.run(parse(compose("bench", chosen), Bench))
    (path,) = records(tmp_path)
    record = json.loads(path.read_text())
    assert record["settings"]["turns"] == 3 and str(tmp_path) not in path.read_text(), "no place on a machine"
    measured = [(m["cell"], m["words"], m["recurrent"]) for m in record["measured"]]
    assert measured == [(cell, 1, 6 * 128**2) for cell in ("gru", "torch_gru")]
    for m in record["measured"]:
        measurement = Measurement(**{f.name: m[f.name] for f in fields(Measurement)})
        assert len(measurement.seconds) == 3 and min(measurement.seconds) > 0
        assert measurement.peak_megabytes > 50
        assert measurement.limit_seconds == measurement_limit(measurement, Rates(**record["rates"]))
    printed = capsys.readouterr()
    assert printed.out.count("sentiment: one step of a cell, ") == 2 and str(path) in printed.err


@pytest.mark.usefixtures("composing")
def test_what_was_measured_before_a_case_that_cannot_run_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "TIMING", QUICK)
    recorded = list[list[Path]]()

    def measure(*arguments: Any) -> Any:
        recorded.append(records(tmp_path))
        if len(recorded) == 3:
            raise ConfigError("it could not run")
        return worker.measure(*arguments)

    monkeypatch.setattr(bench, "measure", measure)
    chosen = ["sizes=[sentiment,small,medium]", "parts=[cell_step]", "cells=[gru]", "precisions=[fp32]"]
    chosen += ["starts=1", "turns=1", f"outputs={tmp_path}"]
    with pytest.raises(ConfigError, match="it could not run"):
        bench.run(parse(compose("bench", chosen), Bench))
    assert [len(paths) for paths in recorded] == [0, 1, 1], "one record, written after each group"
    (path,) = records(tmp_path)
    measured = json.loads(path.read_text())["measured"]
    assert [m["size"] for m in measured] == ["sentiment", "small"]
    assert min(m["limit_seconds"] for m in measured) > 0
    assert f"vdrop: {path} has what was measured before" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed")
def test_keras_beside_the_rest(vdrop: Vdrop, tmp_path: Path) -> None:
    chosen = ["sizes=[small]", "parts=[step]", "cells=[keras]", "precisions=[fp32]"]
    ran = vdrop("bench", *chosen, "starts=1", "turns=1", "outputs=o")
    assert ran.returncode == 0, ran.stderr
    (path,) = records(tmp_path / "o")
    (m,) = json.loads(path.read_text())["measured"]
    assert (m["cell"], m["words"]) == ("keras", 400)


@pytest.mark.long
@pytest.mark.parametrize("size", ["small", "sentiment"])
def test_all_parts_in_real_time(size: str, vdrop: Vdrop, tmp_path: Path) -> None:
    require_torch_lstm("torch_lstm", Precision.bf16)
    cells = {"variational", "torch_lstm"}
    chosen = [f"sizes=[{size}]", f"cells=[{','.join(sorted(cells))}]", "precisions=[bf16]"]
    ran = vdrop("bench", *chosen, "starts=1", "turns=2", "outputs=o")
    assert ran.returncode == 0, ran.stderr
    (path,) = records(tmp_path / "o")
    assert list(path.parent.iterdir()) == [path], "the checkpoints are removed"
    record = json.loads(path.read_text())
    ratings_words = sum(random_ratings(settings("task=sentiment", "device=cpu"))[1].tolist())
    counts_of_small = {
        "step": (400, 640_000, 2_000_000),
        "layer": (400, 320_000, 0),
        "mc": (4480, 640_000, 2_000_000),
        "checkpoint": (0, 0, 0),
        "directions": (400, 320_000, 0),
    }
    expected = counts_of_small if size == "small" else {"ratings": (ratings_words, 131_072, 0)}
    assert {m["part"]: (m["words"], m["recurrent"], m["head"]) for m in record["measured"]} == expected
    parts_of_both = {"step", "layer", "ratings", "directions"} & expected.keys()
    compared = {(part, cell) for part in parts_of_both for cell in cells}
    alone = {(part, "variational") for part in {"mc", "checkpoint"} & expected.keys()}
    assert {(m["part"], m["cell"]) for m in record["measured"]} == compared | alone
    for m in record["measured"]:
        measurement = Measurement(**{f.name: m[f.name] for f in fields(Measurement)})
        assert len(measurement.seconds) == 2 and measurement.peak_megabytes > 50
        assert measurement.limit_seconds == pytest.approx(
            measurement_limit(measurement, Rates(**record["rates"]))
        )
    assert {"torch", "device", "threads"} <= record["environment"].keys() and record["rates"]["bf16"] > 0
    assert "× torch" in ran.stdout and ("small: writing a checkpoint takes" in ran.stdout) == (
        size == "small"
    )
