"""Tables of runs; on real runs in commands/test_compare.py."""

from dataclasses import replace

import pytest

from tests.processes import ROOT
from vdrop_cli import comparison, runs
from vdrop_cli.comparison import Configuration
from vdrop_cli.runs import Unfinished

BASE = {"task.name": "language_model", "data.source": "ptb", "model.name": "m", "dropout.name": "none"}


def configuration(**changes: object) -> Configuration:
    return Configuration(settings=BASE | {name.replace("__", "."): value for name, value in changes.items()})


@pytest.mark.parametrize(
    ("configurations", "expected"),
    [
        ([configuration()], ["ptb m none"]),
        ([configuration(), configuration(dropout__name="naive", dropout__p_h=0.2)], ["none", "naive"]),
        (
            [
                configuration(),
                configuration(dropout__name="naive", dropout__p_h=0.2, dropout__p_x=0.1),
                configuration(dropout__name="naive", dropout__p_h=0.3, dropout__p_x=0.1),
            ],
            ["none", "naive p_h=0.2", "naive p_h=0.3"],
        ),
        (
            [configuration(schedule__epochs=1, seed=1), configuration(schedule__epochs=2, seed=1)],
            ["epochs=1", "epochs=2"],
        ),
        ([configuration(data__source="pydoc"), configuration()], ["pydoc", "ptb"]),
        ([configuration(schedule__clip=5), configuration()], ["clip=5", "clip=null"]),
    ],
)
def test_a_label_is_the_fewest_settings_in_which_configurations_differ(
    configurations: list[Configuration], expected: list[str]
) -> None:
    assert comparison.labels(configurations) == expected


def test_run_names_that_are_not_unique_are_no_labels() -> None:
    two = [configuration(), configuration(dropout__name="naive")]
    for one, name in zip(two, ("a", "b"), strict=True):
        one.run_names = {name}
    assert comparison.labels(two) == ["a", "b"]
    two[1].run_names = {"a"}
    assert comparison.labels(two) == ["none", "naive"]
    two[1].run_names = {"b", None}
    assert comparison.labels(two) == ["a", "naive"]


def test_a_cell_is_mean_and_standard_deviation_and_counts_where_some_runs_lack_the_metric() -> None:
    one = Configuration(measured=[{"test_ppl": 10.0, "epoch": 3}, {"test_ppl": 12.0, "epoch": 3, "x": 0.5}])
    assert one.cell("test_ppl") == "11.00 ± 1.41" and one.cell("x") == "0.5000 (1)"
    assert one.cell("epoch") == "3 ± 0" and one.cell("y") == comparison.BLANK
    assert one.seeds == "2"
    one.unfinished += ["lost", "failed", "lost"]
    assert one.seeds == "2 of 5 (2 lost, 1 failed)"


def test_validation_as_published_is_of_the_published_columns_alone() -> None:
    """An earlier version also wrote it for other columns, where nothing compares with it."""
    shown = {
        name: comparison.metrics(run)
        for name in ("baselines/quick_tied-bf16-amd_epyc", "table1/medium_untied-bf16-intel_xeon")
        for run in runs.below(ROOT / "outputs" / "record" / name)
    }
    quick_tied, medium = shown.values()
    assert "valid_ppl_as_published" not in quick_tied and quick_tied["valid_ppl"] > 75
    assert 81 < medium["valid_ppl_as_published"] < medium["valid_ppl"]


def test_runs_of_different_texts_have_different_labels() -> None:
    """As of a file that was corrected under the same name."""
    record = ROOT / "outputs" / "record" / "table1" / "small_none-bf16-amd_epyc"
    (run,) = runs.below(record)
    start = run.log[0] | {"corpus": "0123456789abcdef"}
    other = replace(run, folder=record / "other", log=[start, *run.log[1:]])
    both, _ = comparison.grouped([run, other])
    alone = comparison.grouped([run])[0][0].label
    assert [one.label for one in both] == [
        f"{alone} (text {text[:8]})" for text in (run.corpus, other.corpus)
    ]


def test_a_finished_run_counts_rather_than_an_unfinished_one_in_whatever_order_they_are_named() -> None:
    record = ROOT / "outputs" / "record" / "table1" / "small_none-bf16-amd_epyc"
    (run,) = runs.below(record)
    unfinished = Unfinished(record / "other", run.config, run.log, "unfinished")
    for both in ([run, unfinished], [unfinished, run]):
        (one,), messages = comparison.grouped(both)
        assert one.finished == [run] and one.seeds == "1"
        assert messages == [f"{unfinished.folder} has the settings and the seed of {run.folder}; left out"]


def test_configurations_are_ranked_by_validation_and_those_without_results_come_last() -> None:
    worse, none, better = (Configuration(name) for name in ("worse", "none", "better"))
    worse.measured = [{"valid_ppl": 9.0, "test_ppl": 1.0}]
    better.measured = [{"valid_ppl": 8.0, "test_ppl": 2.0}]
    none.unfinished.append("failed")
    rows = comparison.ranked_rows([worse, none, better])
    assert rows[0] == ["", "seeds", "valid_ppl", "test_ppl"]
    assert [row[0] for row in rows[1:]] == ["1. better", "2. worse", "none"]
