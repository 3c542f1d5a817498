"""TensorBoard events of a run, in its own folder."""

import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vdrop_cli import files
from vdrop_cli.files import Damaged
from vdrop_cli.settings.fields import flatten
from vdrop_cli.settings.train import NOT_IN_IDENTITY
from vdrop_cli.sinks.records import (
    TAGS,
    Epoch,
    LossMetrics,
    Record,
    Result,
    Saving,
    Step,
    position_of,
    tagged_scalars,
)

NO_HPARAMS = (*NOT_IN_IDENTITY, "debug")


class TensorBoard:
    """Scalars of every `log_every`-th step and of every epoch, and the settings beside the final metrics.

    A run that resumes after `epochs` and `step` discards what earlier event files have of later ones.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        log_every: int,
        epochs: int,
        step: int,
        loss_metrics: LossMetrics,
    ) -> None:
        self.folder, self.config = folder, config
        self.log_every = log_every
        self.epochs = epochs
        self.step = step
        self.loss_metrics = loss_metrics

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter

        self.hook, threading.excepthook = threading.excepthook, self.ignore_disk_errors
        try:
            self.discard_later_events()
            self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        except OSError as error:
            raise files.file_error(self.folder, error) from None
        return self

    def discard_later_events(self) -> None:
        """Removes later events from earlier event files.

        TensorBoard's `purge_step` does not remove all of them: it counts steps, so the scalars of epochs
        stay.
        """
        for path in self.folder.glob("events.out.tfevents.*"):
            with suppress(Damaged):  # it is not a file
                content = files.read(path)
                earlier = events_until(content, self.epochs, self.step)
                if earlier != content:
                    files.replace(path, earlier)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.writer.close()
        except OSError as failure:
            if kind is None:  # else the first error is the one to report
                raise files.file_error(self.folder, failure) from None
        finally:
            threading.excepthook = self.hook

    def ignore_disk_errors(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread; the thread's disk errors are raised again at the next record."""
        if not isinstance(failure.exc_value, OSError):
            self.hook(failure)

    def __call__(self, record: Record) -> None:
        try:
            self.write(record)
        except OSError as error:
            raise files.file_error(self.folder, error) from None

    def write(self, record: Record) -> None:
        if isinstance(record, Step) and record.step % self.log_every != 0:
            return
        if isinstance(record, Step | Epoch | Result):
            for tag, value in tagged_scalars(record, self.loss_metrics).items():
                self.writer.add_scalar(tag, value, position_of(record))
        if isinstance(record, Saving):
            self.writer.flush()
        if isinstance(record, Result):
            self.write_hparams()

    def write_hparams(self) -> None:
        """Writes the settings for the hparams page, under the short name of the run.

        torch's summary of the whole experiment is left out. With it, TensorBoard would take the columns from
        one run; without it, TensorBoard takes them from all runs and puts the settings that differ first.
        """
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        _, start, end = hparams(hparams_of(self.config), {})  # type: ignore[no-untyped-call]
        plugin_data = start.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin_data.content)
        content.session_start_info.group_name = self.folder.name
        plugin_data.content = content.SerializeToString()
        for summary in (start, end):
            self.writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]


def hparams_of(config: dict[str, Any]) -> dict[str, Any]:
    """The settings on the hparams page. TensorBoard sorts them by name, capitals before small letters."""
    settings = flatten(config)
    values = {"Dropout": settings.pop("dropout.name", None), "Seed": settings.pop("seed", None)}
    values |= {name: value for name, value in settings.items() if name.split(".")[0] not in NO_HPARAMS}
    return {name: value for name, value in values.items() if value is not None}


def events_until(content: bytes, epochs: int, step: int) -> bytes:
    """The TensorBoard events up to `epochs` and `step`, without the result and the settings.

    An event is stored as its length in 8 bytes, a checksum in 4, the event, and a checksum in 4. All events
    from the first damaged one on are left out.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    records, begin = list[bytes](), 0
    while (end := begin + 16 + int.from_bytes(content[begin : begin + 8], "little")) <= len(content):
        try:
            event = Event.FromString(content[begin + 12 : end - 4])
        except DecodeError:
            break
        limits = {TAGS["step"]: step, TAGS["epoch"]: epochs}
        groups = {f"{value.tag.partition('/')[0]}/" for value in event.summary.value}
        if all(event.step <= limits.get(group, -1) for group in groups or {TAGS["step"]}):
            records.append(content[begin:end])
        begin = end
    return b"".join(records)
