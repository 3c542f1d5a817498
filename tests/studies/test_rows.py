"""What makes a run one of a row."""

from dataclasses import replace

import pytest
from hydra import compose

from tests.processes import ROOT
from vdrop_cli import runs
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.choices import Size
from vdrop_cli.settings.compose import parse
from vdrop_cli.settings.train import Train
from vdrop_cli.studies import rows, table1

RECORDS = ROOT / "outputs" / "record"


@pytest.fixture(autouse=True)
def hydra(composing: None) -> None:
    pass


def test_overrides_change_settings_and_a_mistake_in_them_is_named() -> None:
    changed = rows.train_settings(("experiment=table1_small_moon",), "schedule.epochs=3 'model.name=a_b'")
    assert (changed.schedule.epochs, changed.model.name, changed.dropout.name) == (3, "a_b", "moon")
    for wrong in ("0", "nope=1", "model=nope", "log_every=x", "'", f"schedule.lr=1{'0' * 400}"):
        with pytest.raises(ConfigError, match=f"^overrides={wrong}: "):
            rows.train_settings(("experiment=table1_small_moon",), wrong)
    with pytest.raises(ConfigError, match=r"^debug must be false in overrides="):
        rows.train_settings(("experiment=table1_small_moon",), "debug=true")
    with pytest.raises(ConfigError, match=r"^log_every must be at least 1"):
        rows.train_settings(("experiment=table1_small_moon",), "log_every=0")
    with pytest.raises(ConfigError, match=r"several values are a sweep; give one; each other one needs"):
        rows.train_settings(("experiment=table1_small_moon",), "schedule.lr=1,2")


def test_a_key_leaves_out_what_does_not_make_a_run_one_of_a_row() -> None:
    def key(*overrides: str) -> str:
        config = compose("train", ["experiment=table1_small_none", *overrides])
        return rows.key(parse(config, Train).numbers())

    for same in (
        "seed=2",
        "precision=fp32",
        "device=cpu",
        "backend=reference",
        "outputs=x",
        "log_every=3",
        "data.dir=x",
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


def test_runs_of_other_texts_are_none_of_a_row() -> None:
    """The same settings with other files."""

    def key(name: str) -> str:
        files = [f"data.{part}={name}_{part}.txt" for part in ("train", "valid", "test")]
        config = compose("train", ["experiment=table1_small_none", "data=text", *files])
        return rows.key(parse(config, Train).numbers())

    assert key("a") != key("b") and key("a") == key("a")


def test_runs_of_a_file_whose_text_has_changed_are_not_averaged() -> None:
    (run,) = runs.below(RECORDS / "table1" / "medium_zaremba-bf16-nvidia_h200")
    start, *rest = run.log
    other = replace(run, log=[start | {"corpus": "another"}, *rest], config=run.config | {"seed": 2})
    row = table1.make_row(Size.medium, "zaremba", "")
    assert rows.identity(other) != rows.identity(replace(run, config=run.config | {"seed": 2}))
    lines = table1.lines_of(row, [run, other])
    assert [len(line.runs) for line in lines] == [1, 1]
    assert [line.row.labels for line in lines] == [
        (f"Zaremba et al. (text {run.corpus[:8]})",),
        ("Zaremba et al. (text another)",),
    ]
    assert [len(line.runs) for line in table1.lines_of(row, [run, replace(run)])] == [2]


def test_a_run_is_recognised_by_its_settings_and_not_by_the_experiment_that_was_chosen() -> None:
    changed = rows.train_settings(("experiment=table1_small_none", "dropout=moon"), "")
    moon = rows.train_settings(("experiment=table1_small_moon",), "")
    assert rows.key(changed.numbers()) == rows.key(moon.numbers())


def test_records_of_findings_are_no_rows() -> None:
    """They are runs of settings that tables have rows of, made again or in another way."""
    collected = [run.folder for run in rows.collect(ROOT / "outputs").all_finished]
    assert any(folder.is_relative_to(RECORDS / "ratings") for folder in collected)
    for name in rows.FINDINGS:
        assert list((RECORDS / name).rglob("result.json"))
        assert not any(folder.is_relative_to(RECORDS / name) for folder in collected)
