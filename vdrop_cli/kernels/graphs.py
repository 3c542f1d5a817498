"""Loops over time as CUDA graphs: one launch for all steps instead of some for each.

A graph works on memory that never changes place. So a loop that is run often on tensors of the same shapes gets memory of its own;
every call copies all it reads into it, masks and weights too, replays, and copies out what was written: no mask is frozen, and no
result is overwritten by a later call. Nothing random happens inside.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

Loop = Callable[..., None]  # takes tensors by name and constants; changes some of the tensors in place
Capture = Callable[[Callable[[], None], torch.device], Callable[[], object]]


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """`run` as a graph: what is returned does again, on the same memory, whatever `run` did on the device."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()  # libraries take their memory at their first call on a stream
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph.replay


def is_possible(device: torch.device) -> bool:
    """Whether a graph can be captured or replayed now: there is a device, and it is not part of a user's own graph."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Captured:
    """A graph and its memory."""

    replay: Callable[[], object]
    tensors: dict[str, Tensor | None]


class Graphs:
    """Graphs of loops, by what they depend on: the shapes and types of tensors, constants, stream and precision of products.

    A loop runs as it is the first time that its shapes are seen, so that shapes which keep changing cost no captures. Of the graphs,
    the `kept` that were used last are held, and so is their memory.
    """

    def __init__(
        self, capture: Capture = capture, possible: Callable[[torch.device], bool] = is_possible, kept: int = 16, remembered: int = 1000
    ) -> None:
        self.capture, self.possible, self.kept, self.remembered = capture, possible, kept, remembered
        self.seen: Counter[Hashable] = Counter()
        self.held: OrderedDict[Hashable, Captured] = OrderedDict()
        self.lock = Lock()

    def run(self, loop: Loop, written: dict[str, Tensor], read: dict[str, Tensor | None], **constants: Any) -> None:
        """`loop(**written, **read, **constants)`, which may change the tensors of `written` and no others."""
        tensors, device = {**written, **read}, next(iter(written.values())).device
        if not self.possible(device):
            loop(**tensors, **constants)
            return
        key = key_of(loop, tensors, constants, device)
        with self.lock:
            if key in self.held or self.is_known(key):
                captured = self.held.get(key) or self.captured(key, loop, tensors, constants, device)
                self.held.move_to_end(key)
                copy(tensors, captured.tensors, tensors)
                captured.replay()
                copy(captured.tensors, tensors, written)
                return
        loop(**tensors, **constants)

    def forget(self) -> None:
        """Gives the memory back."""
        self.held.clear()
        self.seen.clear()

    def is_known(self, key: Hashable) -> bool:
        """Whether these shapes were seen before; from now on they were."""
        if len(self.seen) >= self.remembered:
            self.seen.clear()
        self.seen[key] += 1
        return self.seen[key] > 1

    def captured(
        self, key: Hashable, loop: Loop, tensors: dict[str, Tensor | None], constants: dict[str, Any], device: torch.device
    ) -> Captured:
        own = {name: None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for name, t in tensors.items()}
        copy(tensors, own, tensors)  # the loop runs on them while it is captured
        if len(self.held) >= self.kept:
            self.held.popitem(last=False)
        self.held[key] = Captured(self.capture(lambda: loop(**own, **constants), device), own)
        return self.held[key]


def copy(source: dict[str, Tensor | None] | dict[str, Tensor], target: dict[str, Tensor | None] | dict[str, Tensor], names: Any) -> None:
    for name in names:
        into, of = target[name], source[name]
        if into is not None and of is not None:
            into.copy_(of)


def key_of(loop: Loop, tensors: dict[str, Tensor | None], constants: dict[str, Any], device: torch.device) -> Hashable:
    shapes = tuple((name, None if t is None else (t.shape, t.dtype)) for name, t in tensors.items())
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    products = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
    return (loop.__module__, loop.__qualname__, shapes, tuple(sorted(constants.items())), device, stream, products)
