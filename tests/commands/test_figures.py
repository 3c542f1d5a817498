"""`vdrop figures`: a real campaign of small runs, planned, made, told, and made only once."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import TINY_SENTIMENT, Vdrop, settings
from vdrop_cli import ratings
from vdrop_cli.commands import campaign
from vdrop_cli.commands.figures import on_page, told
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.lock import Lock
from vdrop_cli.policies import Cell
from vdrop_cli.ratings import Line
from vdrop_cli.runs import Finished
from vdrop_cli.settings.choices import SplitProtocol
from vdrop_cli.settings.commands import Figures
from vdrop_cli.settings.fields import plain

FEW = ["cells=[lstm]", "dropouts=[none,variational]", "epochs=2", "mc_samples=2", "precision=fp32"]


@pytest.fixture
def changes(rated: list[str]) -> str:
    left_out = ("task=", "task.protocol", "schedule.epochs", "device", "precision")
    kept = [change for change in TINY_SENTIMENT if not change.startswith(left_out)]
    return f"overrides='{' '.join([*kept, *rated])}'"


@pytest.mark.usefixtures("no_shipped_records")
def test_it_is_planned_made_drawn_and_told(changes: str, vdrop: Vdrop, tmp_path: Path) -> None:
    planned = vdrop("figures", *FEW, changes, "plan=true", "file=nowhere/R.md")
    assert planned.returncode == 0, planned.stderr
    assert (
        "clean lstm variational seed 1: " in planned.stderr
        and planned.stderr.count("(0 of 2 epochs are done)") == 4
    )
    assert not list(tmp_path.rglob("result.json"))

    ran = vdrop("figures", *FEW, changes)
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "outputs" / "RESULTS.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| LSTM | ")]
    assert len(rows) == 4 and not any("not yet run" in row for row in rows)
    for name in ("paper", "clean"):
        assert f"(record/pictures/ratings_{name}_lstm.png)" in page
        assert (tmp_path / f"outputs/record/pictures/ratings_{name}_lstm.png").exists()
    again = vdrop("figures", *FEW, changes)
    assert (
        again.returncode == 0
        and again.stderr.count(": finished") == 4 + 2
        and "vdrop train" not in again.stderr
    )


@pytest.mark.usefixtures("no_shipped_records")
def test_what_could_not_be_made_is_an_error(changes: str, vdrop: Vdrop, tmp_path: Path) -> None:
    """Another process is at work on the run."""
    one = [*FEW, "protocols=[clean]", "dropouts=[none]", changes]
    assert vdrop("figures", *one).returncode == 0
    (result,) = tmp_path.rglob("result.json")
    result.unlink()
    (
        tmp_path / "outputs" / "RESULTS.md"
    ).unlink()  # a page with its numbers would not be replaced by one without
    with Lock(result.parent / "lock", "it"):
        ran = vdrop("figures", *one)
    assert (
        ran.returncode == 1 and "is not finished; the same command resumes" in ran.stderr.splitlines()[-1]
    ), ran.stderr
    assert "not yet run" in (tmp_path / "outputs" / "RESULTS.md").read_text()


def test_a_page_of_few_runs_has_the_others_too_unless_they_are_of_other_settings() -> None:
    few = Figures([SplitProtocol.clean], [Cell.gru], ["variational_untied"], epochs=9)
    whole = on_page(few)
    assert (whole.protocols, whole.cells, whole.epochs) == (list(SplitProtocol), list(Cell), 9)
    assert whole.dropouts == ["none", "naive", "variational"], "others are there where there are runs of them"
    assert on_page(own := replace(few, overrides="schedule.lr=0.1")) is own


@pytest.mark.usefixtures("composing")
def test_a_run_that_is_finished_and_not_in_its_table_is_an_error() -> None:
    few = Figures([SplitProtocol.clean], [Cell.gru], ["none", "naive"], epochs=9)
    none, naive = ratings.rows(few)

    def line(row: ratings.Row, *seeds: int, epochs: int = 9) -> Line:
        schedule = replace(row.settings.schedule, epochs=epochs)
        made = [plain(replace(row.settings, seed=seed, schedule=schedule)) for seed in seeds]
        return Line(row, [Finished(Path(), config, [], {}) for config in made], [])

    wanted = [(row.name, seed) for row in (none, naive) for seed in (1, 2)]
    campaign.require_on_page(
        wanted, told([line(none, 1, 2), line(naive, 1, epochs=60), line(naive, 1, 2)], 9)
    )
    for lines, lacking in (
        ([line(none, 1, 2), line(naive, 1)], "clean gru naive seed 2"),
        ([line(none, 1, 2, epochs=60), line(naive, 1, 2)], "clean gru none seed 1"),
        ([line(none), line(naive, 1, 2)], "clean gru none seed 1"),
    ):
        with pytest.raises(RunError, match=f"{lacking} is finished, but not in the table"):
            campaign.require_on_page(wanted, told(lines, 9))


def test_the_settings_are_those_of_the_command_line() -> None:
    parsed = settings("protocols=[clean]", "cells=[gru]", "seeds=3", "epochs=9", command="figures")
    assert parsed == Figures([SplitProtocol.clean], [Cell.gru], seeds=3, epochs=9)
    for wrong in ("seeds=0", "epochs=0", "mc_samples=0", "cells=[]", "protocols=[]", "dropouts=[none,none]"):
        with pytest.raises(ConfigError, match=f"^{wrong.split('=')[0]} must be"):
            settings(wrong, command="figures")
