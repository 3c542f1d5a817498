"""The experiments on film reviews: which runs they are, and what is told of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vdrop_cli import experiments, ratings
from vdrop_cli.errors import ConfigError
from vdrop_cli.policies import Cell
from vdrop_cli.runs import Finished
from vdrop_cli.settings.choices import Pictures, SplitProtocol
from vdrop_cli.settings.commands import Figures
from vdrop_cli.settings.fields import plain

FEW = Figures(
    protocols=[SplitProtocol.paper, SplitProtocol.clean],
    cells=[Cell.lstm],
    dropouts=["none", "variational"],
    epochs=7,
    mc_samples=2,
)


@pytest.fixture(autouse=True)
def hydra(composing: None) -> None:
    pass


def test_every_protocol_cell_and_dropout_is_a_row() -> None:
    rows = ratings.rows(Figures())
    assert len({row.key for row in rows}) == len(rows) == 2 * 2 * 3
    for row in rows:
        assert (row.settings.task.protocol, row.settings.model.cell, row.settings.dropout.name) == (
            row.protocol,
            row.cell,
            row.dropout,
        )
        assert row.settings.schedule.epochs == 60 and row.settings.reports_best == (
            row.protocol is SplitProtocol.clean
        )
        assert (row.evaluation(50) is None) == (row.dropout == "none")


def test_a_dropout_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="dropout=naif is an unknown choice; did you mean naive"):
        ratings.rows(Figures(dropouts=["naif"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("task.protocol=clean", r"protocols what is chosen by it \(paper\), got clean"),
        ("model=gru_sentiment", r"cells what is chosen by it \(lstm\), got gru"),
        ("dropout=naive", r"dropouts what is chosen by it \(none\), got naive"),
        ("schedule.epochs=3", r"epochs what is chosen by it \(7\), got 3"),
    ],
)
def test_overrides_do_not_make_another_row_of_it(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^overrides must leave to {message}"):
        ratings.rows(replace(FEW, overrides=change))


def finished(folder: Path, row: ratings.Row, seed: int, test: float) -> Finished:
    """A run with an evaluation by two passes beside it."""
    config = plain(row.settings) | {"seed": seed}
    log: list[dict[str, Any]] = [
        {
            "kind": "start",
            "environment": {
                "precision": "fp32",
                "device": "a CPU",
                "threads": 2,
                "date": "2026-01-02",
                "commit": "0123456789",
                "dirty": True,
            },
        }
    ]
    log += [
        {"kind": "epoch", "epoch": n, "test_rmse": test, "train_rmse": 0.1, "words_per_second": 1000.0}
        for n in (1, 2)
    ]
    result = {
        "epoch": 7,
        "epochs": 7,
        "train_rmse": 0.1,
        "valid_rmse": 0.12,
        "test_rmse": test,
        "test_rmse_of_mean": 0.2,
        "seconds": 1.0,
    }
    there = folder / f"{row.dropout}-s{seed}"
    there.mkdir()
    told = {
        "metrics": {"test_rmse": 9.0, "test_rmse_mc2": test - 0.01, "test_coverage_80_mc2": 0.79},
        "mc": [{"samples": 2}],
    }
    if row.dropout != "none":
        (there / "eval-0007-mc2-s1.json").write_text(json.dumps(told))
    return Finished(there, config, log, result)


def test_the_section_holds_what_the_runs_came_to(tmp_path: Path) -> None:
    clean = [row for row in ratings.rows(FEW) if row.protocol is SplitProtocol.clean]
    found = {row.key: [finished(tmp_path, row, seed, 0.14 + seed / 100) for seed in (1, 2)] for row in clean}
    every = [run for of_row in found.values() for run in of_row]
    parts = ratings.section(
        FEW, ratings.all_lines(FEW, every), tmp_path / "pictures", Pictures.png, tmp_path / "RESULTS.md"
    )
    whole = "\n\n".join(parts)
    lines = [line for line in whole.splitlines() if " | 7 ± 0 | 0.1" in line]
    none, variational = (
        next(line for line in lines if line.startswith(f"| LSTM | {name} "))
        for name in ("none", "variational")
    )
    assert "| 0.1000 ± 0.0000 | 7 ± 0 | 0.1200 ± 0.0000 | 0.1550 ± 0.0071 | – | – |" in none
    assert "| 0.1550 ± 0.0071 | 2 | 0.1450 ± 0.0071 |" in variational and "| 0.790 ± 0.000 |" in variational
    assert variational.endswith("| 1,000 | 1 2 | fp32 | a CPU, 2 threads | 2026-01-02 | 0123456* |")
    assert "Baselines, on test: predicting the mean 0.2000." in whole
    assert whole.count("not yet run") == 2, "the paper's protocol"
    every[0].log.append(
        {"kind": "start", "environment": every[0].environment | {"commit": "9876543210", "dirty": False}}
    )
    assert "| 2026-01-02 | 0123456*; 9876543 |" in "".join(
        ratings.section(
            FEW, ratings.all_lines(FEW, every), tmp_path / "pictures", Pictures.none, tmp_path / "RESULTS.md"
        )
    )
    assert (tmp_path / "pictures" / "ratings_clean_lstm.png").exists()
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["ratings_clean_lstm.png"]


def test_runs_of_another_length_or_precision_are_lines_of_their_own_and_of_other_settings_none(
    tmp_path: Path,
) -> None:
    row, longer, wider = (
        ratings.rows(FEW)[0],
        ratings.rows(replace(FEW, epochs=9))[0],
        ratings.rows(replace(FEW, overrides="model.layers=2"))[0],
    )
    runs = [finished(tmp_path, of, seed, 0.1) for of, seed in ((row, 1), (longer, 2), (wider, 3), (row, 4))]
    runs[3].config["precision"] = "fp32"
    found = ratings.lines(row, runs)
    assert [[run.train.seed for run in line.runs] for line in found] == [[1], [2], [4]]
    names = ratings.record_names(ratings.all_lines(FEW, runs))
    assert sorted(names.values()) == ["ratings/paper_lstm_none-7", "ratings/paper_lstm_none-9"]
    assert experiments.key(runs[0].numbers) in names


def test_a_dropout_that_there_are_runs_of_stays_on_the_page(tmp_path: Path) -> None:
    untied, zaremba = ratings.rows(
        replace(FEW, protocols=[SplitProtocol.clean], dropouts=["variational_untied", "zaremba"], epochs=9)
    )
    runs = [finished(tmp_path, untied, 1, 0.1), finished(tmp_path, zaremba, 1, 0.1)]
    runs[1].config["schedule"]["lr"] = 0.5
    chosen = [row.name for row in ratings.rows(FEW)]
    told = [line.row.name for line in ratings.all_lines(FEW, runs)]
    assert sorted(told) == sorted([*chosen, "clean lstm variational_untied"]), (
        "but not where it was not run, nor one of other settings"
    )
    own = replace(FEW, overrides="schedule.lr=0.1")
    assert [line.row.name for line in ratings.all_lines(own, runs)] == chosen


def test_a_dropout_that_one_cell_cannot_have_is_on_the_page_of_the_other(tmp_path: Path) -> None:
    both = replace(FEW, cells=[Cell.lstm, Cell.gru])
    (moon,) = ratings.rows(replace(FEW, protocols=[SplitProtocol.clean], dropouts=["moon"]))
    told = [line.row.name for line in ratings.all_lines(both, [finished(tmp_path, moon, 1, 0.1)])]
    clean = [
        f"clean {cell} {dropout}"
        for cell, dropouts in (("lstm", (*FEW.dropouts, "moon")), ("gru", FEW.dropouts))
        for dropout in dropouts
    ]
    assert told[-5:] == clean and len(told) == 9


def test_evaluations_that_are_set_side_by_side_have_as_many_passes(tmp_path: Path) -> None:
    row = ratings.rows(FEW)[1]
    first, second = (finished(tmp_path, row, seed, 0.1) for seed in (1, 2))
    more = {"metrics": {"test_rmse_mc9": 0.05}, "mc": [{"samples": 9}]}
    (first.folder / "eval-0007-mc9-s1.json").write_text(json.dumps(more))
    ((both,), (alone,)) = ratings.lines(row, [first, second]), ratings.lines(row, [first])
    assert (both.samples, alone.samples) == (2, 9) and alone.of_passes("test_rmse") == [0.05]
    (second.folder / "eval-0007-mc2-s1.json").unlink()
    assert ratings.lines(row, [first, second])[0].samples is None


def test_a_run_is_evaluated_as_its_record_until_it_is_itself_and_it_is_told_how_that_was_made(
    tmp_path: Path,
) -> None:
    row = ratings.rows(FEW)[1]
    made = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        made.append(finished(tmp_path / name, row, 1, 0.1))
    old, new = made
    path = old.folder / "eval-0007-mc2-s1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"environment": {"date": "2025-01-01"}}))
    stands = replace(new, record=old)
    (line,) = ratings.lines(row, [stands])
    assert [one.get("date") for one in line.environments] == ["2026-01-02"] and line.samples == 2
    (new.folder / path.name).unlink()
    (line,) = ratings.lines(row, [stands])
    assert [one.get("date") for one in line.environments] == ["2026-01-02", "2025-01-01"] and line.of_passes(
        "test_rmse"
    ) == [0.1 - 0.01]
    (new.folder / "eval-0007-mc3-s1.json").write_text(
        json.dumps({"metrics": {"test_rmse_mc3": 0.05}, "mc": [{"samples": 3}]})
    )
    assert ratings.lines(row, [stands])[0].of_passes("test_rmse") == [0.05], "its own come first"
