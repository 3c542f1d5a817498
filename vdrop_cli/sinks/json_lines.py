"""Writes records to `log.jsonl`."""

import json
import math
import mmap
import os
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Self

from vdrop_cli import files
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.files import Damaged
from vdrop_cli.run_files import LOG
from vdrop_cli.sinks.log_reader import chain, find_end
from vdrop_cli.sinks.records import Epoch, Evaluating, Record, Result, Saving, Step, to_dict


class JsonLines:
    """`log.jsonl`: a line per record, and of the steps every `log_every`-th. A run that resumes after
    `epochs` and `step` appends to it.
    """

    def __init__(self, folder: Path, log_every: int, epochs: int, step: int) -> None:
        self.path = folder / LOG
        self.log_every = log_every
        self.chain = ""
        if step > 0:
            self.resume(epochs, step)
        else:
            files.replace(self.path, b"")

    def resume(self, epochs: int, step: int) -> None:
        """Removes the records after the checkpoint, which the run writes again. Raises ConfigError if the log
        is damaged.
        """
        try:
            with files.open_regular(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_APPEND, "ab+") as file:
                end, self.chain = find_end(file, epochs, step)
                file.truncate(end)
        except FileNotFoundError:
            print(
                f"vdrop: {self.path} is missing; a new log begins after epoch {epochs}, step {step}",
                file=sys.stderr,
            )
            files.replace(self.path, b"")
        except OSError as error:
            raise files.file_error(self.path, error) from None
        except Damaged as damage:
            raise ConfigError(
                f"{self.path} is not the log of this run up to its checkpoint ({damage}); restore it, or "
                "move it away: the run then resumes with a new log"
            ) from None

    def __enter__(self) -> Self:
        self.open()
        return self

    def open(self) -> None:
        try:
            self.file = files.open_regular(
                self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_APPEND, "ab+"
            )
        except OSError as error:
            raise files.file_error(self.path, error) from None
        except Damaged as damage:
            raise RunError(f"{self.path} cannot be written ({damage}); move it away") from None
        self.size = self.file.seek(0, os.SEEK_END)

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # every write has been flushed, so its error was raised there
            self.file.close()

    def __call__(self, record: Record) -> None:
        if isinstance(record, Evaluating):
            return
        if isinstance(record, Step) and record.step % self.log_every != 0:
            return
        try:
            if isinstance(record, Saving | Result):
                self.restore()
            if isinstance(record, Saving):
                os.fsync(self.file.fileno())
            else:
                line = json.dumps(self.encode(record)).encode() + b"\n"
                self.file.write(line)
                self.file.flush()
                self.size += len(line)
        except OSError as error:
            raise files.file_error(self.path, error) from None

    def encode(self, record: Record) -> dict[str, Any]:
        """A record as JSON values: null for an infinite metric, which JSON lacks; an epoch with its chain."""
        metrics = record.metrics if isinstance(record, Epoch | Result) else {}
        values = {"kind": record.kind, **to_dict(record)}
        values |= {name: None for name, value in metrics.items() if not math.isfinite(value)}
        if isinstance(record, Epoch):
            self.chain = values["chain"] = chain(values, self.chain)
        return values

    def restore(self) -> None:
        """Writes the whole log again if somebody removed or replaced it during the run.

        The file that is still open has the content. Another file that now has the name of the log is renamed,
        not overwritten.
        """
        size = os.fstat(self.file.fileno()).st_size
        if files.is_in_place(self.path, self.file.fileno()):
            if size != self.size:
                print(
                    f"vdrop: {self.path} was changed during the run; the removed part is lost",
                    file=sys.stderr,
                )
                self.size = size
            return
        event = "removed"
        if os.path.lexists(self.path):
            names = (self.path.with_name(f"{self.path.name}.replaced-{number}") for number in count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            self.path.rename(aside)
            event = f"replaced (the other file is now {aside.name})"
        content = mmap.mmap(self.file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        files.replace(self.path, memoryview(content))
        print(f"vdrop: {self.path} was {event} during the run; it is restored", file=sys.stderr)
        self.file.close()
        self.open()
