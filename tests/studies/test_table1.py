"""Table 1: its rows, which runs are theirs, and what is published beside them."""

import dataclasses

import pytest

from tests.conftest import composing_once
from vdrop_cli import published
from vdrop_cli.errors import ConfigError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.runs import Finished
from vdrop_cli.settings.choices import Size
from vdrop_cli.settings.commands import Reproduce
from vdrop_cli.studies import table1
from vdrop_cli.studies.study import Line, Row, RunMetrics
from vdrop_cli.studies.table1 import COLUMNS, Table1

ORDER = ["none", "moon", "moon_word", "zaremba", "variational", "variational_mc", "untied", "untied_mc"]


@pytest.fixture(autouse=True)
def hydra(composing: None) -> None:
    pass


@pytest.fixture(scope="module")
def every() -> dict[str, Row]:
    with composing_once():
        return {row.name: row for row in Table1().rows}


def test_all_rows_are_in_the_papers_order(every: dict[str, Row]) -> None:
    by_size: dict[Size, list[str]] = {}
    for row in every.values():
        by_size.setdefault(row.settings.model.size, []).append(row.name.split("_", 2)[2])
    assert by_size[Size.small] == by_size[Size.medium] == ORDER
    assert by_size[Size.large] == [*ORDER, "ensemble", "untied_corrected", "untied_corrected_mc"]
    assert list(every) == list(published.experiments())


def test_rows_are_chosen_by_their_names_or_those_of_experiments() -> None:
    def chosen(sizes: list[Size] | None, *names: str) -> list[tuple[Size, str]]:
        return Table1(sizes, list(names) or None).choose()

    small, medium, large = Size
    assert chosen([small], "moon") == chosen(None, "table1_small_moon") == [(small, "moon")]
    assert chosen([large, small], "moon") == [(large, "moon"), (small, "moon")]
    assert chosen(None, "moon") == [(size, "moon") for size in Size]
    assert chosen(None, "ensemble") == [(large, "ensemble")]
    two = Table1.from_reproduce(Reproduce(rows=["none", "table1_large_moon"])).choose()
    assert two == [(medium, "none"), (large, "moon")]
    assert [size for size, _ in Table1.from_reproduce(Reproduce()).choose()] == [medium] * len(ORDER)


@pytest.mark.parametrize(
    ("sizes", "name", "message"),
    [
        (None, "quick_tied", "rows: quick_tied is not a row; it is one of study=baselines"),
        ([Size.small], "mon", "rows: mon is not a row; did you mean moon"),
        (None, "table1_small_mon", "rows: table1_small_mon is not a row; did you mean table1_small_moon"),
        ([Size.small], "ensemble", "rows: ensemble is not a row of these sizes, it is of large"),
        ([Size.small], "table1_large_none", "rows: table1_large_none is not a row of these sizes, it is of"),
    ],
)
def test_a_choice_of_no_row_is_an_error(sizes: list[Size] | None, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _ = Table1(sizes, [name]).rows


def test_an_mc_row_has_the_runs_of_the_row_above_and_of_no_other(every: dict[str, Row]) -> None:
    keys = {name: row.key for name, row in every.items()}
    for size in Size:
        tied, mc, untied = (
            keys[f"table1_{size}_{name}"] for name in ("variational", "variational_mc", "untied")
        )
        assert tied == mc != untied
    assert len(set(keys.values())) == 18, "six runs a size"


PUBLISHED = {  # as in the paper: valid, test, words a second; of MC rows the test alone
    "none": ((121.1, 121.7, 5500), (128.3, 127.4, 2500)),
    "moon": ((100.7, 97.0, 4800), (122.9, 118.7, 3000)),
    "moon_word": ((88.9, 86.5, 4800), (88.8, 86.0, 3000)),
    "zaremba": ((86.2, 82.7, 5500), (82.2, 78.4, 2500)),
    "variational": ((81.8, 79.7, 4700), (77.3, 75.0, 2400)),
    "variational_mc": ((None, 79.0, None), (None, 74.1, None)),
    "untied": ((81.9, 79.7, 2700), (77.9, 75.2, 1600)),
    "untied_mc": ((None, 78.6, None), (None, 73.4, None)),
}
STDS = {  # of valid and test; the other rows have none
    "variational": ((0.2, 0.1), (0.2, 0.1)),
    "variational_mc": ((None, 0.1), (None, 0.0)),
    "untied": ((0.2, 0.1), (0.3, 0.2)),
    "untied_mc": ((None, 0.1), (None, 0.0)),
}
OTHER_SOURCES = {
    "table1_small_none": (None, 114.5, None),
    "table1_small_variational": (None, 87.3, None),
    "table1_large_ensemble": (None, 68.7, None),
    "table1_large_untied_corrected": (77.457, 75.112, None),
    "table1_large_untied_corrected_mc": (None, 73.319, None),
}


def test_published_numbers_are_those_of_the_paper(every: dict[str, Row]) -> None:
    expected = {
        f"table1_{size}_{name}": numbers
        for name, sizes in PUBLISHED.items()
        for size, numbers in zip(("medium", "large"), sizes, strict=True)
    }
    for name, row in every.items():
        reference = row.reference
        numbers = tuple(one and one.value for one in (reference.valid, reference.test))
        actual = (*numbers, reference.words_per_second)
        assert actual == (expected | OTHER_SOURCES).get(name, (None, None, None)), name
        assert (reference.source == "Gal & Ghahramani 2016, Table 1") == (name in expected), name
        assert (reference.source is None) == (actual == (None, None, None)), name
        unconfirmed = name in expected and name.split("_", 2)[2] in ("none", "moon", "moon_word")
        assert reference.confirmed == (not unconfirmed), name
        assert reference.same_settings == (name not in ("table1_small_none", "table1_small_variational")), (
            name
        )


def test_published_standard_deviations_are_those_of_the_paper(every: dict[str, Row]) -> None:
    expected = {
        f"table1_{size}_{name}": stds
        for name, sizes in STDS.items()
        for size, stds in zip(("medium", "large"), sizes, strict=True)
    }
    for name, row in every.items():
        stds = tuple(one and one.std for one in (row.reference.valid, row.reference.test))
        assert stds == expected.get(name, (None, None)), name


def test_rows_are_evaluated_as_published(every: dict[str, Row]) -> None:
    for name, row in every.items():
        samples = (100 if "small" in name else 1000) if name.endswith("_mc") else 0
        assert row.evaluation == Evaluation(samples, 10 if name.endswith("ensemble") else 1), name


def test_what_is_published_beside_table_1_has_the_same_runs(every: dict[str, Row]) -> None:
    untied = every["table1_large_untied"].settings
    for name in ("untied_corrected", "untied_corrected_mc", "ensemble"):
        assert every[f"table1_large_{name}"].settings.identity("f") == untied.identity("f")


def test_a_row_has_no_more_than_settings_evaluation_and_reference(every: dict[str, Row]) -> None:
    """Nothing published rides in the settings of a run."""
    fields = {field.name for field in dataclasses.fields(every["table1_large_none"].settings)}
    assert "published" not in fields


def measured(run: Finished, **metrics: float | None) -> RunMetrics:
    return RunMetrics(run, metrics, [run.environment])


def cells(line: Line) -> list[str]:
    return [cell(line) for _, cell in COLUMNS]


def finished() -> Finished:
    environment = {"precision": "fp32", "device": "a CPU"}
    return Finished("a-s1", {}, [{"kind": "start", "environment": environment}], {})  # type: ignore[arg-type]


def test_differences_are_measured_less_published(every: dict[str, Row]) -> None:
    values = [measured(finished(), test=test, valid_as_published=81.0) for test in (80.0, 81.0)]
    shown = cells(Line(every["table1_medium_variational"], values))
    assert shown[:3] == ["81.8 ± 0.2", "81.00 ± 0.00", "-0.80"]
    assert shown[4:7] == ["79.7 ± 0.1", "80.50 ± 0.71", "+0.80"]
    assert cells(Line(every["table1_medium_variational"], []))[6] == "–"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("table1_small_none", ["114.5‡", "100.00", "–"]),
        ("table1_small_variational", ["87.3‡", "100.00", "–"]),
        ("table1_small_moon", ["–", "100.00", "–"]),
    ],
)
def test_a_number_of_other_settings_is_marked_and_has_no_difference(
    name: str, expected: list[str], every: dict[str, Row]
) -> None:
    assert cells(Line(every[name], [measured(finished(), test=100.0)]))[4:7] == expected


def test_an_average_is_of_as_many_seeds_as_members(every: dict[str, Row]) -> None:
    run = finished()
    members = {"members": [f"a-s{seed}/checkpoint-0002.pt" for seed in range(1, 11)]}
    one = RunMetrics(run, {"test": 69.0, "valid": 70.0}, [run.environment], members)
    assert Line(every["table1_large_ensemble"], [one]).seeds == "1–10"


def test_the_first_seeds_are_those_that_are_not_stuck() -> None:
    assert table1.first_seeds(3, []) == [1, 2, 3] and table1.first_seeds(3, [2, 9]) == [1, 3, 4]
