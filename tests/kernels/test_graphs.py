"""What is decided and copied around a graph; the two calls that capture and replay one are stood in for by the loop itself."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vdrop_cli.kernels.graphs import Graphs, is_possible, precision_of_products

CPU = torch.device("cpu")


def decaying_sum(total: Tensor, last: Tensor, x: Tensor, mask: Tensor | None) -> None:
    """A loop in place, as those of the cells are, which goes on from `total` and fills `last`."""
    last.copy_(x[-1])
    for x_t in x:
        total.mul_(0.5).add_(x_t if mask is None else x_t * mask)


class Recorder:
    """A `Capture` that counts: the graph of a loop is the loop."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        self.captures += 1
        run()  # as a library's warm-up does; what it writes must not be seen

        def replay() -> None:
            self.replays += 1
            run()

        return replay


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
    assert all(torch.equal(found, expected) for found, expected in calls)


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


def test_strides_of_the_callers_tensors_do_not_matter(recorder: Recorder) -> None:
    graphs, x = graphs_of(recorder), torch.randn(4, 3)
    for tensor in (x.T, x.T.contiguous(), x.T[:, :1].expand(3, 4)):
        assert torch.equal(summed(graphs, tensor), exact(tensor))
    assert recorder.captures == 1


def test_of_many_shapes_those_used_last_are_kept(recorder: Recorder) -> None:
    graphs = graphs_of(recorder, kept=2)

    def twice(width: int) -> None:
        for _ in range(2):
            x = torch.randn(3, width)
            assert torch.equal(summed(graphs, x), exact(x))

    for width in (1, 2, 1, 3):  # 2 makes room for 3
        twice(width)
    assert (recorder.captures, len(graphs.held)) == (3, 2)
    twice(1)
    assert recorder.captures == 3


def test_more_shapes_than_can_be_held_end_up_without(recorder: Recorder) -> None:
    """In a round of three where there is room for two, every capture would be for nothing."""
    graphs = graphs_of(recorder, kept=2)
    for _ in range(200):
        for width in (1, 2, 3):
            x = torch.randn(3, width)
            assert torch.equal(summed(graphs, x), exact(x))
    assert recorder.captures <= 3 * 4, "one at the second meeting, then after 16, 128, …"


def test_graphs_hold_so_much_memory(recorder: Recorder) -> None:
    """But the last one always."""
    graphs = graphs_of(recorder, kept_bytes=1000)
    for width in (30, 20, 300):
        for _ in range(2):
            summed(graphs, torch.randn(3, width))
    assert [captured.bytes for captured in graphs.held.values()] == [5 * 300 * 4]


def test_the_memory_of_shapes_that_were_met_is_bounded(recorder: Recorder) -> None:
    graphs = graphs_of(recorder, remembered=10)
    for time in range(1, 50):
        summed(graphs, torch.randn(time, 2))
        assert len(graphs.met) <= 10


def test_a_graph_captured_in_inference_mode_serves_training(recorder: Recorder) -> None:
    graphs, x = graphs_of(recorder), torch.randn(3, 4)
    with torch.inference_mode():
        for _ in range(2):
            summed(graphs, x.clone())
    assert torch.equal(summed(graphs, x), exact(x)) and recorder.captures == 1


def test_the_precision_of_products_is_read_by_torchs_new_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The older one raises where the newer was used."""
    before = precision_of_products()
    matmul = SimpleNamespace(
        fp32_precision="tf32", allow_bf16_reduced_precision_reduction=True, allow_fp16_reduced_precision_reduction=True
    )
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    assert precision_of_products() != before


def test_where_no_graph_is_possible_the_loop_runs_as_it_is(recorder: Recorder) -> None:
    graphs = Graphs(recorder, possible=lambda device: False)
    for _ in range(3):
        x = torch.randn(3, 4)
        assert torch.equal(summed(graphs, x), exact(x))
    assert recorder.captures == 0
    assert not is_possible(CPU)


def test_a_capture_that_fails_is_not_hidden_and_not_kept() -> None:
    def failing(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs, x = Graphs(failing, possible=lambda device: True), torch.randn(3, 4)
    summed(graphs, x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="capturing"):
            summed(graphs, x)
    assert not graphs.held
