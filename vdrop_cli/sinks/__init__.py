"""Records of a training run, and the sinks that receive them: a JSON log, loggers and the terminal."""

from vdrop_cli.sinks.json_lines import JsonLines
from vdrop_cli.sinks.log_reader import ADVICE, log_until, read_log, read_result, require_unfinished_log
from vdrop_cli.sinks.loggers import PACKAGES, Logger, require_installed
from vdrop_cli.sinks.records import (
    Epoch,
    Evaluating,
    Failure,
    Record,
    Result,
    Saving,
    Sink,
    Start,
    Step,
    to_dict,
)
from vdrop_cli.sinks.tensorboard import TensorBoard, events_until
from vdrop_cli.sinks.terminal import Progress, phase, progress_bar, time_in_words

__all__ = [
    "ADVICE",
    "PACKAGES",
    "Epoch",
    "Evaluating",
    "Failure",
    "JsonLines",
    "Logger",
    "Progress",
    "Record",
    "Result",
    "Saving",
    "Sink",
    "Start",
    "Step",
    "TensorBoard",
    "events_until",
    "log_until",
    "phase",
    "progress_bar",
    "read_log",
    "read_result",
    "require_installed",
    "require_unfinished_log",
    "time_in_words",
    "to_dict",
]
