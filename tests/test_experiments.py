"""Rows of Table 1, and what makes a run one of them."""

import pytest
from hydra import compose

from vdrop_cli import CONF, experiments
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.choices import TABLE_1, Size
from vdrop_cli.settings.compose import parse
from vdrop_cli.settings.train import Train


@pytest.fixture(autouse=True)
def hydra(composing: None) -> None:
    pass


def test_all_rows_are_there_in_the_papers_order() -> None:
    rows = experiments.rows(TABLE_1, None, "")
    by_size = {size: [row.name for row in rows if row.size is size] for size in Size}
    assert by_size[Size.small] == by_size[Size.medium] == list(experiments.ORDER)
    assert by_size[Size.large] == [*experiments.ORDER, "ensemble", "untied_corrected", "untied_corrected_mc"]
    assert all(row.published.row for row in rows)
    assert {row.experiment for row in rows} == {path.stem for path in CONF.glob("experiment/table1_*.yaml")}


def test_rows_can_be_chosen_and_changed_and_a_wrong_name_is_told() -> None:
    (row,) = experiments.rows([Size.small], ["moon"], "schedule.epochs=3 'model.name=a_b'")
    assert (row.settings.schedule.epochs, row.settings.model.name, row.settings.dropout.name) == (
        3,
        "a_b",
        "moon",
    )
    with pytest.raises(ConfigError, match="rows: mon is not a row; did you mean moon"):
        experiments.rows([Size.small], ["mon"], "")
    for wrong in ("0", "nope=1", "model=nope", "seed=x", "'", f"schedule.lr=1{'0' * 400}"):
        with pytest.raises(ConfigError, match=f"^overrides={wrong}: "):
            experiments.rows([Size.small], ["moon"], wrong)
    with pytest.raises(ConfigError, match=r"^seed must be in"):
        experiments.rows([Size.small], ["moon"], "seed=-1")
    with pytest.raises(ConfigError, match="rows: ensemble is not a row of these sizes, it is of large"):
        experiments.rows([Size.small], ["ensemble"], "")


def test_an_mc_row_is_of_the_runs_of_the_row_above_and_of_no_other() -> None:
    keys = {row.experiment: row.key for row in experiments.rows(TABLE_1, None, "")}
    for size in TABLE_1:
        assert (
            keys[f"table1_{size}_variational"]
            == keys[f"table1_{size}_variational_mc"]
            != keys[f"table1_{size}_untied"]
        )
    assert len(set(keys.values())) == 18, "six runs a size"


def test_what_does_not_make_the_row_is_no_matter_and_what_does_is() -> None:
    def key(*overrides: str) -> str:
        return experiments.key(
            parse(compose("train", ["experiment=table1_small_none", *overrides]), Train).numbers()
        )

    for same in (
        "seed=2",
        "precision=fp32",
        "device=cpu",
        "backend=reference",
        "outputs=x",
        "log_every=3",
        "data.dir=x",
        "published=null",
    ):
        assert key(same) == key()
    for other in (
        "schedule.epochs=3",
        "model.hidden_size=3",
        "data=pydoc",
        "schedule.patience=4",
        "task.bptt=3",
    ):
        assert key(other) != key()
