"""What an evaluation prints."""

import pytest

from vdrop_cli.evaluation_report import cells, print_results, without_other_intervals
from vdrop_cli.settings.choices import Interval

CALIBRATION = [
    {"level": 90, "gaussian": 0.5, "quantile": 0.25, "conformal": 0.9},
    {"level": 95, "gaussian": 0.75, "quantile": 0.5, "conformal": None},
]
SHARPNESS = [{"intervals": kind, "width_95": 2.0} for kind in ("gaussian", "quantile", "conformal")]


def test_a_kind_of_interval_hides_the_others() -> None:
    assert without_other_intervals(CALIBRATION, None) == CALIBRATION
    assert without_other_intervals(CALIBRATION, Interval.conformal) == [
        {"level": 90, "conformal": 0.9},
        {"level": 95, "conformal": None},
    ]
    assert without_other_intervals(SHARPNESS, Interval.quantile) == [
        {"intervals": "quantile", "width_95": 2.0}
    ]


def test_shares_have_four_digits_and_a_missing_one_a_dash() -> None:
    assert cells(CALIBRATION)[2] == ["95", "0.7500", "0.5000", "–"]
    assert cells([{"group": "a", "texts": 12345}]) == [["group", "texts"], ["a", "12,345"]]


def test_large_numbers_have_two_digits_and_tables_of_mc_samples_say_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"position": "2 to 5", "tokens": 12345, "ppl": 104.1234, "entropy": 4.00004}]
    print_results({"metrics": {}, "tables": {"positions": rows, "positions_mc": rows}})
    standard, averaged = capsys.readouterr().out.strip().split("\n\n")
    assert standard.splitlines()[0] == "test tokens by their position in the sentence"
    assert averaged.splitlines()[0] == "test tokens by their position in the sentence, MC samples averaged"
    assert standard.splitlines()[2].split()[-3:] == ["12,345", "104.12", "4.0000"]


def test_every_table_is_printed_below_the_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    mc = [
        {"samples": 1, "rmse": 0.5, "deviation": 0.1, "groups": 2},
        {"samples": 2, "rmse": 0.4, "deviation": None, "groups": 1},
    ]
    tables = {"calibration": CALIBRATION, "intervals": SHARPNESS}
    print_results({"metrics": {"test_rmse_mc2": 0.4}, "mc": mc, "tables": tables}, Interval.conformal)
    metrics, passes, calibration, sharpness = capsys.readouterr().out.split("\n\n")
    assert metrics.split()[:2] == ["test_rmse_mc2", "0.4000"]
    assert passes.splitlines()[1].split() == ["1", "0.5000", "0.1000", "of", "2"]
    assert passes.splitlines()[2].split() == ["2", "0.4000", "–"]
    assert calibration.splitlines()[1:] == ["level  conformal", "90        0.9000", "95             –"]
    assert sharpness.splitlines()[-1].split() == ["conformal", "2.0000"]
