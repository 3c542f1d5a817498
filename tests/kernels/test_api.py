"""Which back end runs, what it takes, and that memory layout makes no difference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_fused import inputs_of, masks_of
from vdrop_cli import kernels
from vdrop_cli.kernels import Masks, Norms

CPU = torch.device("cpu")
SHAPES = {
    "x": (2, 1, 3),
    "h": (1, 4),
    "w_ih": (12, 3),
    "w_hh": (12, 4),
    "b_ih": (12,),
    "b_hh": (12,),
}  # of a GRU


@pytest.mark.native
def test_auto_is_native_on_the_cpu() -> None:
    """And `fused` where neither `native` nor `triton` is for a device."""
    assert kernels.choose("auto", CPU) == "native"
    assert kernels.choose("auto", torch.device("meta")) == "fused"


def test_a_back_end_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(ValueError, match="choose auto, reference, fused, native or triton"):
        kernels.choose("cudnn", CPU)


def test_a_gru_has_no_cell_state_to_mask() -> None:
    zeros = map(torch.zeros, SHAPES.values())
    with pytest.raises(ValueError, match=r"masks\.c must be None"):
        kernels.gru(*zeros, kernels.Masks(c=torch.ones(1, 1, 4)))


@pytest.mark.parametrize("where", ["w_hh", "h", "masks.h", "lengths"])
def test_what_lies_on_another_device_is_named(where: str) -> None:
    tensors = {
        name: torch.zeros(shape, device="meta" if name == where else "cpu") for name, shape in SHAPES.items()
    }
    masks = kernels.Masks(h=torch.ones(1, 1, 1, 4, device="meta" if where == "masks.h" else "cpu"))
    lengths = torch.tensor([2], device="meta" if where == "lengths" else "cpu")
    with pytest.raises(ValueError, match=rf"^{where} must be on cpu like x, got one on meta$"):
        kernels.gru(*tensors.values(), masks, lengths=lengths)


@pytest.mark.parametrize("where", ["w_ih", "b_hh", "h", "masks.h"])
def test_what_is_of_another_type_is_named(where: str) -> None:
    types = {where: torch.float64}
    tensors = {
        name: torch.zeros(shape, dtype=types.get(name, torch.float32)) for name, shape in SHAPES.items()
    }
    masks = kernels.Masks(h=torch.ones(1, 1, 1, 4, dtype=types.get("masks.h", torch.float32)))
    with pytest.raises(ValueError, match=rf"^{where} must be torch\.float32 like x"):
        kernels.gru(*tensors.values(), masks)


@pytest.mark.parametrize("backend", ["reference", "fused", "native"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"w": torch.zeros(5, 4)}, r"w must be \[5, 3\], got \[5, 4\]"),
        ({"w": torch.zeros(6, 3)}, r"w must be \[5, 3\], got \[6, 3\]"),
        ({"b": torch.zeros(5, 1)}, r"b must be \[5\], got \[5, 1\]"),
        ({"b": torch.zeros(5, dtype=torch.float64)}, r"b must be torch\.float32 like w, got torch\.float64"),
        ({"b": torch.zeros(5, device="meta")}, "b must be on cpu like x, got one on meta"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, r"targets must be torch\.int64, got torch\.int32"),
        (
            {"targets": torch.zeros(2, dtype=torch.int64, device="meta")},
            "targets must be on cpu like x, got one on meta",
        ),
    ],
)
def test_what_does_not_fit_the_head_is_named(
    change: dict[str, torch.Tensor], said: str, backend: str
) -> None:
    """Compiled code would read beyond the end of what it is given, or numbers of another type."""
    fitting = {
        "x": torch.zeros(2, 3),
        "w": torch.zeros(5, 3),
        "b": torch.zeros(5),
        "targets": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=f"^{said}$"):
        kernels.linear_cross_entropy(*(fitting | change).values(), backend=backend)


@pytest.mark.parametrize("target", [-100, -1, 5])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", ["reference", "fused", "native"])
def test_targets_outside_the_vocabulary_are_refused(backend: str, requires_grad: bool, target: int) -> None:
    """Torch's cross-entropy leaves out -100, which would count as a loss of 0."""
    x, w, b = torch.zeros(2, 3), torch.zeros(5, 3, requires_grad=requires_grad), torch.zeros(5)
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds"):
        kernels.linear_cross_entropy(x, w, b, torch.tensor([1, target]), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "fused", "native"])
def test_the_head_takes_inputs_of_another_type_than_its_weights(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (2, 5))
    b, targets = torch.zeros(5), torch.tensor([1, 4])
    nll = kernels.linear_cross_entropy(x, w.float(), b, targets, backend=backend)
    torch.testing.assert_close(
        nll, torch.nn.functional.cross_entropy(x @ w.T, targets, reduction="none").float()
    )


def strided(tensor: Tensor | None) -> Tensor | None:
    """The same numbers with gaps between them, and of two dimensions or more with columns for rows."""
    if tensor is None:
        return None
    gaps = tensor.new_full((*reversed(tensor.shape), 2), torch.nan if tensor.is_floating_point() else 7)
    view = gaps[..., 0].permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("has_norms", [False, True], ids=["plain", "layer norm"])
@pytest.mark.parametrize("lengths", [None, [4, 0, 2], [2, 4, 4]], ids=str)
@pytest.mark.parametrize("policy", ["none", "variational_untied", "naive"])
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("lstm", {}),
        ("lstm", {"cells": True}),
        ("gru", {"reset_after": False}),
        ("gru", {"reset_after": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", "fused", "native"])
def test_strides_change_nothing(
    backend: str, cell: str, options: dict[str, bool], policy: str, lengths: list[int] | None, has_norms: bool
) -> None:
    """Of inputs, states, weights, masks, lengths, and of the gradients that come from above."""
    function: Any = kernels.lstm if cell == "lstm" else kernels.gru
    inputs = inputs_of(cell, 4, torch.float64)
    hidden, gates = inputs[1].shape[1], {"lstm": 4, "gru": 3}[cell]
    sizes = [gates * hidden] * 2 + [hidden, hidden] * (cell == "lstm")
    generator = torch.Generator().manual_seed(3)
    norms = [
        (1 + 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)).requires_grad_()
        for size in (sizes if has_norms else [])
    ]
    masks = Masks(*(m if m is None else m.double() for m in masks_of(cell, policy, 4)))
    lengths_B = None if lengths is None else torch.tensor(lengths)
    results = []
    for change in (lambda tensor: tensor, strided):
        arguments = [change(tensor) for tensor in (*inputs, *norms)]
        gains = Norms(*arguments[len(inputs) :]) if has_norms else None
        outputs = function(
            *arguments[: len(inputs)],
            Masks(*map(change, masks)),
            norms=gains,
            lengths=change(lengths_B),
            backend=backend,
            **options,
        )
        generator.manual_seed(5)
        upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, arguments, [change(dy) for dy in upstream])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "fused", "native"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hh": torch.ones(4)}, r"norms\.hh must be \[16\], got \[4\]"),
        (
            {"c": torch.ones(4, dtype=torch.float64)},
            r"norms\.c must be torch\.float32 like x, got torch\.float64",
        ),
        ({"ih": torch.ones(16, device="meta")}, r"norms\.ih must be on cpu like x, got one on meta"),
        ({"c": None}, r"norms must have ih, hh, c, c_bias, and nothing else"),
        ({"c_bias": None}, r"norms must have ih, hh, c, c_bias, and nothing else"),
    ],
)
def test_layer_norm_that_does_not_fit_is_named(
    change: dict[str, Tensor | None], said: str, backend: str
) -> None:
    """Compiled code would read beyond the end of a gain, or numbers of another type."""
    fitting = {"ih": torch.ones(16), "hh": torch.ones(16), "c": torch.ones(4), "c_bias": torch.ones(4)}
    zeros = [torch.zeros(s) for s in ((2, 1, 3), (1, 4), (1, 4), (16, 3), (16, 4), (16,), (16,))]
    with pytest.raises(ValueError, match=f"^{said}$"):
        kernels.lstm(*zeros, Masks(), norms=Norms(**fitting | change), backend=backend)
    if "c" not in change and "c_bias" not in change:
        return
    gru_zeros = map(torch.zeros, SHAPES.values())
    with pytest.raises(ValueError, match=r"^norms must have ih, hh, and nothing else$"):
        kernels.gru(
            *gru_zeros, Masks(), norms=Norms(torch.ones(12), torch.ones(12), torch.ones(4)), backend=backend
        )


@pytest.mark.parametrize("lengths", [torch.tensor([2.0]), torch.tensor([True])])
def test_lengths_are_whole_numbers(lengths: torch.Tensor) -> None:
    zeros = map(torch.zeros, SHAPES.values())
    with pytest.raises(ValueError, match=rf"^lengths must be whole numbers, got {lengths.dtype}$"):
        kernels.gru(*zeros, kernels.Masks(), lengths=lengths)


@pytest.mark.parametrize("backend", ["reference", "fused", "native"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_lengths_may_be_of_any_type_that_holds_them(dtype: torch.dtype, backend: str) -> None:
    """Of three hundred steps, a number that the smaller types do not hold."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(s, generator=generator) for s in ((300, 2, 3), (2, 4), (12, 3), (12, 4), (12,), (12,))
    ]
    lengths = torch.tensor([5, 100])
    (expected, actual) = (
        kernels.gru(*tensors, kernels.Masks(), lengths=of, backend=backend)[1]
        for of in (lengths, lengths.to(dtype))
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("lengths", [None, [4, 0, 2]], ids=str)
@pytest.mark.parametrize("policy", ["variational_untied", "moon", "none"])
@pytest.mark.parametrize("backend", ["fused", "native"])
def test_the_cell_states_of_all_steps_have_the_gradients_of_the_definition(
    backend: str, policy: str, lengths: list[int] | None
) -> None:
    """First and second derivatives, beside those of the outputs and the last states."""
    masks = Masks(*(m if m is None else m.double() for m in masks_of("lstm", policy, 4)))
    lengths_B = None if lengths is None else torch.tensor(lengths)
    for used in (slice(None), slice(3, 4)):
        results = []
        for name in (backend, "reference"):
            inputs = inputs_of("lstm", 4, torch.float64)
            outputs = kernels.lstm(*inputs, masks, cells=True, lengths=lengths_B, backend=name)
            assert (
                len(outputs) == 4 and len(kernels.lstm(*inputs, masks, lengths=lengths_B, backend=name)) == 3
            )
            generator = torch.Generator().manual_seed(5)
            upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
            loss = sum((y * d).sum() for y, d in zip(outputs[used], upstream[used], strict=True))
            first = torch.autograd.grad(loss, inputs, retain_graph=True)
            again = torch.autograd.grad(loss, inputs, create_graph=True)
            results.append(
                [*outputs, *first, *torch.autograd.grad(sum(g.square().sum() for g in again), inputs)]
            )
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
