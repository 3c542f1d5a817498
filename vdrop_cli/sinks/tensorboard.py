"""TensorBoard events of a run, in its own folder."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vdrop_cli import files
from vdrop_cli.sinks.records import Epoch, LossMetrics, Record, Result, Saving, Step, flatten, to_dict


class TensorBoard:
    """Scalars of every `log_every`-th step and of every epoch, and the settings beside the final metrics.

    A run that resumes after `step` discards the later steps of earlier event files.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], log_every: int, step: int, loss_metrics: LossMetrics
    ) -> None:
        self.folder, self.config = folder, config
        self.log_every, self.step, self.loss_metrics = log_every, step, loss_metrics

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter

        self.hook, threading.excepthook = threading.excepthook, self.ignore_disk_errors
        try:
            self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        except OSError as error:
            raise files.file_error(self.folder, error) from None
        return self

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
        if isinstance(record, Step | Epoch):
            values = to_dict(record) | (self.loss_metrics(record.loss) if isinstance(record, Step) else {})
            for name, value in values.items():
                if name not in ("epoch", "step"):
                    self.writer.add_scalar(f"{record.kind}/{name}", value, record.step)
        if isinstance(record, Saving):
            self.writer.flush()
        if isinstance(record, Result):
            from torch.utils.tensorboard.summary import hparams

            metrics = {
                f"result/{name}": value for name, value in to_dict(record).items() if isinstance(value, float)
            }
            for summary in hparams(flatten(self.config), metrics):  # type: ignore[no-untyped-call]
                self.writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, record.epoch)


def events_until(content: bytes, step: int) -> bytes:
    """The TensorBoard events of steps and epochs up to `step`, without the result and the settings.

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
        if event.step <= step and all(
            value.tag.startswith((f"{Step.kind}/", f"{Epoch.kind}/")) for value in event.summary.value
        ):
            records.append(content[begin:end])
        begin = end
    return b"".join(records)
