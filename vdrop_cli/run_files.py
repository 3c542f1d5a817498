"""Names of the files in a run folder."""

import re

CONFIG = "config.yaml"
LOG = "log.jsonl"
RESULT = "result.json"
STUCK = "stuck.json"
SHARED_DEVICE = "shared_device.txt"  # its existence says that other runs shared the device
PROGRESS = r"\d{4,}(?:-\d{5,})?"  # finished epochs, and finished batches of the next one
CHECKPOINT_PATTERN = rf"checkpoint-{PROGRESS}\.pt"
EVALUATION_PREFIX_PATTERN = rf"eval-{PROGRESS}-"


def checkpoint_name(epoch: int, batch: int = 0) -> str:
    """Returns the name of a checkpoint after so many epochs and so many batches of the next one.

    `checkpoint-0003.pt` is of the end of the third epoch, `checkpoint-0003-00812.pt` of 812 batches later.
    """
    return f"checkpoint-{epoch:04}{f'-{batch:05}' if batch else ''}.pt"


def parse_checkpoint(name: str) -> tuple[int, int] | None:
    """Returns the epochs and the batches in the name of a checkpoint, None for any other name."""
    if re.fullmatch(CHECKPOINT_PATTERN, name, re.ASCII) is None:
        return None
    epoch, _, batch = name.removeprefix("checkpoint-").removesuffix(".pt").partition("-")
    return int(epoch), int(batch or 0)
