"""Commands that make what a plan lacks, each a process of its own."""

from pathlib import Path

import pytest

from tests.conftest import TINY, settings
from tests.studies.test_plan import row_of
from vdrop_cli.settings.choices import Precision
from vdrop_cli.settings.commands import Reproduce
from vdrop_cli.sinks import read_log
from vdrop_cli.studies.plan import RunFactory
from vdrop_cli.studies.processes import Commands


def test_a_mistake_of_a_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Within `vdrop reproduce` Hydra's variable for tracebacks is set."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    Commands(Reproduce()).vdrop("train", "model=nope")
    _, line, message = capfd.readouterr().err.splitlines()
    assert line == "vdrop train model=nope" and message.startswith("vdrop: model=nope is an unknown choice")


@pytest.mark.usefixtures("forked_commands")
def test_when_the_time_is_up_what_runs_is_stopped_and_saved_and_nothing_else_begins(
    tmp_path: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A process, which has minutes of training before it."""
    config = settings(*TINY, *text, f"outputs={tmp_path}", "schedule.epochs=100000")
    arguments = [change for change in (*TINY, *text) if not change.startswith("schedule.epochs")]
    commands = Commands(Reproduce(until="5s"))
    commands.vdrop("train", *arguments, f"outputs={tmp_path}", "schedule.epochs=100000")
    assert commands.time_is_up and "until=5s has passed; stopping what runs" in capsys.readouterr().err
    factory = RunFactory(Reproduce(precision=Precision.fp32, outputs=str(tmp_path)))
    training = factory.training(row_of(config), config.seed)
    log = read_log(training.folder / "log.jsonl")
    last = max((record["epoch"] for record in log if record["kind"] == "epoch"), default=0)
    # the stop may come after an epoch's last step and before its validation: last + 1
    assert last <= training.epochs_done <= last + 1 and training.epochs_done > 0 and not training.is_finished
    commands.vdrop("train", *arguments, "outputs=nothing-begins")
    assert capsys.readouterr().err == ""
