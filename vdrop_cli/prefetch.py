"""Draws the masks of the next batch in a thread, while the current batch is trained on."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from vdrop_cli.dropout import ModelMasks
from vdrop_cli.kernels import with_index
from vdrop_cli.policies import Dropout

Batch = TypeVar("Batch")


def is_worthwhile(dropout: Dropout, device: torch.device) -> bool:
    """Whether a thread saves time: where drawing takes long and the processor is otherwise idle.

    On the CPU the thread would take a core from the matrix products.
    """
    return device.type == "cuda" and (dropout.new_every_step or dropout.p_weight > 0)


def with_masks(
    batches: Iterable[Batch], draw: Callable[[Batch], ModelMasks], dropout: Dropout, device: torch.device
) -> Iterator[tuple[Batch, ModelMasks]]:
    """Yields each batch with its masks on the device.

    `draw` returns the masks of a batch on the CPU, as a function of the batch alone, so the thread that draws
    them makes no difference. Its errors are raised here, when that batch is due.
    """
    pairs = (
        draw_ahead(batches, draw, device)
        if is_worthwhile(dropout, device)
        else ((batch, draw(batch)) for batch in batches)
    )
    for batch, masks in pairs:
        yield batch, masks.to(device)


def draw_ahead(
    batches: Iterable[Batch], draw: Callable[[Batch], ModelMasks], device: torch.device
) -> Iterator[tuple[Batch, ModelMasks]]:
    """Yields each batch with its masks on the CPU, drawn by a thread.

    The thread ends with the batches, or when the caller stops iterating.
    """
    indexed = with_index(device)  # in this thread: the current device of a new one is the first GPU

    def prepare() -> None:
        if indexed.type == "cuda":
            torch.cuda.set_device(indexed)  # else pinning in this thread would open the first GPU

    pool = ThreadPoolExecutor(1, "masks", prepare)
    current: tuple[Batch, Future[ModelMasks]] | None = None
    try:
        for batch in batches:
            following = batch, pool.submit(draw, batch)
            if current is not None:
                yield current[0], current[1].result()
            current = following
        if current is not None:
            yield current[0], current[1].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
