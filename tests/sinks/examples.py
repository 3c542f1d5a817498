"""Records of a small run, and its log."""

from dataclasses import replace
from pathlib import Path

from vdrop_cli.perplexity import ppl
from vdrop_cli.sinks.json_lines import JsonLines
from vdrop_cli.sinks.records import Epoch, Result, Start, Step


def step(number: int) -> Step:
    return Step(epoch=1, step=number, loss=2.0, grad_norm=3.0, lr=1.0, words_per_second=1000.0)


def loss_metrics(loss: float) -> dict[str, float]:
    return {"train_ppl_dropout": ppl(loss)}


EPOCH = Epoch(1, 6, 2.0, {"valid_ppl_batched": 99.0, "train_ppl_dropout": 7.4}, 1.0, 1000.0, 61.0)


RESULT = Result(1, 1, {"train_ppl": 5.0, "test_ppl": 9.0}, 61.0)


def write_log(folder: Path, every: int = 1) -> Path:
    """The log of a run of three epochs of six steps, stopped after step 15 and resumed from there, up to the
    third epoch's end.
    """
    start = Start({"log_every": every}, "f", 0, 0, {})
    with JsonLines(folder, every, 0, 0) as sink:
        for record in (
            start,
            *map(step, range(1, 7)),
            EPOCH,
            *map(step, range(7, 13)),
            replace(EPOCH, epoch=2, step=12),
        ):
            sink(record)
        for record in map(step, range(13, 16)):
            sink(record)
    with JsonLines(folder, every, 2, 15) as sink:
        for record in (
            replace(start, epoch=2, step=15),
            *map(step, range(16, 19)),
            replace(EPOCH, epoch=3, step=18),
        ):
            sink(record)
    return folder / "log.jsonl"
