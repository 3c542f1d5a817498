"""The experiments on film reviews: which runs they are, and the lines of the page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vdrop_cli.errors import ConfigError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.policies import Cell
from vdrop_cli.runs import Finished
from vdrop_cli.settings.choices import Pictures, SplitProtocol, StudyName
from vdrop_cli.settings.commands import Reproduce, Table
from vdrop_cli.settings.fields import plain
from vdrop_cli.studies import film_reviews, page, rows
from vdrop_cli.studies.film_reviews import FilmReviews
from vdrop_cli.studies.rows import Collected
from vdrop_cli.studies.study import Line, Row

FEW = FilmReviews(
    protocols=[SplitProtocol.paper, SplitProtocol.clean],
    cells=[Cell.lstm],
    dropouts=["none", "variational"],
    epochs=7,
    samples=2,
)


@pytest.fixture(autouse=True)
def hydra(composing: None) -> None:
    pass


def test_every_protocol_cell_and_dropout_is_a_row() -> None:
    rows = FilmReviews().rows
    assert len({row.key for row in rows}) == len(rows) == 2 * 2 * 3
    for row in rows:
        task, cell = row.settings.task, row.settings.model.cell
        assert row.name == f"{task.protocol} {cell} {row.settings.dropout.name}"
        assert row.settings.schedule.epochs == 60
        assert row.settings.reports_best == (task.protocol is SplitProtocol.clean)
        is_plain = row.settings.dropout.name == "none"
        assert row.evaluation == Evaluation(samples=0 if is_plain else 50)


def test_the_settings_of_the_command_choose_rows() -> None:
    settings = Reproduce(StudyName.film_reviews, cells=[Cell.gru], epochs=9, mc_samples=3, overrides="a=1")
    assert FilmReviews.from_reproduce(settings) == FilmReviews(
        cells=[Cell.gru], epochs=9, samples=3, overrides="a=1"
    )
    assert FilmReviews.from_reproduce(Reproduce(StudyName.film_reviews)) == FilmReviews()


def test_an_unknown_dropout_is_an_error() -> None:
    with pytest.raises(ConfigError, match="dropout=naif is an unknown choice; did you mean naive"):
        _ = FilmReviews(dropouts=["naif"]).rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("task.protocol=clean", r"protocols as chosen \(paper\), got clean"),
        ("model=gru_sentiment", r"cells as chosen \(lstm\), got gru"),
        ("dropout=naive", r"dropouts as chosen \(none\), got naive"),
        ("schedule.epochs=3", r"epochs as chosen \(7\), got 3"),
    ],
)
def test_overrides_do_not_make_another_row_of_it(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^overrides must leave {message}"):
        _ = replace(FEW, overrides=change).rows


def finished(folder: Path, row: Row, seed: int, test: float) -> Finished:
    """A run with an evaluation by two passes beside it."""
    config = plain(row.settings) | {"seed": seed}
    log: list[dict[str, Any]] = [
        {
            "kind": "start",
            "corpus": "0f",
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
    there = folder / f"{row.settings.dropout.name}-s{seed}"
    there.mkdir()
    evaluation_file = {
        "metrics": {"test_rmse": 9.0, "test_rmse_mc2": test - 0.01, "test_coverage_80_mc2": 0.79},
        "mc": [{"samples": 2}],
    }
    if row.settings.dropout.name != "none":
        (there / "eval-0007-mc2-s1.json").write_text(json.dumps(evaluation_file))
    return Finished(there, config, log, result)


def collected(runs: list[Finished]) -> Collected:
    by_key: dict[str, list[Finished]] = {}
    for run in runs:
        by_key.setdefault(rows.key(run.numbers), []).append(run)
    return Collected(by_key, {})


def names(study: FilmReviews, runs: list[Finished]) -> list[str]:
    return [line.row.name for line in study.lines(collected(runs))]


def test_the_section_holds_the_metrics_of_the_runs(tmp_path: Path) -> None:
    clean = [row for row in FEW.rows if row.settings.task.protocol is SplitProtocol.clean]
    runs = [finished(tmp_path, row, seed, 0.14 + seed / 100) for row in clean for seed in (1, 2)]

    def rendered(kind: Pictures) -> str:
        lines = FEW.lines(collected(runs))
        composed = page.Composed([FEW], collected(runs), [lines])
        return page.render(composed, Table(outputs=str(tmp_path), file=str(tmp_path / "R.md")), kind)

    whole = rendered(Pictures.png)
    lines = [line for line in whole.splitlines() if " | 7 ± 0 | 0.1" in line]
    none, variational = (
        next(line for line in lines if line.startswith(f"| LSTM | {name} "))
        for name in ("none", "variational")
    )
    assert "| 0.1000 ± 0.0000 | 7 ± 0 | 0.1200 ± 0.0000 | 0.1550 ± 0.0071 | – | – |" in none
    assert "| 0.1550 ± 0.0071 | 2 | 0.1450 ± 0.0071 |" in variational and "| 0.790 ± 0.000 |" in variational
    assert variational.endswith("| 1,000 ± 0 | 1 2 | fp32 |")
    assert "| LSTM | variational | 1 2 | a CPU, 2 threads | 2026-01-02 | 0123456* |" in whole
    assert "Baselines, on test: predicting the mean 0.2000." in whole
    assert whole.count("<summary>2 rows not yet run</summary>") == 1, "the paper's protocol"
    resumed = {"kind": "start", "environment": runs[0].environment | {"commit": "9876543210", "dirty": False}}
    runs[0].log.append(resumed)
    assert "| 2026-01-02 | 0123456*; 9876543 |" in rendered(Pictures.none)
    folder = tmp_path / "record" / "pictures"
    assert [path.name for path in folder.iterdir()] == ["ratings_clean_lstm.png"]


def test_runs_of_another_length_or_precision_are_lines_of_their_own_and_of_other_settings_none(
    tmp_path: Path,
) -> None:
    row, longer, wider = (
        study.rows[0] for study in (FEW, replace(FEW, epochs=9), replace(FEW, overrides="model.layers=2"))
    )
    made = ((row, 1), (longer, 2), (wider, 3), (row, 4))
    runs = [finished(tmp_path, one, seed, 0.1) for one, seed in made]
    runs[3].config["precision"] = "fp32"
    assert [line.seeds for line in film_reviews.lines_of(row, runs)] == ["1", "2", "4"]
    folders = FEW.record_names(FEW.lines(collected(runs)))
    assert sorted(folders.values()) == ["ratings/paper_lstm_none-7", "ratings/paper_lstm_none-9"]
    assert rows.key(runs[0].numbers) in folders


def test_a_dropout_that_there_are_runs_of_stays_on_the_page(tmp_path: Path) -> None:
    few = replace(FEW, protocols=[SplitProtocol.clean], dropouts=["variational_untied", "zaremba"], epochs=9)
    untied, zaremba = few.rows
    runs = [finished(tmp_path, untied, 1, 0.1), finished(tmp_path, zaremba, 1, 0.1)]
    runs[1].config["schedule"]["lr"] = 0.05
    chosen = [row.name for row in FEW.rows]
    assert sorted(names(FEW, runs)) == sorted([*chosen, "clean lstm variational_untied"]), (
        "but not where it was not run, nor one of other settings"
    )
    own = replace(FEW, overrides="schedule.lr=0.1")
    assert names(own, runs) == chosen


def test_a_dropout_that_one_cell_cannot_have_is_on_the_page_of_the_other(tmp_path: Path) -> None:
    both = replace(FEW, cells=[Cell.lstm, Cell.gru])
    (moon,) = replace(FEW, protocols=[SplitProtocol.clean], dropouts=["moon"]).rows
    shown = names(both, [finished(tmp_path, moon, 1, 0.1)])
    clean = [
        f"clean {cell} {dropout}"
        for cell, dropouts in (("lstm", (*FEW.dropouts, "moon")), ("gru", FEW.dropouts))
        for dropout in dropouts
    ]
    assert shown[-5:] == clean and len(shown) == 9


def test_evaluations_that_are_set_side_by_side_have_as_many_passes(tmp_path: Path) -> None:
    """Those that most runs have; a run without one takes nothing away from the others."""
    row = FEW.rows[1]
    first, second = (finished(tmp_path, row, seed, 0.1) for seed in (1, 2))
    more = {"metrics": {"test_rmse_mc9": 0.05}, "mc": [{"samples": 9}]}
    (first.folder / "eval-0007-mc9-s1.json").write_text(json.dumps(more))
    ((both,), (alone,)) = film_reviews.lines_of(row, [first, second]), film_reviews.lines_of(row, [first])
    assert (both.values("samples"), alone.values("samples")) == ([2, 2], [9])
    assert alone.values("test_rmse_mc") == [0.05]
    cells = dict(film_reviews.columns(SplitProtocol.paper))
    assert cells["test, MC"](both) == "0.0900 ± 0.0000" and cells["epochs"](both) == "7"
    (second.folder / "eval-0007-mc2-s1.json").unlink()
    (line,) = film_reviews.lines_of(row, [first, second])
    assert line.values("samples") == [9] and cells["test, MC"](line) == "0.0500 (1 of 2)"


def dates(line: Line) -> list[str | None]:
    return [one.get("date") for measured in line.runs for one in measured.environments]


def test_a_run_is_evaluated_as_its_record_until_it_is_itself_and_the_page_says_how(tmp_path: Path) -> None:
    row = FEW.rows[1]
    made = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        made.append(finished(tmp_path / name, row, 1, 0.1))
    old, new = made
    path = old.folder / "eval-0007-mc2-s1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"environment": {"date": "2025-01-01"}}))
    stands = replace(new, record=old)
    (line,) = film_reviews.lines_of(row, [stands])
    assert dates(line) == ["2026-01-02"] and line.values("samples") == [2]
    (new.folder / path.name).unlink()
    (line,) = film_reviews.lines_of(row, [stands])
    assert dates(line) == ["2026-01-02", "2025-01-01"] and line.values("test_rmse_mc") == [0.1 - 0.01]
    (new.folder / "eval-0007-mc3-s1.json").write_text(
        json.dumps({"metrics": {"test_rmse_mc3": 0.05}, "mc": [{"samples": 3}]})
    )
    (line,) = film_reviews.lines_of(row, [stands])
    assert line.values("test_rmse_mc") == [0.05], "its own come first"
