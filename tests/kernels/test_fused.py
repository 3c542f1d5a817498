"""The hand-written cells, `fused` and `native`, against the definition: every policy's masks, all outputs and
all gradients.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.conftest import CELLS_AND_POLICIES, settings
from vdrop_cli.dropout import MaskShape, draw
from vdrop_cli.kernels import Masks, fused, gru, lstm
from vdrop_cli.kernels.products import WeightMatrices, WeightMatrix
from vdrop_cli.random_streams import Stream

BATCH = 3
INPUT = 5
HIDDEN = 7
Function = Callable[..., tuple[Tensor, ...]]
both_back_ends = pytest.mark.parametrize("backend", ["fused", "native"])


def inputs_of(cell: str, time: int, dtype: torch.dtype) -> list[Tensor]:
    rows = {"lstm": 4, "gru": 3}[cell] * HIDDEN
    states = [(BATCH, HIDDEN)] * {"lstm": 2, "gru": 1}[cell]
    shapes = [(time, BATCH, INPUT), *states, (rows, INPUT), (rows, HIDDEN), (rows,), (rows,)]
    generator = torch.Generator().manual_seed(time)
    scale = (
        1.3 * HIDDEN**-0.5
    )  # large enough for gates to saturate, small enough for the recurrence not to be chaotic
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype).requires_grad_()
        for shape in shapes
    ]


def outputs_and_gradients(
    function: Function, inputs: list[Tensor], used: slice = slice(None)
) -> list[Tensor]:
    """With a random gradient from upstream for each output that is used."""
    outputs = function(*inputs)
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs[used], inputs, upstream[used])]


def relative_errors(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    assert all(f.isfinite().all() for f in actual)  # `max` passes over NaN
    return [
        ((f.double() - e.double()).norm() / e.double().norm()).item()
        for f, e in zip(actual, expected, strict=True)
    ]


def masks_of(cell: str, policy: str, time: int) -> Masks:
    dropout = settings(f"model={cell}_small", f"dropout={policy}").dropout.to_policy()
    shape = MaskShape(time, BATCH, (INPUT,), HIDDEN, {"lstm": 4, "gru": 3}[cell])
    return draw(dropout, shape, Stream((0, policy))).layers[0]


def double(masks: Masks) -> Masks:
    return Masks(*(None if m is None else m.double() for m in masks))


@both_back_ends
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("time", [1, 2, 35])
@pytest.mark.parametrize(("cell", "policy"), CELLS_AND_POLICIES)
@pytest.mark.parametrize("padded", [False, True])
def test_fp32_agrees_with_the_definition_in_float64(
    backend: str, cell: str, policy: str, time: int, padded: bool
) -> None:
    masks = masks_of(cell, policy, time)
    lengths = torch.tensor([1, time, (time + 1) // 2]) if padded else None
    for option in [{}] if cell == "lstm" else [{"reset_after": False}, {"reset_after": True}]:
        function = {"lstm": lstm, "gru": gru}[cell]
        expected = outputs_and_gradients(
            lambda *a, f=function, o=option: f(*a, double(masks), lengths=lengths, backend="reference", **o),
            inputs_of(cell, time, torch.float64),
        )
        actual = outputs_and_gradients(
            lambda *a, f=function, o=option: f(*a, masks, lengths=lengths, backend=backend, **o),
            inputs_of(cell, time, torch.float32),
        )
        assert max(relative_errors(actual, expected)) < 1e-5


@both_back_ends
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("cell", "policy"), CELLS_AND_POLICIES)
@pytest.mark.parametrize("lengths", [[4, 0, 6], [6, 4, 0], [2, 5, 1], [3, 3, 3], [0, 0, 0]], ids=str)
def test_padding_is_never_read(
    backend: str, cell: str, policy: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a number there changes nothing and gets no gradient; what has no word at all keeps its state;
    slopes of a few steps at once.

    `triton_cells.py` pads with what is no number, too.
    """
    monkeypatch.setattr(fused, "DERIVATIVE_BLOCK", 4 * HIDDEN)
    masks, lengths_B = double(masks_of(cell, policy, 6)), torch.tensor(lengths)
    padding_TB = torch.arange(6)[:, None] >= lengths_B
    for option in [{}] if cell == "lstm" else [{"reset_after": False}, {"reset_after": True}]:
        results = []
        for name, padding in (("reference", 0.0), ("reference", torch.nan), (backend, torch.nan)):
            x, *others = inputs_of(cell, 6, torch.float64)
            x = x.detach().masked_fill(padding_TB[..., None], padding).requires_grad_()
            function = partial(
                {"lstm": lstm, "gru": gru}[cell], masks=masks, lengths=lengths_B, backend=name, **option
            )
            results.append(outputs_and_gradients(function, [x, *others]))
            assert not results[-1][len(others) - 3][padding_TB].any()  # of x, after the outputs
        for exact, *others in zip(*results, strict=True):
            for ours in others:
                torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@both_back_ends
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "lengths", [None, torch.tensor([2, 6, 3], dtype=torch.uint8)], ids=["even", "padded"]
)
@pytest.mark.parametrize("used", [slice(0, 1), slice(1, None)], ids=["outputs", "last state"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_what_is_not_used_gives_no_gradient(
    backend: str, cell: str, used: slice, lengths: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "DERIVATIVE_BLOCK", 4 * HIDDEN)
    masks = double(masks_of(cell, "variational", 6))
    expected, actual = (
        outputs_and_gradients(
            partial({"lstm": lstm, "gru": gru}[cell], masks=masks, lengths=lengths, backend=name),
            inputs_of(cell, 6, torch.float64),
            used,
        )
        for name in ("reference", backend)
    )
    assert max(relative_errors(actual, expected)) < 1e-12


@both_back_ends
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_batch_of_nothing(backend: str, cell: str, compute_dtype: torch.dtype | None) -> None:
    x, *others = inputs_of(cell, 3, torch.float32)
    states, weights = others[:-4], others[-4:]
    inputs = [x[:, :0], *(state[:0] for state in states), *weights]
    outputs = {"lstm": lstm, "gru": gru}[cell](*inputs, Masks(), backend=backend, compute_dtype=compute_dtype)
    assert outputs[0].shape == (3, 0, HIDDEN)
    assert not any(gradient.any() for gradient in torch.autograd.grad(outputs[0].sum(), weights))


@both_back_ends
@pytest.mark.parametrize("x_gates", [0, 1, 4])
@pytest.mark.parametrize("h_gates", [0, 1, 4])
def test_tied_and_untied_masks_mix(backend: str, x_gates: int, h_gates: int) -> None:
    """The contract lets masks of input and recurrence be tied or not, fixed or not, independently."""
    generator = torch.Generator().manual_seed(4)
    mask_x = torch.rand(6, x_gates, 1, INPUT, generator=generator, dtype=torch.float64) if x_gates else None
    mask_h = (
        torch.rand(1, h_gates, BATCH, HIDDEN, generator=generator, dtype=torch.float64) if h_gates else None
    )
    expected, actual = (
        outputs_and_gradients(
            lambda *a, b=name: lstm(*a, Masks(mask_x, mask_h), backend=b), inputs_of("lstm", 6, torch.float64)
        )
        for name in ("reference", backend)
    )
    assert max(relative_errors(actual, expected)) < 1e-12


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("cell", "policy"), CELLS_AND_POLICIES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.native
@pytest.mark.parametrize("packed", [False, True], ids=["small", "packed as large ones"])
def test_bf16_products_stay_close_to_the_definition(
    cell: str, policy: str, padded: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each as close as the plain loop comes to it under torch's autocast; on tensors large enough for
    chance to even out.
    """
    for name, size in {"BATCH": 8, "INPUT": 40, "HIDDEN": 48}.items():
        monkeypatch.setattr(f"{__name__}.{name}", size)
    if packed:
        monkeypatch.setattr(WeightMatrix, "TRANSPOSED_FROM", 0)
        monkeypatch.setattr(WeightMatrices, "PACKED_FROM", 0)
    masks = masks_of(cell, policy, 12)
    lengths = torch.tensor([1, 12, 5, 12, 8, 12, 12, 3]) if padded else None
    for option in [{}] if cell == "lstm" else [{"reset_after": False}, {"reset_after": True}]:
        options = {"lengths": lengths, **option}
        function = partial({"lstm": lstm, "gru": gru}[cell], **options)
        expected = outputs_and_gradients(
            lambda *a, f=function: f(*a, double(masks), backend="reference"),
            inputs_of(cell, 12, torch.float64),
        )
        inputs = inputs_of(cell, 12, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            usual = outputs_and_gradients(lambda *a, f=function: f(*a, masks, backend="reference"), inputs)
        for backend in ("reference", "fused", "native"):
            actual = outputs_and_gradients(
                lambda *a, b=backend, f=function: f(*a, masks, backend=b, compute_dtype=torch.bfloat16),
                inputs_of(cell, 12, torch.float32),
            )
            errors = relative_errors(actual, expected)
            assert max(errors) < 2e-2
            assert all(
                ours < 1.5 * theirs
                for ours, theirs in zip(errors, relative_errors(usual, expected), strict=True)
            )
            assert max(errors) > 1e-5, "these products were not bf16"
            assert all(tensor.dtype == torch.float32 for tensor in actual)


@both_back_ends
@pytest.mark.parametrize(("cell", "option"), [("lstm", {}), ("gru", {}), ("gru", {"reset_after": True})])
@pytest.mark.parametrize("policy", ["none", "variational_untied"])
def test_an_autocast_around_it_changes_nothing(
    backend: str, cell: str, option: dict[str, bool], policy: str
) -> None:
    """Forward and back, to the bit."""
    masks = masks_of(cell, policy, 6)
    function = partial({"lstm": lstm, "gru": gru}[cell], masks=masks, backend=backend, **option)
    expected = outputs_and_gradients(function, inputs_of(cell, 6, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_gradients(function, inputs_of(cell, 6, torch.float32))
    assert all(map(torch.equal, actual, expected))


@both_back_ends
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "lengths", [None, torch.tensor([2, 4, 1]), torch.tensor([4, 2, 1])], ids=["even", "padded", "sorted"]
)
@pytest.mark.parametrize(("cell", "policy"), CELLS_AND_POLICIES)
def test_gradients_can_be_asked_for_twice(
    backend: str, cell: str, policy: str, lengths: Tensor | None, compute_dtype: torch.dtype | None
) -> None:
    """Backward reads what forward saved and leaves it as it was; no two results share memory, so that each
    can be changed in place.
    """
    inputs = inputs_of(cell, 4, torch.float32)
    function = {"lstm": lstm, "gru": gru}[cell]
    outputs = function(
        *inputs, masks_of(cell, policy, 4), lengths=lengths, backend=backend, compute_dtype=compute_dtype
    )
    first, second = (torch.autograd.grad(outputs[0].sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    tensors = [*outputs, *first]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    torch.nn.functional.dropout(outputs[0], inplace=True)


def test_masks_are_of_the_inputs_type() -> None:
    mask = torch.ones(1, 1, 1, INPUT, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"masks\.x must be torch\.float32 like x, got torch\.float64"):
        lstm(*inputs_of("lstm", 2, torch.float32), Masks(x=mask))
