"""Reads and checks `log.jsonl` and `result.json` of a run folder."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import IO, Any, get_origin

from vdrop_cli import files, stored
from vdrop_cli.errors import ConfigError
from vdrop_cli.files import Damaged
from vdrop_cli.run_files import LOG, RESULT
from vdrop_cli.sinks.records import OPTIONAL, Epoch, Failure, Result, Start, Step

# By kind of record: the types of its fields, metrics and optional ones apart
FIELDS: dict[str, dict[str, Any]] = {
    kind.kind: {
        f.name: get_origin(f.type) or f.type for f in fields(kind) if f.name not in ("metrics", *OPTIONAL)
    }
    for kind in (Start, Step, Epoch, Result, Failure)
}
LINE_LIMIT = 2**20  # bytes of a record; the largest kind, a start, has some kilobytes
EPOCH_MARK = b'{"kind": "epoch"'
ADVICE = (  # for a damaged log whose checkpoints and result are whole
    "restore it; or move it away, delete result.json, and repeat the vdrop train command, which begins a new "
    "log"
)


def parse_record(line: bytes) -> dict[str, Any]:
    """Parses a line of a log. Raises Damaged if it is not a record."""
    record = stored.parse_json(line, infinite=True)
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise Damaged("it has no kind")
    older = {"step"} - record.keys() if kind == "start" else set()  # early versions wrote starts without step
    stored.require_types(record, {name: type_ for name, type_ in FIELDS[kind].items() if name not in older})
    if kind in ("epoch", "result"):
        require_warnings(record.get("warnings", []))
        for name in record.keys() - FIELDS[kind].keys() - {"kind", "chain", "warnings"}:
            if record[name] not in (None, math.inf) and not stored.is_finite(record[name]):
                raise Damaged(f"{name} must be a number")
    return record


def require_warnings(warnings: object) -> None:
    """Raises Damaged unless the warnings are a list of texts."""
    if not (isinstance(warnings, list) and all(isinstance(warning, str) for warning in warnings)):
        raise Damaged("its warnings must be a list of texts")


def chain(record: dict[str, Any], before: str) -> str:
    """Sixteen hex digits that depend on an epoch's record and, through `before`, on all epochs before it.

    `before` is the chain of the previous epoch. A changed epoch breaks the chain of every later one.
    """
    content = json.dumps({name: value for name, value in record.items() if name != "chain"}, sort_keys=True)
    return hashlib.sha256(f"{before}{content}".encode()).hexdigest()[:16]


class RecordOrder:
    """Checks that the records of a log follow each other: epochs and steps in order, none missing or
    changed.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None  # of the last record; None before the first record
        self.chain = ""  # of the last epoch
        self.step = 0  # of the last record
        self.log_every: int | None = None  # steps between two step records, if known
        self.has_step = False  # whether a step record came last; the next one then reveals `log_every`

    def __call__(self, record: dict[str, Any]) -> None:
        """Checks the next record. Raises Damaged."""
        getattr(self, f"on_{record['kind']}", lambda record: None)(record)

    def on_start(self, record: dict[str, Any]) -> None:
        step = record.get("step", self.step)
        if self.epoch is None:
            self.step = step
        elif record["epoch"] != self.epoch:
            raise Damaged(f"it resumes after epoch {record['epoch']}, but follows epoch {self.epoch}")
        self.require_steps_until(step)
        self.epoch = record["epoch"]
        self.step = step
        self.has_step = False
        log_every = record["config"].get("log_every")
        self.log_every = log_every if isinstance(log_every, int) and log_every >= 1 else None

    def on_step(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if self.log_every is None and self.has_step:
            self.log_every = max(1, step - self.step)
        if self.log_every is not None and step != (self.step // self.log_every + 1) * self.log_every:
            raise Damaged(f"step {step} follows step {self.step}")
        if step <= self.step:
            raise Damaged(f"step {step} follows step {self.step}")
        self.step, self.has_step = step, True

    def on_epoch(self, record: dict[str, Any]) -> None:
        epoch = record["epoch"]
        if epoch != (self.epoch or 0) + 1:
            raise Damaged(f"epoch {epoch} follows epoch {self.epoch or 0}")
        self.require_steps_until(record["step"])
        recorded = record.get("chain")
        if recorded != chain(record, self.chain) and (recorded is not None or self.chain):
            raise Damaged(f"epoch {epoch}, or one before it, was changed")
        self.epoch, self.chain = epoch, recorded or ""

    def require_steps_until(self, step: int) -> None:
        """Raises Damaged if a step record before or at `step` is missing."""
        if step < self.step:
            raise Damaged(f"step {step} follows step {self.step}")
        if self.log_every is not None and step // self.log_every > self.step // self.log_every:
            raise Damaged(f"steps after step {self.step} are missing")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; none if it is missing. An unfinished last line is left out.

    Raises ConfigError.
    """
    with files.reading(path, ADVICE), suppress(FileNotFoundError), files.open_regular(path) as file:
        return list(read_records(file))
    return []


def require_unfinished_log(folder: Path) -> None:
    """Raises ConfigError if a run from the start would replace the log of a finished one in its folder."""
    path = folder / LOG
    try:
        is_finished = any(record["kind"] == "result" for record in read_log(path))
    except ConfigError:  # it cannot be read
        return
    if is_finished:
        raise ConfigError(
            f"{path} is of a finished run whose checkpoints are gone, and training from the start would "
            f"replace it; put them or {RESULT} back, move it away, or start over with force=true"
        )


def read_records(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The records of an open log. Raises Damaged."""
    check_order = RecordOrder()
    for number, line in enumerate(complete_lines(file), 1):
        try:
            record = parse_record(line)
        except Damaged as damage:
            raise Damaged(f"line {number} is not a log record: {damage}") from None
        check_order(record)
        if record["kind"] == "epoch" and "train_ppl" in record:  # the name in versions until November 2026
            record["train_ppl_dropout"] = record.pop("train_ppl")
        yield record


def complete_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines from the current position; an unfinished last one is left out. Raises Damaged at a line that
    is too long.
    """
    while (line := file.readline(LINE_LIMIT)).endswith(b"\n"):
        yield line
    if len(line) == LINE_LIMIT:
        raise Damaged(f"it has a line of more than {LINE_LIMIT:,} bytes")


def lines_from_end(file: IO[bytes], block: int = 2**16) -> Iterator[tuple[int, bytes]]:
    """Lines with their positions, the last line first; it reads no more of the file than is consumed."""
    position, rest = file.seek(0, os.SEEK_END), b""
    while position > 0:
        size = min(block, position)
        position -= size
        file.seek(position)
        rest = file.read(size) + rest
        if len(rest) > LINE_LIMIT + block:
            raise Damaged(f"it has a line of more than {LINE_LIMIT:,} bytes")
        first = 0 if position == 0 else rest.find(b"\n") + 1  # the part before may be the end of a line
        if position > 0 and first == 0:
            continue
        end = len(rest)
        while end > first:
            begin = max(rest.rfind(b"\n", first, end - 1) + 1, first)
            yield position + begin, rest[begin:end]
            end = begin
        rest = rest[:first]


def read_result(folder: Path) -> dict[str, Any]:
    """The result of a finished run. Raises ConfigError."""
    path = folder / RESULT
    advice = "delete it and repeat the vdrop train command, which computes it again from the last checkpoint"
    with files.reading(path, advice):
        result = stored.read_json(path)
        require_warnings(result.get("warnings", []))
        stored.require_types(result, dict.fromkeys(result.keys() - {"warnings"}, float) | FIELDS["result"])
        if not 1 <= result["epoch"] <= result["epochs"]:
            raise Damaged(f"epoch {result['epoch']} of {result['epochs']}")
    return result


def find_end(file: IO[bytes], epochs: int, step: int) -> tuple[int, str]:
    """Where the log of a run that resumes after `epochs` and `step` must end, and the chain at that point.

    It reads only the lines since the last epoch but one. Raises Damaged if the log is not what the run wrote
    until then.
    """
    check_order = RecordOrder()
    position = 0
    last_epoch = None
    for begin, line in lines_from_end(file):
        if line.startswith(EPOCH_MARK) and line.endswith(b"\n"):
            record = parse_record(line)
            if last_epoch is not None:
                check_order.epoch = record["epoch"]
                check_order.step = record["step"]
                check_order.chain = record.get("chain", "")
                position = begin + len(line)
                break
            if record["epoch"] <= epochs:
                last_epoch = record["epoch"]
    file.seek(position)
    end, is_first = position, position == 0
    for line in complete_lines(file):
        record = parse_record(line)
        if is_first and record["kind"] != "start":
            raise Damaged("its beginning is missing")
        # A start at this very place is written again. The one that a log begins with stays: the run resumed
        # here after an earlier log was lost, and without this start the log would be empty.
        last_start = step if is_first else step - 1
        is_first = False
        limit = {"start": last_start, "step": step, "epoch": epochs}.get(record["kind"], -1)
        if record.get("epoch" if record["kind"] == "epoch" else "step", 0) > limit:
            break
        check_order(record)
        end += len(line)
    if check_order.epoch != epochs:
        raise Damaged(
            "it is empty"
            if check_order.epoch is None
            else f"its last epoch is {check_order.epoch}, that of the checkpoint is {epochs}"
        )
    check_order.require_steps_until(step)
    return end, check_order.chain


def log_until(path: Path, epochs: int, step: int) -> bytes | None:
    """The part of a log that a run resuming after `epochs` and `step` continues; None if the log is missing.

    Raises Damaged if it is not what the run wrote until then; ConfigError if it cannot be read.
    """
    try:
        with files.open_regular(path) as file:
            end, _ = find_end(file, epochs, step)
            file.seek(0)
            content = file.read(end)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise files.read_error(path, error) from None
    for _ in read_records(BytesIO(content)):
        pass
    return content
