"""Runs loops over time as CUDA graphs: one launch for all steps, instead of several launches for each step.

Training steps use the same graphs (`gradient_step.py`). A graph works on memory at fixed addresses. A loop
that often runs on tensors of the same shapes gets a graph with such memory. Every call copies its inputs
there, masks and weights too, replays the graph, and copies the results. So every call uses its own masks, and
a later call does not overwrite its results. A loop draws no random numbers.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from vdrop_cli.errors import one_line

Loop = Callable[..., None]  # takes tensors by name; writes into some of them
Tensors = Mapping[str, Tensor | None]


class Graph(NamedTuple):
    """A captured loop: `replay` repeats its work on the device, on the same memory."""

    replay: Callable[[], object]
    bytes: int  # of its memory pool: cuBLAS's workspaces and the allocations of the loop


CAPTURING = Lock()  # one at a time: captures share streams, and cuBLAS's workspaces are cleared for all
Capture = Callable[[Callable[[], None], torch.device], Graph]


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream of the device for all captures: torch's default one belongs to the device that captured
    first.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def capture(run: Callable[[], None], device: torch.device) -> Graph:
    """Captures `run` as a graph.

    cuBLAS allocates its workspace inside the graph's pool, so the workspace exists as long as the graph. One
    from outside could be freed before a replay.
    """
    run()  # loads libraries and compiles programs
    graph = torch.cuda.CUDAGraph()
    # the stream is restored if a capture fails
    with CAPTURING, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(graph, stream=capture_stream(device), capture_error_mode="thread_local"):
                run()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    return Graph(graph.replay, pool_bytes(graph.pool()))


def pool_bytes(pool: tuple[int, int]) -> int:
    """Memory that the device reserves for a pool; 0 where the allocator does not report it, such as
    `cudaMallocAsync`.
    """
    try:
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(
            segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool)
        )
    except Exception:  # allocators raise many types; the graph works without its size
        return 0


def is_possible(device: torch.device) -> bool:
    """Whether a graph can be captured or replayed now: on a GPU, and outside a user's own capture."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Captured:
    """A graph, and the tensors that it reads and writes."""

    graph: Graph
    tensors: dict[str, Tensor | None]

    @property
    def bytes(self) -> int:
        return self.graph.bytes + sum(
            t.numel() * t.element_size() for t in self.tensors.values() if t is not None
        )


@dataclass
class CallCount:
    """Counts the calls with the same shapes since these shapes last had a graph. The call with the number
    `threshold` gets a graph.
    """

    calls: int = 0
    threshold: int = 2


class Graphs:
    """Graphs of loops, one for each loop, shapes and types of tensors, stream, and precision of products.

    The first call with new shapes runs without a graph, so shapes that occur once cost no capture. The most
    recently used graphs stay in memory, within limits of number and bytes. After a graph is removed, its
    shapes need eight times as many calls for another graph. So if shapes are more numerous than the limits
    allow, some of them run without a graph. If a capture fails, its shapes run without a graph from then on,
    with a warning; with `strict` the error is raised.
    """

    def __init__(
        self,
        capture: Capture = capture,
        possible: Callable[[torch.device], bool] = is_possible,
        *,
        max_graphs: int = 16,
        max_bytes: int = 2**31,
        remembered: int = 1000,
        strict: bool = False,
        name: str = "a loop over time",
    ) -> None:
        self.capture, self.possible = capture, possible
        self.max_graphs = max_graphs
        self.max_bytes = max_bytes
        self.remembered = remembered
        self.strict = strict
        self.name = name
        self.counts: dict[Hashable, CallCount] = {}
        self.failed: set[Hashable] = set()
        self.entries: OrderedDict[Hashable, Captured] = OrderedDict()
        self.lock = Lock()

    def run(self, loop: Loop, changed: Tensors, filled: Tensors, read: Tensors) -> None:
        """Runs `loop(**changed, **filled, **read)`, by a graph if the shapes have one. The loop may write
        into `changed`, must fill `filled`, and only reads `read`.
        """
        tensors = {**changed, **filled, **read}
        device = next(t.device for t in changed.values() if t is not None)
        if not self.possible(device):
            loop(**tensors)
            return
        key = graph_key(loop, tensors, device)
        with self.lock:
            captured = self.entries.get(key) or (
                self.add(key, loop, tensors, device) if self.is_due(key) else None
            )
            if captured is not None:
                self.entries.move_to_end(key)
                copy(tensors, captured.tensors, (*changed, *read))
                captured.graph.replay()
                copy(captured.tensors, tensors, (*changed, *filled))
                return
        loop(**tensors)

    def is_due(self, key: Hashable) -> bool:
        """Counts a call; whether its shapes get a graph now."""
        if key in self.failed or len(self.failed) >= self.remembered:
            return False
        if key not in self.counts and len(self.counts) >= self.remembered:
            self.counts.clear()
        count = self.counts.setdefault(key, CallCount())
        count.calls += 1
        return count.calls >= count.threshold

    def add(self, key: Hashable, loop: Loop, tensors: Tensors, device: torch.device) -> Captured | None:
        """Captures and adds a graph; returns None where that fails, before it writes to `tensors`."""
        try:
            # Outside inference mode, or later calls could not write into this memory.
            with torch.inference_mode(False), torch.no_grad():
                own = {
                    n: None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
                    for n, t in tensors.items()
                }
                copy(tensors, own, tensors)  # the loop runs on them while it is captured
                captured = Captured(self.capture(lambda: loop(**own), device), own)
        except Exception as error:  # CUDA, its libraries and the allocator raise many types
            if self.strict:
                raise
            self.failed.add(key)
            why = f"the capture failed with {one_line(error)}"
            warnings.warn(f"{self.name} runs without a CUDA graph, which is slower: {why}", stacklevel=2)
            return None
        self.entries[key] = captured
        while len(self.entries) > 1 and (
            len(self.entries) > self.max_graphs
            or sum(c.bytes for c in self.entries.values()) > self.max_bytes
        ):
            removed, _ = self.entries.popitem(last=False)
            threshold = self.counts[removed].threshold if removed in self.counts else 2
            self.counts[removed] = CallCount(threshold=8 * threshold)
        return captured


def copy(source: Tensors, target: Tensors, names: Iterable[str]) -> None:
    """Copies tensors; those of one type and layout by one call, which is one launch on a GPU."""
    groups: dict[Hashable, tuple[list[Tensor], list[Tensor]]] = {}
    for name in names:
        into, value = target[name], source[name]
        if into is not None and value is not None:
            targets, sources = groups.setdefault(
                (value.dtype, into.is_contiguous() and value.is_contiguous()), ([], [])
            )
            targets.append(into)
            sources.append(value)
    for targets, sources in groups.values():
        torch._foreach_copy_(targets, sources)


def graph_key(loop: Loop, tensors: Tensors, device: torch.device) -> Hashable:
    shapes = tuple((name, None if t is None else (t.shape, t.dtype)) for name, t in tensors.items())
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return (loop.__module__, loop.__qualname__, shapes, device, stream, product_precision())


def product_precision() -> Hashable:
    """The precision that is set for products. Torch's older setting raises where the newer one was used."""
    matmul = torch.backends.cuda.matmul
    rounded = (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction)
    return (matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32, *rounded)
