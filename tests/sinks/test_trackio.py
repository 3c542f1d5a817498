"""A run at Trackio, in a folder of this machine."""

from pathlib import Path

import pytest

from tests.sinks.logged import config, logged, timeless, train_twice
from vdrop_cli.sinks.records import TAGS

trackio = pytest.importorskip("trackio")


def test_a_local_run_has_the_numbers_of_the_log_once(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trackio import sqlite_storage, utils

    monkeypatch.chdir(tmp_path)
    for module in (utils, sqlite_storage):  # they read TRACKIO_DIR when they are imported
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = train_twice("trackio", text, monkeypatch)
    (run,) = trackio.Api().runs("mine")
    assert run.name == f"{folder.parent.name}-{folder.name}"
    assert {key: run.config[key] for key in config(folder)} == config(folder)
    rows = sqlite_storage.SQLiteStorage.get_logs("mine", run.name, run_id=run.id)
    for kind in ("step", "epoch", "result"):
        entries = [row for row in rows if any(name.startswith(TAGS[kind]) for name in row)]
        assert [row["step"] for row in entries] == list(logged(folder, kind)), "each once"
        for row in entries:
            numbers = {name: value for name, value in row.items() if name not in ("step", "timestamp")}
            assert timeless(numbers) == pytest.approx(logged(folder, kind)[row["step"]])
    assert "rackio" not in capsys.readouterr().out, "standard output is the result"
