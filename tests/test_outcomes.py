"""Outcomes of jobs as files."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from vdrop_cli import outcomes
from vdrop_cli.errors import ConfigError
from vdrop_cli.files import Damaged
from vdrop_cli.outcomes import Outcome


def test_an_outcome_is_read_as_it_was_written(tmp_path: Path) -> None:
    outcome = Outcome(["seed=1"], "failed", 1, "why", True, "../../train/a-s1")
    path = outcomes.path_of(tmp_path, 3)
    assert outcomes.read(path).status == "not begun"
    outcomes.write(outcome, path)
    assert outcomes.read(path) == outcome and outcomes.paths(tmp_path) == [path]
    outcomes.write([outcome, outcome], tmp_path / outcomes.SUMMARY)
    assert outcomes.read_all(tmp_path) == [outcome, outcome] and outcomes.paths(tmp_path) == [path]


def test_what_is_not_an_outcome_is_refused() -> None:
    values = asdict(Outcome(["seed=1"], "skipped"))
    assert outcomes.parse(json.dumps(values).encode()).is_done
    without_folder = {name: value for name, value in values.items() if name != "folder"}
    for wrong in (
        values | {"mine": 1},
        values | {"folder": 1},
        values | {"overrides": [1]},
        [values],
        without_folder,
    ):
        with pytest.raises(Damaged):
            outcomes.parse(json.dumps(wrong).encode())


def test_until_there_is_a_summary_the_outcomes_are_those_of_the_jobs(tmp_path: Path) -> None:
    ended = [Outcome([f"seed={seed}"], "done") for seed in range(11)]
    for number, outcome in enumerate(ended):
        outcomes.write(outcome, outcomes.path_of(tmp_path, number))
    assert outcomes.read_all(tmp_path) == ended, "in the order of their numbers"
    (tmp_path / outcomes.SUMMARY).mkdir()
    with pytest.raises(ConfigError, match=r"summary\.json"):
        outcomes.read_all(tmp_path)


def test_a_run_folder_is_relative_to_the_folder_of_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = Outcome(["seed=1"], folder="../../train/a/b-s1")
    monkeypatch.chdir(tmp_path)
    assert outcomes.run_folder(Path("outputs/sweeps/1"), outcome) == Path("outputs/train/a/b-s1")
    monkeypatch.chdir("/")
    folder = outcomes.run_folder(tmp_path / "outputs/sweeps/1", outcome)
    assert folder.resolve() == tmp_path / "outputs/train/a/b-s1"
