"""A run at Weights & Biases, in its offline mode."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sinks.logged import config, logged, timeless, train_twice
from vdrop_cli.errors import ConfigError

wandb = pytest.importorskip("wandb")

BLOCK, HEADER = 2**15, 7  # bytes of a block of wandb's file, and of the header of each piece in it


def messages(path: Path) -> Iterator[Any]:
    """The messages of an offline run. A piece in the file has a checksum, its length and its kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, message = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:  # too little for a header: the rest of the block is empty
            position += BLOCK - position % BLOCK
            continue
        size = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]  # 1: a whole message; 2, 3, 4: its first, middle and last piece
        message += content[position + HEADER : position + HEADER + size]
        if kind in (1, 4):
            yield Record.FromString(message)
            message = b""
        position += HEADER + size


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_an_offline_run_has_the_numbers_of_the_log(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In offline mode wandb does not know what the run recorded before, so each command
    is a run of its own.
    """
    monkeypatch.chdir(tmp_path)
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    folder = train_twice("wandb", text, monkeypatch, "run_name=shallow")
    first, second = sorted(
        tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns
    )
    history, summary = dict[tuple[str, int], dict[str, float]](), dict[str, Any]()
    for path in (first, second):
        records = list(messages(path))
        (run,) = (record.run for record in records if record.HasField("run"))
        assert run.run_id == folder.name and run.display_name == "shallow" and set(run.tags) == {"a", "b"}
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert {key: settings[key] for key in config(folder)} == config(folder)
        for record in records:
            if record.HasField("history"):
                row = {name: value for name, value in values(record.history.item).items() if name[0] != "_"}
                kind = "step" if "step" in row else "epoch"
                position = row.pop(kind)
                history[kind, position] = timeless(row)
            if record.HasField("summary"):
                summary |= values(record.summary.update)
        codes = [record.exit.exit_code for record in records if record.HasField("exit")]
        assert codes == [1 if path == first else 0]
    for kind in ("step", "epoch"):
        assert {position: row for (other, position), row in history.items() if other == kind} == logged(
            folder, kind
        )
    (result,) = logged(folder, "result").values()
    assert {name: summary[name] for name in result} == result


def test_a_time_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vdrop_cli.sinks.wandb import finish_seconds

    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "5m")
    with pytest.raises(ConfigError, match=r"^WANDB_FINISH_TIMEOUT must be seconds, got 5m; correct or unset"):
        finish_seconds()
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "7.5")
    assert finish_seconds() == 7.5
