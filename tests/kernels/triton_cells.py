"""The cells of the back end `triton` against the definition: in Triton's interpreter, or on a GPU.

`test_triton.py` runs this file in a process of its own: whether programs are interpreted is settled when
Triton is imported.
"""

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from tests.conftest import CELLS_AND_POLICIES, mark_long
from tests.kernels.test_fused import double, inputs_of, masks_of, outputs_and_gradients, relative_errors
from tests.test_golden import RECORDED, losses
from vdrop_cli import kernels
from vdrop_cli.dropout import draw
from vdrop_cli.kernels import Masks, graphs, loops, operators, programs, reference
from vdrop_cli.kernels import triton as ours
from vdrop_cli.kernels.alignment import aligned_size
from vdrop_cli.kernels.graphs import Graph, Graphs
from vdrop_cli.kernels.products import full_precision_sums
from vdrop_cli.layers import GRU, LSTM
from vdrop_cli.random_streams import Stream

DEVICE = torch.device("cpu" if programs.INTERPRETED else "cuda")
TIME = 3
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lstm": [{}],
    "gru": [{"reset_after": False}, {"reset_after": True}],
}
FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"lstm": kernels.lstm, "gru": kernels.gru}
TENSORS = ("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh")


@pytest.fixture(scope="module", autouse=True)
def checked() -> None:
    """The self-check, once in a process, with one program for all elements of H, which is quick."""
    kernels.choose("triton", DEVICE)


@pytest.fixture(autouse=True)
def small_programs(checked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs for the seven elements of H, the second not full."""
    monkeypatch.setattr(loops, "BLOCK", 4)


@pytest.fixture
def one_program(small_programs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that need none of several: in the interpreter each takes its time."""
    monkeypatch.setattr(loops, "BLOCK", 64)


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A graph for every shape from its second call on; in the interpreter the loop itself stands for it.
    Counts captures and replays.
    """
    counts = [0, 0]

    def capture(run: Callable[[], None], device: torch.device) -> Graph:
        counts[0] += 1
        graph = Graph(run, 0) if programs.INTERPRETED else graphs.capture(run, device)

        def counted() -> None:
            counts[1] += 1
            graph.replay()

        return graph._replace(replay=counted)

    monkeypatch.setattr(ours, "GRAPHS", Graphs(capture, possible=lambda device: True))
    return counts


def to(masks: Masks, where: torch.device | torch.dtype) -> Masks:
    return Masks(*(None if m is None else m.to(where) for m in masks))


def on_device(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().to(DEVICE).requires_grad_() for t in tensors]


def agreement(
    cell: str, masks: Masks, padded: bool, dtype: torch.dtype = torch.float32, **options: Any
) -> float:
    """The largest relative error of an output or a gradient; padding is no number."""
    lengths = torch.tensor([1, TIME, 2]) if padded else None
    plain = {name: value for name, value in options.items() if name not in ("recompute", "compute_dtype")}
    expected = outputs_and_gradients(
        lambda *a: FUNCTIONS[cell](*a, double(masks), lengths=lengths, backend="reference", **plain),
        inputs_of(cell, TIME, torch.float64),
    )
    there, inputs = None if lengths is None else lengths.to(DEVICE), inputs_of(cell, TIME, dtype)
    if lengths is not None:
        inputs[0] = (
            inputs[0].detach().masked_fill((torch.arange(TIME)[:, None] >= lengths)[..., None], torch.nan)
        )
    actual = outputs_and_gradients(
        lambda *a: tuple(
            y.cpu()
            for y in FUNCTIONS[cell](
                *a, to(to(masks, DEVICE), dtype), lengths=there, backend="triton", **options
            )
        ),
        on_device(inputs),
    )
    return max(relative_errors([f.cpu() for f in actual], expected))


SHORT = [  # each kind of masks, with and without padding
    ("lstm", "naive", True),
    ("lstm", "moon_word", True),
    ("lstm", "variational_untied", True),
    ("lstm", "variational", False),
    ("gru", "variational", True),
    ("gru", "variational_untied", True),
    ("gru", "none", False),
]


@pytest.mark.parametrize(
    ("cell", "policy", "padded"),
    mark_long([(*pair, padded) for padded in (False, True) for pair in CELLS_AND_POLICIES], SHORT),
)
def test_every_policy_agrees_with_the_definition(cell: str, policy: str, padded: bool) -> None:
    for option in VARIANTS[cell]:
        assert agreement(cell, masks_of(cell, policy, TIME), padded, **option) < 1e-5


SOME_POLICIES = [
    (cell, policy)
    for policy in ("none", "naive", "variational", "variational_untied")
    for cell in ("lstm", "gru")
]
SOME_SHORT = [("lstm", "variational_untied"), ("gru", "naive")]


@pytest.mark.parametrize(("cell", "policy"), mark_long(SOME_POLICIES, SOME_SHORT))
def test_gates_worked_out_again_are_those_that_were(cell: str, policy: str) -> None:
    for option in VARIANTS[cell]:
        assert agreement(cell, masks_of(cell, policy, TIME), True, recompute=True, **option) < 1e-5


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_that_recomputes_saves_no_gates(recompute: bool) -> None:
    """Of what its operator returns, and keeps, those are the fourth."""
    for layers, gates in ((LSTM, 4), (GRU, 3)):
        y_TBH, _ = layers(5, 7, backend="triton", recompute=recompute).to(DEVICE)(
            torch.randn(TIME, 3, 5, device=DEVICE)
        )
        sizes = [t.numel() for t in y_TBH.grad_fn.saved_tensors if t is not None]
        row = aligned_size(7, torch.float32)
        assert (gates * TIME * 3 * row in sizes) is not recompute


@pytest.mark.parametrize(
    ("x_gates", "h_gates"), mark_long([(0, 4), (4, 0), (4, 1), (1, 4)], [(0, 4), (4, 1)])
)
def test_tied_and_untied_masks_mix(x_gates: int, h_gates: int) -> None:
    """Broadcast along other dimensions than by the policies, too; in fp64, for what fp32 would hide."""
    generator = torch.Generator().manual_seed(4)
    mask_x = torch.rand(TIME, x_gates, 1, 5, generator=generator, dtype=torch.float64) if x_gates else None
    mask_h = torch.rand(1, h_gates, 3, 1, generator=generator, dtype=torch.float64) if h_gates else None
    mask_c = torch.rand(1, 1, 7, generator=generator, dtype=torch.float64)
    assert agreement("lstm", Masks(mask_x, mask_h, mask_c), True, torch.float64) < 1e-10


@pytest.mark.parametrize("cell", mark_long(["lstm", "gru"], ["lstm"]))
def test_replays_see_every_calls_masks_and_leave_earlier_results_alone(
    cell: str, replaying: list[int]
) -> None:
    """Five calls on the same shapes, each with its own numbers, all before the first backward pass."""
    for option in VARIANTS[cell]:
        replaying[:] = [0, 0]
        calls = []
        for number in range(5):
            masks = to(
                Masks(
                    *(None if m is None else m + number for m in masks_of(cell, "variational_untied", TIME))
                ),
                DEVICE,
            )
            inputs = on_device([t.detach() + number / 10 for t in inputs_of(cell, TIME, torch.float32)])
            expected, actual = (
                FUNCTIONS[cell](*inputs, masks, backend=b, **option) for b in ("reference", "triton")
            )
            calls.append((inputs, expected, actual))
        assert replaying == [1, 4]
        for number, (inputs, expected, actual) in enumerate(calls):
            gradients = [
                torch.autograd.grad([y.square().sum() for y in ys], inputs) for ys in (actual, expected)
            ]
            errors = relative_errors([*actual, *gradients[0]], [*expected, *gradients[1]])
            assert max(errors) < 1e-4, (number, errors)
        assert replaying == [2, 8]


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize(
    ("cell", "policy"),
    mark_long(
        [("lstm", "variational_untied"), ("lstm", "moon_word"), ("gru", "naive")],
        [("lstm", "variational_untied")],
    ),
)
def test_training_gives_the_losses_that_are_recorded_of_the_cpu(
    cell: str, policy: str, tmp_path: Path
) -> None:
    """Masks and all: random numbers do not depend on the device."""
    steps = 2 if programs.INTERPRETED else 20
    actual = losses(cell, policy, tmp_path, "backend=triton", f"device={DEVICE}", steps=steps)
    assert actual == pytest.approx(json.loads(RECORDED.read_text())[f"{cell} {policy}"][:steps], rel=1e-4)


@pytest.mark.usefixtures("one_program")
def test_the_self_check_sees_what_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one gradient of many, which a comparison would pass over."""
    exact = reference.lstm
    monkeypatch.setattr(reference, "lstm", lambda x, h, c, *rest: exact(x, h, c * math.nan, *rest))
    assert math.isnan(ours.self_check(DEVICE, "lstm"))
    monkeypatch.undo()
    assert ours.self_check(DEVICE, "lstm") < 1e-5


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("cell", mark_long(["lstm", "gru"], ["lstm"]))
def test_the_self_check_captures_and_replays_graphs_of_its_own(cell: str, replaying: list[int]) -> None:
    """Forward and back, captured in the second of three passes; none of them remains after it."""
    graphs = ours.GRAPHS
    assert ours.self_check(DEVICE, cell) < 1e-5
    assert replaying == [2, 4]
    assert ours.GRAPHS is graphs and not graphs.entries and not graphs.counts


def in_another_thread(run: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("cell", mark_long(["lstm", "gru"], ["lstm"]))
def test_the_graphs_of_the_self_check_are_its_own_whatever_thread_goes_back(
    cell: str, replaying: list[int]
) -> None:
    """On a GPU it is one of torch's. A cell in another thread keeps the graphs of all others meanwhile."""
    inputs = on_device(inputs_of(cell, TIME, torch.float32))
    masks = to(masks_of(cell, "variational", TIME), DEVICE)
    own = Graphs()
    own.possible = lambda device: True
    loops_of = {f"{cell}_loop", f"{cell}_backward_loop"}

    def passes(back: Callable[[Callable[[], object]], object]) -> None:
        y_TBH, *_ = FUNCTIONS[cell](*inputs, masks, backend="triton")
        back(lambda: torch.autograd.grad(y_TBH.sum(), inputs))

    with operators.use_graphs(own):
        passes(in_another_thread)
        assert {key[1] for key in own.counts} == loops_of and not ours.GRAPHS.counts
        own.counts.clear()
        in_another_thread(lambda: passes(lambda run: run()))
    assert {key[1] for key in ours.GRAPHS.counts} == loops_of and not own.counts
    own.counts.clear()
    passes(in_another_thread)
    assert not own.counts


@pytest.mark.usefixtures("one_program")
def test_a_graph_that_replays_something_else_fails_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was captured empty; and a capture that fails is an error."""
    empty = Graphs(lambda run, device: Graph(lambda: None, 0), possible=lambda device: True)
    monkeypatch.setattr(ours, "GRAPHS", empty)
    assert not ours.self_check(DEVICE, "lstm") < ours.TOLERANCE
    monkeypatch.setattr(empty, "capture", lambda run, device: 1 / 0)
    assert "ZeroDivisionError" in ours.unavailable_reason(DEVICE)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):

        def full(run: Callable[[], None], device: torch.device, error: Exception = error) -> Graph:
            raise error

        monkeypatch.setattr(empty, "capture", full)
        with pytest.raises(type(error), match="CUDA"):  # says nothing about the device, and is not remembered
            ours.unavailable_reason(DEVICE)
    assert ours.GRAPHS is empty


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize(
    "how",
    mark_long(["no_grad", "inference_mode", "autocast", "default device"], ["autocast", "default device"]),
)
def test_the_self_check_passes_wherever_the_first_call_is(how: str) -> None:
    modes = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast(DEVICE.type, dtype=torch.bfloat16),
        "default device": torch.device("meta"),
    }
    with modes[how]:
        assert ours.unavailable_reason(DEVICE) == ""


def test_states_and_lengths_need_not_be_contiguous() -> None:
    """Whether the graph's own memory is written or, the first time, theirs."""
    masks = to(masks_of("lstm", "variational", TIME), DEVICE)
    lengths = torch.tensor([[1, 9], [TIME, 9], [2, 9]], device=DEVICE)[:, 0]
    x, h, c, *weights = on_device(inputs_of("lstm", TIME, torch.float32))
    x, h, c = (t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in (x, h, c))
    assert not any(t.is_contiguous() for t in (x, h, c, lengths))
    actual, expected = (
        kernels.lstm(x, h, c, *weights, masks, lengths=lengths, backend=b) for b in ("triton", "reference")
    )
    assert max(relative_errors([t.detach() for t in actual], [t.detach() for t in expected])) < 1e-5


@pytest.mark.parametrize(("cell", "policy"), mark_long(SOME_POLICIES, SOME_SHORT))
def test_bf16_products_stay_close_to_the_definition(cell: str, policy: str) -> None:
    for option in VARIANTS[cell]:
        error = agreement(cell, masks_of(cell, policy, TIME), True, compute_dtype=torch.bfloat16, **option)
        assert 1e-5 < error < 3e-2


def operands(cell: str, **options: Any) -> tuple[Any, ...]:
    """What the operator takes, in its order: states, the layer, options."""
    named = dict(
        zip(
            [n for n in TENSORS if n != "c" or cell == "lstm"],
            on_device(inputs_of(cell, TIME, torch.float32)),
            strict=True,
        )
    )
    masks = to(masks_of(cell, "variational_untied", TIME), DEVICE)
    states = [named.pop(n) for n in ("h", "c") if n in named]
    return (
        *states,
        *named.values(),
        *masks,
        torch.tensor([1, TIME, 2], device=DEVICE),
        torch.float32,
        False,
        cell == "lstm",
        *options.values(),
    )


@pytest.mark.parametrize("lengths", mark_long([None, [1, TIME, 2]], [[1, TIME, 2]]))
def test_the_cell_states_of_all_steps_have_the_gradients_of_the_definition(lengths: list[int] | None) -> None:
    """Alone and beside the other outputs."""
    masks = to(masks_of("lstm", "moon", TIME), DEVICE)
    lengths_B = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    for used in (slice(None), slice(3, 4)):
        results = []
        for backend in ("triton", "reference"):
            inputs = [t.detach().requires_grad_() for t in on_device(inputs_of("lstm", TIME, torch.float32))]
            outputs = kernels.lstm(*inputs, masks, cells=True, lengths=lengths_B, backend=backend)
            loss = sum(y.square().sum() for y in outputs[used])
            results.append([*outputs, *torch.autograd.grad(loss, inputs)])
        for triton_one, expected in zip(*results, strict=True):
            torch.testing.assert_close(triton_one, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("cell", mark_long(["lstm", "gru"], ["lstm"]))
def test_the_operators_follow_torchs_rules(cell: str) -> None:
    """Schema, no aliases, shapes without running, the backward pass, and both under
    `torch.compile`'s tracing.
    """
    for option in VARIANTS[cell]:
        torch.library.opcheck(
            {"lstm": ours.apply_lstm, "gru": ours.apply_gru}[cell], operands(cell, **option)
        )


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_gradient_of_data_is_not_computed(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the other gradients are the same."""
    inputs = on_device(inputs_of(cell, TIME, torch.float32))
    gradients = []
    for needs_dx in (True, False):
        inputs[0].requires_grad_(needs_dx)
        y_TBH, *_ = FUNCTIONS[cell](*inputs, Masks(), backend="triton")
        if not needs_dx:
            monkeypatch.setattr(ours, "input_gradient", None)
        gradients.append(torch.autograd.grad(y_TBH.square().sum(), inputs[1:]))
    torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("one_program")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compile_takes_a_model_whole() -> None:
    """One graph and no break, forward and back: `fullgraph` would raise."""
    torch.manual_seed(0)
    for layers in (
        LSTM(5, 7, 2, backend="triton").to(DEVICE),
        GRU(5, 7, backend="triton", reset_after=True).to(DEVICE),
    ):
        x_TBD = torch.randn(TIME, 3, 5, device=DEVICE)
        masks = draw(layers.dropout, layers.mask_shape(TIME, 3), Stream((1,)), DEVICE)

        def model(x: Tensor, layers: LSTM | GRU = layers, masks: Any = masks) -> Tensor:
            return layers(x.tanh(), masks=masks)[0].square().sum()

        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        losses = [f(x_TBD) for f in (model, compiled)]
        gradients = [torch.autograd.grad(loss, list(layers.parameters())) for loss in losses]
        assert torch.allclose(*losses) and max(relative_errors(list(gradients[1]), list(gradients[0]))) < 1e-5


@pytest.mark.usefixtures("one_program")
def test_loops_are_captured_with_sums_of_full_precision(
    replaying: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the user's setting, which stays."""
    matmul = torch.backends.cuda.matmul
    capture = ours.GRAPHS.capture
    seen = list[bool]()

    def noted(*arguments: Any) -> Graph:
        seen.append(matmul.allow_bf16_reduced_precision_reduction)
        return capture(*arguments)

    monkeypatch.setattr(ours.GRAPHS, "capture", noted)
    monkeypatch.setattr(operators, "exact_sums", lambda device_type: full_precision_sums())
    assert matmul.allow_bf16_reduced_precision_reduction
    for _ in range(2):
        agreement("lstm", masks_of("lstm", "variational", TIME), False)
    assert seen == [False, False] and matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize(
    ("cell", "option"), [("lstm", {}), ("gru", {"reset_after": False}), ("gru", {"reset_after": True})]
)
def test_second_derivatives_are_those_of_the_definition(cell: str, option: dict[str, bool]) -> None:
    """Of inputs and incoming gradients, with padding and masks."""
    masks = to(double(masks_of(cell, "variational_untied", TIME)), DEVICE)
    lengths = torch.tensor([1, TIME, 2], device=DEVICE)
    results = []
    for backend in ("triton", "reference"):
        inputs = on_device(inputs_of(cell, TIME, torch.float64))
        scale = torch.tensor(0.7, dtype=torch.float64, device=DEVICE, requires_grad=True)
        outputs = FUNCTIONS[cell](*inputs, masks, lengths=lengths, backend=backend, **option)
        first = torch.autograd.grad([scale * y.square().sum() for y in outputs], inputs, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [*inputs, scale])])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("one_program")
def test_an_autocast_around_it_changes_nothing() -> None:
    """It would round products that are to be exact."""
    inputs = on_device(inputs_of("lstm", TIME, torch.float32))
    masks = to(masks_of("lstm", "variational", TIME), DEVICE)
    expected = outputs_and_gradients(lambda *a: kernels.lstm(*a, masks, backend="triton"), inputs)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        actual = outputs_and_gradients(lambda *a: kernels.lstm(*a, masks, backend="triton"), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.usefixtures("one_program")
def test_a_gradient_that_does_not_come_is_zero() -> None:
    """Only the last state is used, or only one output."""
    masks = to(masks_of("lstm", "variational", TIME), DEVICE)
    for used in range(3):
        inputs = on_device(inputs_of("lstm", TIME, torch.float32))
        gradients = [
            torch.autograd.grad(kernels.lstm(*inputs, masks, backend=b)[used].square().sum(), inputs)
            for b in ("triton", "reference")
        ]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("t", "gate_stride", "time_stride"), [(1, 7, 2**31 + 8), (0, 2**30 + 8, 28)])
def test_elements_beyond_two_to_the_31_are_addressed(t: int, gate_stride: int, time_stride: int) -> None:
    """Of a tensor that is mostly not there: a step, or the fourth gate, lies further than an int32 can
    say.
    """
    numbers = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    count = t * time_stride + 3 * gate_stride + 7
    a = torch.empty(count, dtype=torch.float16, device=DEVICE)  # pages that nothing touches take no memory
    for gate in range(4):
        a[t * time_stride + gate * gate_stride :][:7] = numbers[gate]
    p, h, c, enter = (
        torch.zeros(s, device=DEVICE) for s in ((1, 28), (2 + t, 1, 7), (2 + t, 1, 7), (1, 1, 7))
    )
    programs.lstm_forward[(1, 2)](
        *(a, p, h, c, enter, None, None, None),
        *(t, t + 1, 1, 7, 7, gate_stride, time_stride, 28, 7, 28, 0, 0, 0),
        **{"GROUPS": 1, "ACC": tl.float32, "BLOCK": 4},
    )
    i, _, g, o = numbers
    torch.testing.assert_close(
        h[t + 1, 0].cpu(), o.sigmoid() * (i.sigmoid() * g.tanh()).tanh(), atol=2e-3, rtol=2e-3
    )


def test_functions_are_exact_where_exponentials_lose_digits_or_overflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loops, "BLOCK", 4096)
    x = torch.cat(
        [torch.linspace(-1, 1, 4001), torch.tensor([1e-30, -1e-6, 0.0, 88.0, -80.0, 1e4, -1e4])]
    ).to(DEVICE)
    size = len(x)
    a, p, h, c, enter = (
        x.repeat(1, 1, 4),
        *(torch.zeros(s, device=DEVICE) for s in ((1, 4 * size), (2, 1, size), (2, 1, size), (1, 1, size))),
    )
    numbers = (0, 1, 1, size, size, size, 0, 4 * size, size, 4 * size, 0, 0, 0)
    loops.launch(
        programs.lstm_forward, (a, p, h, c, enter, None, None, None), numbers, loops.Gates(a, 4), GROUPS=1
    )
    for gate, exact in ((0, x.double().sigmoid()), (2, x.double().tanh())):
        actual = a[0, 0].view(4, size)[gate].double()
        bound = (
            5e-7 if programs.INTERPRETED else 2e-6
        )  # a GPU's own exponential and division are a little off
        assert ((actual - exact).abs() <= bound * exact.abs()).all()
