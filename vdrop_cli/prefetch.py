"""Draws the masks of the next batches in threads, while the current batch is trained on."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from vdrop_cli.dropout import ModelMasks
from vdrop_cli.kernels import with_index
from vdrop_cli.policies import Dropout

Batch = TypeVar("Batch")
MAX_THREADS = 4


def is_worthwhile(dropout: Dropout, device: torch.device) -> bool:
    """Whether threads save time: where drawing takes long and the processor is otherwise idle.

    On the CPU they would take cores from the matrix products.
    """
    return device.type == "cuda" and (dropout.new_every_step or dropout.p_weight > 0)


def with_masks(
    batches: Iterable[Batch], draw: Callable[[Batch], ModelMasks], dropout: Dropout, device: torch.device
) -> Iterator[tuple[Batch, ModelMasks]]:
    """Yields each batch with its masks on the device.

    `draw` returns the masks of a batch on the CPU, as a function of the batch alone, so the threads that draw
    them make no difference. Its errors are raised here, when that batch is due.
    """
    pairs = (
        draw_ahead(batches, draw, device, threads())
        if is_worthwhile(dropout, device)
        else ((batch, draw(batch)) for batch in batches)
    )
    for batch, masks in pairs:
        yield batch, masks.to(device)


def threads() -> int:
    """Returns how many threads draw: one fewer than the cores, at least 1 and at most `MAX_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_THREADS, cores - 1))


def draw_ahead(
    batches: Iterable[Batch], draw: Callable[[Batch], ModelMasks], device: torch.device, ahead: int
) -> Iterator[tuple[Batch, ModelMasks]]:
    """Yields each batch with its masks on the CPU, while threads draw the masks of the next batches.

    `ahead` is the number of threads, and of batches whose masks are drawn in advance.
    The threads end with the batches, or when the caller stops iterating.
    """
    indexed = with_index(device)  # called here, since the current device of a new thread is the first GPU

    def prepare() -> None:
        if indexed.type == "cuda":
            torch.cuda.set_device(indexed)  # else pinning in this thread would open the first GPU

    pool = ThreadPoolExecutor(ahead, "masks", prepare)
    submitted: deque[tuple[Batch, Future[ModelMasks]]] = deque()
    try:
        for batch in batches:
            submitted.append((batch, pool.submit(draw, batch)))
            if len(submitted) > ahead:
                due, masks = submitted.popleft()
                yield due, masks.result()
        while submitted:
            due, masks = submitted.popleft()
            yield due, masks.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
