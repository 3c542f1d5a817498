"""What is decided and copied around a graph; the two calls that capture and replay one are stood in for by
the loop itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vdrop_cli.kernels.graphs import (
    CAPTURING,
    Graph,
    Graphs,
    capture,
    capture_stream,
    copy,
    is_possible,
    product_precision,
)

CPU = torch.device("cpu")


def decaying_sum(total: Tensor, last: Tensor, x: Tensor, mask: Tensor | None) -> None:
    """A loop in place, as those of the cells are, which starts from `total` and fills `last`."""
    last.copy_(x[-1])
    for x_t in x:
        total.mul_(0.5).add_(x_t if mask is None else x_t * mask)


class Recorder:
    """A `Capture` that counts: the graph of a loop is the loop. A graph takes `pool_bytes` of its own."""

    def __init__(self) -> None:
        self.captures = self.replays = self.pool_bytes = 0

    def __call__(self, run: Callable[[], None], device: torch.device) -> Graph:
        self.captures += 1
        run()  # as a library's warm-up does; what it writes must not be seen

        def replay() -> None:
            self.replays += 1
            run()

        return Graph(replay, self.pool_bytes)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def graphs_of(recorder: Recorder, **options: int) -> Graphs:
    return Graphs(recorder, possible=lambda device: True, **options)


def summed(graphs: Graphs, x: Tensor, mask: Tensor | None = None) -> Tensor:
    total, last = torch.ones(x.shape[1:]), torch.full(x.shape[1:], torch.nan)
    graphs.run(decaying_sum, {"total": total}, {"last": last}, {"x": x, "mask": mask})
    assert torch.equal(last, x[-1].to(last.dtype))
    return total


def exact(x: Tensor, mask: Tensor | None = None) -> Tensor:
    total = torch.ones(x.shape[1:])
    decaying_sum(total, torch.empty_like(total), x, mask)
    return total


def test_shapes_seen_again_are_captured_once_and_then_replayed(recorder: Recorder) -> None:
    graphs = graphs_of(recorder)
    for number in range(5):
        x = torch.randn(3, 4)
        assert torch.equal(summed(graphs, x), exact(x))
        assert (recorder.captures, recorder.replays) == (min(number, 1), number)


def test_no_mask_is_frozen_and_no_result_overwritten(recorder: Recorder) -> None:
    graphs, calls = graphs_of(recorder), []
    for _ in range(6):
        x, mask = torch.randn(3, 4), torch.rand(4)
        calls.append((summed(graphs, x, mask), exact(x, mask)))
    assert recorder.replays == 5
    assert all(torch.equal(actual, expected) for actual, expected in calls)


def test_what_is_read_stays_as_it_was(recorder: Recorder) -> None:
    graphs, x = graphs_of(recorder), torch.randn(3, 4)
    before = x.clone()
    for _ in range(3):
        summed(graphs, x)
    assert torch.equal(x, before)


def test_shapes_that_change_are_never_captured(recorder: Recorder) -> None:
    graphs = graphs_of(recorder)
    for time in range(1, 30):
        x = torch.randn(time, 4)
        assert torch.equal(summed(graphs, x), exact(x))
    assert recorder.captures == 0


@pytest.mark.parametrize("other", ["shape", "type", "mask"])
def test_what_a_graph_depends_on_makes_another(recorder: Recorder, other: str) -> None:
    graphs, x = graphs_of(recorder), torch.randn(3, 4)
    for _ in range(2):
        summed(graphs, x)
    changed = {"shape": torch.randn(3, 5), "type": x.bfloat16()}.get(other, x)
    mask = torch.rand(4) if other == "mask" else None
    for _ in range(2):
        assert torch.equal(summed(graphs, changed, mask), exact(changed, mask))
    assert recorder.captures == 2


def test_a_graph_is_of_one_precision_of_products_and_of_one_loop(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of tf32 products would be replayed where the user has asked for exact ones."""
    graphs, x = graphs_of(recorder), torch.randn(3, 4)
    for precision in ("high", "highest", "high"):
        monkeypatch.setattr("vdrop_cli.kernels.graphs.product_precision", lambda p=precision: p)
        for _ in range(2):
            summed(graphs, x)
    assert recorder.captures == 2

    def halving(total: Tensor, last: Tensor, x: Tensor, mask: Tensor | None) -> None:
        total.mul_(0.5)

    for _ in range(2):
        total, last = torch.ones(4), torch.zeros(4)
        graphs.run(halving, {"total": total}, {"last": last}, {"x": x, "mask": None})
        assert (total == 0.5).all()
    assert recorder.captures == 3


def test_strides_of_the_callers_tensors_do_not_matter(recorder: Recorder) -> None:
    graphs, x = graphs_of(recorder), torch.randn(4, 3)
    for tensor in (x.T, x.T.contiguous(), x.T[:, :1].expand(3, 4)):
        assert torch.equal(summed(graphs, tensor), exact(tensor))
    assert recorder.captures == 1


def test_of_many_shapes_those_used_last_have_graphs(recorder: Recorder) -> None:
    graphs = graphs_of(recorder, max_graphs=2)

    def twice(width: int) -> None:
        for _ in range(2):
            x = torch.randn(3, width)
            assert torch.equal(summed(graphs, x), exact(x))

    for width in (1, 2, 1, 3):  # 2 makes room for 3
        twice(width)
    assert (recorder.captures, len(graphs.entries)) == (3, 2)
    twice(1)
    assert recorder.captures == 3


def test_more_shapes_than_fit_end_up_without_graphs(recorder: Recorder) -> None:
    """In a round of three where there is room for two, every capture would be for nothing."""
    graphs = graphs_of(recorder, max_graphs=2)
    for _ in range(200):
        for width in (1, 2, 3):
            x = torch.randn(3, width)
            assert torch.equal(summed(graphs, x), exact(x))
    assert recorder.captures <= 3 * 4, "one at the second meeting, then after 16, 128, …"


def test_graphs_hold_so_much_memory(recorder: Recorder) -> None:
    """But the last one always."""
    graphs = graphs_of(recorder, max_bytes=1000)
    for width in (30, 20, 300):
        for _ in range(2):
            summed(graphs, torch.randn(3, width))
    assert [captured.bytes for captured in graphs.entries.values()] == [5 * 300 * 4]


def test_memory_that_only_the_graph_holds_counts(recorder: Recorder) -> None:
    """As that of cuBLAS's workspaces, which are larger than the tensors of small cells."""
    graphs, recorder.pool_bytes = graphs_of(recorder, max_bytes=2500), 1000
    for width in (1, 2, 3):
        for _ in range(2):
            summed(graphs, torch.randn(3, width))
    assert [captured.bytes for captured in graphs.entries.values()] == [
        1000 + 5 * width * 4 for width in (2, 3)
    ]


def test_the_memory_of_shapes_that_were_met_is_bounded(recorder: Recorder) -> None:
    graphs = graphs_of(recorder, remembered=10)
    for time in range(1, 50):
        summed(graphs, torch.randn(time, 2))
        assert len(graphs.counts) <= 10


def test_a_graph_captured_in_inference_mode_serves_training(recorder: Recorder) -> None:
    graphs, x = graphs_of(recorder), torch.randn(3, 4)
    with torch.inference_mode():
        for _ in range(2):
            summed(graphs, x.clone())
    assert torch.equal(summed(graphs, x), exact(x)) and recorder.captures == 1


def test_the_product_precision_is_read_by_torchs_new_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The older one raises where the newer was used."""
    before = product_precision()
    matmul = SimpleNamespace(
        fp32_precision="bf16",  # no other test sets it
        allow_bf16_reduced_precision_reduction=True,
        allow_fp16_reduced_precision_reduction=True,
    )
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    assert product_precision() != before


def test_where_no_graph_is_possible_the_loop_runs_as_it_is(recorder: Recorder) -> None:
    graphs = Graphs(recorder, possible=lambda device: False)
    for _ in range(3):
        x = torch.randn(3, 4)
        assert torch.equal(summed(graphs, x), exact(x))
    assert recorder.captures == 0
    assert not is_possible(CPU)


class Failing(Recorder):
    """Every capture fails after the loop has run on the graph's memory."""

    def __call__(self, run: Callable[[], None], device: torch.device) -> Graph:
        super().__call__(run, device)
        raise RuntimeError(
            "operation not permitted when stream is capturing\nCUDA kernel errors might be reported later"
        )


def test_shapes_whose_capture_fails_run_without_a_graph_and_say_so_once() -> None:
    failing = Failing()
    graphs, x = graphs_of(failing), torch.randn(3, 4)
    assert torch.equal(summed(graphs, x), exact(x))
    with pytest.warns(
        UserWarning, match="failed with RuntimeError: operation not permitted when stream is capturing$"
    ):
        assert torch.equal(summed(graphs, x), exact(x))
    for _ in range(40):
        assert torch.equal(summed(graphs, x), exact(x))
    assert (failing.captures, failing.replays) == (1, 0) and not graphs.entries


def test_after_a_failed_capture_other_shapes_are_captured() -> None:
    failing, recorder = Failing(), Recorder()
    graphs = Graphs(
        lambda run, device: (recorder if failing.captures else failing)(run, device),
        possible=lambda device: True,
    )
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        for width in (1, 1, 2, 2, 1, 2):
            x = torch.randn(3, width)
            assert torch.equal(summed(graphs, x), exact(x))
    assert (failing.captures, recorder.captures, recorder.replays) == (1, 1, 2)


def test_failed_captures_are_remembered_up_to_a_limit() -> None:
    """After so many there are no more attempts."""
    failing = Failing()
    graphs = graphs_of(failing, remembered=10)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        for width in range(1, 30):
            for _ in range(3):
                summed(graphs, torch.randn(3, width))
    assert failing.captures == len(graphs.failed) == 10


def test_strict_graphs_raise_where_a_capture_fails() -> None:
    graphs, x = Graphs(Failing(), possible=lambda device: True, strict=True), torch.randn(3, 4)
    summed(graphs, x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="capturing"):
            summed(graphs, x)
    assert not graphs.entries


@pytest.mark.parametrize("transposed", [False, True])
def test_copies_are_those_of_one_tensor_after_the_other(transposed: bool) -> None:
    """Of mixed types and layouts, contiguous, transposed and broadcast; what is None stays out."""
    types = [torch.float32, torch.bfloat16, torch.float32, torch.int64, torch.float64, torch.float32]
    source: dict[str, Tensor | None] = {
        str(n): (torch.randn(4, 5) * 9).to(dtype) for n, dtype in enumerate(types)
    }
    source |= {
        "broadcast": torch.randn(4, 1).expand(4, 5),
        "transposed": torch.randn(5, 4).T,
        "empty": torch.empty(0),
        "none": None,
    }
    target = {
        name: None
        if t is None
        else torch.zeros(t.T.shape, dtype=t.dtype).T
        if transposed and t.dim() == 2
        else torch.zeros_like(t)
        for name, t in source.items()
    }
    copy(source, target, [name for name in source if name != "0"])
    assert target["none"] is None and not target["0"].any()
    assert all(torch.equal(target[name], t) for name, t in source.items() if t is not None and name != "0")


class FakeStream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda", torch.cuda.current_device())


class FakeCuda:
    """Two devices, each with its current stream; what captures do to them, and where they fail."""

    def __init__(self) -> None:
        self.device = 0
        self.streams = [FakeStream(torch.device("cuda", n)) for n in range(2)]
        self.captured_on: list[FakeStream] = []
        self.fails_in = ""

    def current_stream(self, device: torch.device | None = None) -> FakeStream:
        return self.streams[self.device if device is None else device.index]

    def set_stream(self, stream: FakeStream) -> None:
        self.device = stream.device.index
        self.streams[self.device] = stream

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        try:
            yield
        finally:
            self.device = before

    def step(self, name: str) -> None:
        if name == self.fails_in:
            raise RuntimeError(f"CUDA error in {name}")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def capture_begin(self, **_: object) -> None:
        self.cuda.captured_on.append(self.cuda.current_stream())
        self.cuda.step("begin")

    def capture_end(self) -> None:
        self.cuda.step("end")

    def pool(self) -> tuple[int, int]:
        return (0, 7)

    def replay(self) -> None: ...


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Below torch's own `torch.cuda.graph` and `torch.cuda.stream`."""
    fake = FakeCuda()
    segments = [
        {"segment_pool_id": (0, pool), "total_size": size}
        for pool, size in ((7, 2**21), (0, 2**30), (7, 2**25))
    ]
    for module, name, value in (
        (torch.cuda, "Stream", FakeStream),
        (torch.cuda, "CUDAGraph", lambda: FakeGraph(fake)),
        (torch.cuda, "device", fake.on),
        (torch.cuda, "current_device", lambda: fake.device),
        (torch.cuda, "_get_device_index", lambda *_: fake.device),
        (torch.cuda, "current_stream", fake.current_stream),
        (torch.cuda, "set_stream", fake.set_stream),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "memory_snapshot", lambda: segments),
        (torch.cuda.graph, "default_capture_stream", None),
        (torch._C, "_host_emptyCache", lambda: None),
        (torch._C, "_cuda_clearCublasWorkspaces", lambda: None),
    ):
        monkeypatch.setattr(module, name, value, raising=False)
    capture_stream.cache_clear()
    yield fake
    capture_stream.cache_clear()


def test_every_device_captures_on_a_stream_of_its_own(cuda: FakeCuda) -> None:
    for index in (0, 1, 1, 0):
        capture(lambda: None, torch.device("cuda", index))
    assert [stream.device.index for stream in cuda.captured_on] == [0, 1, 1, 0]
    assert len(set(cuda.captured_on)) == 2 and not set(cuda.captured_on) & set(cuda.streams)


def test_one_capture_is_made_at_a_time(cuda: FakeCuda) -> None:
    """Of whatever graphs: they share streams, and cuBLAS's workspaces."""
    capturing = list[bool]()
    capture(lambda: capturing.append(CAPTURING.locked()), torch.device("cuda", 0))
    assert capturing == [False, True] and not CAPTURING.locked(), "the first makes the loop ready"


def test_the_memory_of_a_graph_is_that_of_its_pool(cuda: FakeCuda) -> None:
    assert capture(lambda: None, torch.device("cuda", 0)).bytes == 2**21 + 2**25


def test_a_graph_is_used_where_the_allocator_does_not_report_its_memory(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RuntimeError(
            "cudaMallocAsync does not yet support snapshot. If you need it, please file an issue describing "
            "your use case."
        )

    monkeypatch.setattr(torch.cuda, "memory_snapshot", refuse)
    assert capture(lambda: None, torch.device("cuda", 0)).bytes == 0 and cuda.captured_on
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [{"total_size": 1}])
    assert capture(lambda: None, torch.device("cuda", 0)).bytes == 0, (
        "of an older torch, which reports no pools"
    )


@pytest.mark.parametrize("fails_in", ["", "begin", "loop", "end"])
def test_a_capture_leaves_streams_and_device_as_they_were(cuda: FakeCuda, fails_in: str) -> None:
    before, cuda.fails_in = list(cuda.streams), fails_in
    with pytest.raises(RuntimeError, match=fails_in) if fails_in else nullcontext():
        capture(lambda: cuda.step("loop") if cuda.captured_on else None, torch.device("cuda", 1))
    assert len(cuda.captured_on) == 1
    assert cuda.streams == before and cuda.device == 0
