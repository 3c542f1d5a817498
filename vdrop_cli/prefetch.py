"""Masks drawn ahead: those of the next batch by a thread, while this one is trained on."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from vdrop_cli.dropout import ModelMasks
from vdrop_cli.kernels import with_index
from vdrop_cli.policies import Dropout

Batch = TypeVar("Batch")


def is_worthwhile(dropout: Dropout, device: torch.device) -> bool:
    """Whether drawing takes long, and the processor is idle meanwhile: on the CPU the thread would take a
    core from the products.
    """
    return device.type == "cuda" and dropout.new_every_step


def with_masks(
    batches: Iterable[Batch], draw: Callable[[Batch], ModelMasks], dropout: Dropout, device: torch.device
) -> Iterator[tuple[Batch, ModelMasks]]:
    """Each batch with its masks on the device.

    `draw` gives the masks of a batch on the CPU, as a function of the batch alone, so that it makes no
    difference which thread draws them. What it raises is raised here, when that batch comes.
    """
    pairs = (
        drawn_ahead(batches, draw, device)
        if is_worthwhile(dropout, device)
        else ((batch, draw(batch)) for batch in batches)
    )
    for batch, masks in pairs:
        yield batch, masks.to(device)


def drawn_ahead(
    batches: Iterable[Batch], draw: Callable[[Batch], ModelMasks], device: torch.device
) -> Iterator[tuple[Batch, ModelMasks]]:
    """As `with_masks`, the masks on the CPU. The thread ends with the batches, or when nobody asks for more
    of them.
    """
    indexed = with_index(device)  # here: the current device of a new thread is the first

    def prepare() -> None:
        if indexed.type == "cuda":
            torch.cuda.set_device(indexed)  # of this thread, or pinning would open the first GPU

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
