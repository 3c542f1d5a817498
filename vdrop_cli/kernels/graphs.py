"""Loops over time as CUDA graphs: one launch for all steps instead of some for each.

A graph works on memory that never changes place. So a loop that is run often on tensors of the same shapes
gets memory of its own; every call copies all it reads into it, masks and weights too, replays, and copies out
what was written: no mask is frozen, and no result is overwritten by a later call. Nothing random happens
inside.
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

Loop = Callable[..., None]  # takes tensors by name; writes into some of them
Tensors = Mapping[str, Tensor | None]


class Graph(NamedTuple):
    """A captured loop: `replay` does again, on the same memory, whatever the loop did on the device."""

    replay: Callable[[], object]
    bytes: int  # of its own memory pool: cuBLAS's workspaces, and what the loop allocates


CAPTURING = Lock()  # one at a time: captures share streams, and cuBLAS's workspaces are cleared for all
Capture = Callable[[Callable[[], None], torch.device], Graph]


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream of the device for all captures: torch's default one belongs to the device that captured
    first.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def capture(run: Callable[[], None], device: torch.device) -> Graph:
    """`run` as a graph.

    cuBLAS takes its workspace inside the graph, where it stays as long as the graph does, and gives it back
    there: one that it has from elsewhere could be freed under the graph.
    """
    run()  # makes libraries and programs ready
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
    """Memory that the device has set apart for a pool; 0 where the allocator does not tell, as CUDA's own
    (`cudaMallocAsync`) does not.
    """
    try:
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(
            segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool)
        )
    except Exception:  # of allocators, by many names; the graph is there, whatever it takes
        return 0


def is_possible(device: torch.device) -> bool:
    """Whether a graph can be captured or replayed now: there is a device, and it is not part of a user's own
    graph.
    """
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
class Sightings:
    """How often shapes were met since they last had a graph, and how often they must be met to get
    one.
    """

    seen: int = 0
    threshold: int = 2


class Graphs:
    """Graphs of loops, by what they depend on: the shapes and types of tensors, stream and precision of
    products.

    A loop runs as it is the first time that its shapes are met, so that shapes which never come again cost no
    captures. The graphs that were used last remain, within limits of number and memory. Shapes that lost
    theirs must be met eight times as often before they get another: more shapes than fit the limits end up
    without. Shapes whose capture fails run without a graph from then on, with a warning; where `strict`, the
    error is raised.
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
    ) -> None:
        self.capture, self.possible = capture, possible
        self.max_graphs = max_graphs
        self.max_bytes = max_bytes
        self.remembered = remembered
        self.strict = strict
        self.met: dict[Hashable, Sightings] = {}
        self.failed: set[Hashable] = set()
        self.entries: OrderedDict[Hashable, Captured] = OrderedDict()
        self.lock = Lock()

    def run(self, loop: Loop, changed: Tensors, filled: Tensors, read: Tensors) -> None:
        """`loop(**changed, **filled, **read)`, which may write into `changed`, must fill `filled`, and leaves
        `read`.
        """
        tensors = {**changed, **filled, **read}
        device = next(t.device for t in changed.values() if t is not None)
        if not self.possible(device):
            loop(**tensors)
            return
        key = key_of(loop, tensors, device)
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
        """Whether these shapes, met once more, are to have a graph."""
        if key in self.failed or len(self.failed) >= self.remembered:
            return False
        if key not in self.met and len(self.met) >= self.remembered:
            self.met.clear()
        sightings = self.met.setdefault(key, Sightings())
        sightings.seen += 1
        return sightings.seen >= sightings.threshold

    def add(self, key: Hashable, loop: Loop, tensors: Tensors, device: torch.device) -> Captured | None:
        """Captures and adds a graph; returns None where that fails, before it writes to `tensors`."""
        try:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # or later calls could not write into its memory
                own = {
                    n: None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
                    for n, t in tensors.items()
                }
                copy(tensors, own, tensors)  # the loop runs on them while it is captured
                made = Captured(self.capture(lambda: loop(**own), device), own)
        except Exception as error:  # of CUDA, its libraries or the allocator, by many names
            if self.strict:
                raise
            self.failed.add(key)
            why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            warnings.warn(
                f"a loop over time runs without a CUDA graph, which is slower: the capture failed with {why}",
                stacklevel=2,
            )
            return None
        self.entries[key] = made
        while len(self.entries) > 1 and (
            len(self.entries) > self.max_graphs
            or sum(c.bytes for c in self.entries.values()) > self.max_bytes
        ):
            lost, _ = self.entries.popitem(last=False)
            threshold = self.met[lost].threshold if lost in self.met else 2
            self.met[lost] = Sightings(threshold=8 * threshold)
        return made


def copy(source: Tensors, target: Tensors, names: Iterable[str]) -> None:
    """All tensors of a type and layout by one call, which is one launch on a GPU."""
    groups: dict[Hashable, tuple[list[Tensor], list[Tensor]]] = {}
    for name in names:
        into, of = target[name], source[name]
        if into is not None and of is not None:
            targets, sources = groups.setdefault(
                (of.dtype, into.is_contiguous() and of.is_contiguous()), ([], [])
            )
            targets.append(into)
            sources.append(of)
    for targets, sources in groups.values():
        torch._foreach_copy_(targets, sources)


def key_of(loop: Loop, tensors: Tensors, device: torch.device) -> Hashable:
    shapes = tuple((name, None if t is None else (t.shape, t.dtype)) for name, t in tensors.items())
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return (loop.__module__, loop.__qualname__, shapes, device, stream, precision_of_products())


def precision_of_products() -> Hashable:
    """By torch's newer setting where there is one: the older one raises when that was used."""
    matmul = torch.backends.cuda.matmul
    rounded = (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction)
    return (matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32, *rounded)
