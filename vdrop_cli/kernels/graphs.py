"""Loops over time as CUDA graphs: one launch for all steps instead of some for each.

A graph works on memory that never changes place. So a loop that is run often on tensors of the same shapes gets memory of its own;
every call copies all it reads into it, masks and weights too, replays, and copies out what was written: no mask is frozen, and no
result is overwritten by a later call. Nothing random happens inside.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

Loop = Callable[..., None]  # takes tensors by name; writes into some of them
Capture = Callable[[Callable[[], None], torch.device], Callable[[], object]]
Tensors = Mapping[str, Tensor | None]


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """`run` as a graph: what is returned does again, on the same memory, whatever `run` did on the device.

    cuBLAS takes its workspace inside the graph, where it stays as long as the graph does, and gives it back there: one that it has
    from elsewhere could be freed under the graph.
    """
    run()  # makes libraries and programs ready
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    torch._C._cuda_clearCublasWorkspaces()
    return graph.replay


def is_possible(device: torch.device) -> bool:
    """Whether a graph can be captured or replayed now: there is a device, and it is not part of a user's own graph."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Captured:
    """A graph and its memory."""

    replay: Callable[[], object]
    tensors: dict[str, Tensor | None]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values() if t is not None)


@dataclass
class Sightings:
    """How often shapes were met since they last had a graph, and how often they must be before they get one."""

    seen: int = 0
    wanted: int = 2


class Graphs:
    """Graphs of loops, by what they depend on: the shapes and types of tensors, stream and precision of products.

    A loop runs as it is the first time that its shapes are met, so that shapes which never come again cost no captures. Of the graphs
    those that were used last are held, so many and so much memory. Shapes that lost theirs must be met eight times as often before they
    get another: more shapes than can be held end up without.
    """

    def __init__(
        self,
        capture: Capture = capture,
        possible: Callable[[torch.device], bool] = is_possible,
        *,
        kept: int = 16,
        kept_bytes: int = 2**31,
        remembered: int = 1000,
    ) -> None:
        self.capture, self.possible = capture, possible
        self.kept, self.kept_bytes, self.remembered = kept, kept_bytes, remembered
        self.met: dict[Hashable, Sightings] = {}
        self.held: OrderedDict[Hashable, Captured] = OrderedDict()
        self.lock = Lock()

    def run(self, loop: Loop, changed: Tensors, filled: Tensors, read: Tensors) -> None:
        """`loop(**changed, **filled, **read)`, which may write into `changed`, must fill `filled`, and leaves `read`."""
        tensors, device = {**changed, **filled, **read}, next(t.device for t in changed.values() if t is not None)
        if not self.possible(device):
            loop(**tensors)
            return
        key = key_of(loop, tensors, device)
        with self.lock:
            if key in self.held or self.is_due(key):
                captured = self.held.get(key) or self.captured(key, loop, tensors, device)
                self.held.move_to_end(key)
                copy(tensors, captured.tensors, (*changed, *read))
                captured.replay()
                copy(captured.tensors, tensors, (*changed, *filled))
                return
        loop(**tensors)

    def is_due(self, key: Hashable) -> bool:
        """Whether these shapes, met once more, are to have a graph."""
        if key not in self.met and len(self.met) >= self.remembered:
            self.met.clear()
        sightings = self.met.setdefault(key, Sightings())
        sightings.seen += 1
        return sightings.seen >= sightings.wanted

    def captured(self, key: Hashable, loop: Loop, tensors: Tensors, device: torch.device) -> Captured:
        with torch.inference_mode(False), torch.no_grad():  # or later calls could not write into its memory
            own = {n: None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for n, t in tensors.items()}
            copy(tensors, own, tensors)  # the loop runs on them while it is captured
            made = Captured(self.capture(lambda: loop(**own), device), own)
        self.held[key] = made
        while len(self.held) > 1 and (len(self.held) > self.kept or sum(c.bytes for c in self.held.values()) > self.kept_bytes):
            lost, _ = self.held.popitem(last=False)
            wanted = self.met[lost].wanted if lost in self.met else 2
            self.met[lost] = Sightings(wanted=8 * wanted)
        return made


def copy(source: Tensors, target: Tensors, names: Iterable[str]) -> None:
    for name in names:
        into, of = target[name], source[name]
        if into is not None and of is not None:
            into.copy_(of)


def key_of(loop: Loop, tensors: Tensors, device: torch.device) -> Hashable:
    shapes = tuple((name, None if t is None else (t.shape, t.dtype)) for name, t in tensors.items())
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return (loop.__module__, loop.__qualname__, shapes, device, stream, precision_of_products())


def precision_of_products() -> Hashable:
    """By torch's newer setting where there is one: the older one raises when that was used."""
    matmul = torch.backends.cuda.matmul
    rounded = (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction)
    return (matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32, *rounded)
