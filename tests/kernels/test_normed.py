"""Layer norm in the cells against the definition."""

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_fused import inputs_of, masks_of, relative_errors
from vdrop_cli import kernels
from vdrop_cli.kernels import Masks, Norms

CELLS: dict[str, Any] = {"lstm": kernels.lstm, "gru": kernels.gru}
CASES = [
    ("lstm", {}),
    ("lstm", {"cells": True}),
    ("gru", {"reset_after": False}),
    ("gru", {"reset_after": True}),
]


def norms_of(cell: str, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """Gains about one and biases about zero."""
    generator = torch.Generator().manual_seed(11)
    sizes = [4 * hidden, 4 * hidden, hidden, hidden] if cell == "lstm" else [3 * hidden, 3 * hidden]
    return [
        (1 + 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for size in sizes
    ]


def double(masks: Masks) -> Masks:
    return Masks(*(mask if mask is None else mask.double() for mask in masks))


def results(
    backend: str, cell: str, masks: Masks, lengths: list[int] | None, second: bool, **options: Any
) -> list[Tensor]:
    """Outputs, and gradients of all that has one, first and second; padding is no number where it is never to
    be read.
    """
    x, *others = inputs_of(cell, 4, torch.float64)
    norms = norms_of(cell, others[0].shape[1], torch.float64)
    lengths_B = None if lengths is None else torch.tensor(lengths)
    if lengths_B is not None:
        padding = 0.0 if backend == "reference" else torch.nan
        x = (
            x.detach()
            .masked_fill((torch.arange(4)[:, None] >= lengths_B)[..., None], padding)
            .requires_grad_()
        )
    inputs = [x, *others, *norms]
    outputs = CELLS[cell](
        x, *others, masks, norms=Norms(*norms), lengths=lengths_B, backend=backend, **options
    )
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    loss = sum((y * d).sum() for y, d in zip(outputs, upstream, strict=True))
    first = torch.autograd.grad(loss, inputs, create_graph=second)
    more = torch.autograd.grad(sum(g.square().sum() for g in first), inputs) if second else ()
    return [*outputs, *first, *more]


@pytest.mark.parametrize("lengths", [None, [4, 0, 2], [1, 4, 4]], ids=str)
@pytest.mark.parametrize("policy", ["none", "variational", "variational_untied", "naive", "moon"])
@pytest.mark.parametrize(("cell", "options"), CASES, ids=str)
@pytest.mark.parametrize("ours", ["fused", "native"])
def test_outputs_and_gradients_are_those_of_the_definition(
    ours: str, cell: str, options: dict[str, bool], policy: str, lengths: list[int] | None
) -> None:
    if policy == "moon" and cell == "gru":
        pytest.skip("a GRU has no cell state")
    masks = double(masks_of(cell, policy, 4))
    actual, expected = (
        results(backend, cell, masks, lengths, False, **options) for backend in (ours, "reference")
    )
    assert max(relative_errors(actual, expected)) < 1e-9


@pytest.mark.parametrize("policy", ["none", "variational_untied"])
@pytest.mark.parametrize(("cell", "options"), CASES, ids=str)
@pytest.mark.parametrize("ours", ["fused", "native"])
def test_sequences_without_a_word_return_their_state(
    ours: str, cell: str, options: dict[str, bool], policy: str
) -> None:
    x, *states_and_weights = inputs_of(cell, 4, torch.float64)
    states = states_and_weights[: 2 if cell == "lstm" else 1]
    norms = Norms(*norms_of(cell, states[0].shape[1], torch.float64))
    lengths_B = torch.zeros(x.shape[1], dtype=torch.int64)
    masks = double(masks_of(cell, policy, 4))
    y, *rest = CELLS[cell](
        x, *states_and_weights, masks, norms=norms, lengths=lengths_B, backend=ours, **options
    )
    assert not y.any() and all(map(torch.equal, rest, states))
    sum(part.sum() for part in rest[: len(states)]).backward()
    assert all(torch.equal(state.grad, torch.ones_like(state)) for state in states)
    weights = [x, *states_and_weights[len(states) :], *(n for n in norms if n is not None)]
    assert not any(weight.grad.any() for weight in weights if weight.grad is not None)


@pytest.mark.parametrize(("cell", "options"), CASES, ids=str)
@pytest.mark.parametrize("ours", ["fused", "native"])
def test_second_derivatives_are_those_of_the_definition(
    ours: str, cell: str, options: dict[str, bool]
) -> None:
    masks = double(masks_of(cell, "variational_untied", 4))
    actual, expected = (
        results(backend, cell, masks, [4, 0, 2], True, **options) for backend in (ours, "reference")
    )
    assert max(relative_errors(actual, expected)) < 1e-9


@pytest.mark.parametrize("policy", ["variational", "variational_untied"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_products_in_bf16_are_near(cell: str, policy: str) -> None:
    """Errors of the size of bf16's rounding, which layer norm magnifies where a gradient is a small
    difference.
    """
    results = []
    for compute_dtype in (None, torch.bfloat16):
        inputs = inputs_of(cell, 4, torch.float32)
        norms = norms_of(cell, inputs[1].shape[1], torch.float32)
        outputs = CELLS[cell](
            *inputs, masks_of(cell, policy, 4), norms=Norms(*norms), compute_dtype=compute_dtype
        )
        loss = sum(y.square().sum() for y in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [*inputs, *norms])])
    errors = relative_errors(*reversed(results))
    assert 0 < statistics.median(errors) < 0.03 and max(errors) < 0.2


@pytest.mark.native
@pytest.mark.parametrize(("cell", "options"), [CASES[0], *CASES[2:]], ids=str)
def test_auto_is_native_on_the_cpu_and_other_types_are_fuseds(cell: str, options: dict[str, bool]) -> None:
    """A mask on the cell state may be one number for all units; float32, of sizes that no vector divides."""
    masks = Masks(c=torch.full((1, 1, 1), 0.75)) if cell == "lstm" else Masks()
    results = []
    for backend in ("auto", "native", "reference"):
        inputs = inputs_of(cell, 4, torch.float32)
        norms = norms_of(cell, inputs[1].shape[1], torch.float32)
        outputs = CELLS[cell](*inputs, masks, norms=Norms(*norms), backend=backend, **options)
        results.append(
            [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), [*inputs, *norms])]
        )
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert max(relative_errors(results[1], results[2])) < 1e-5
    half = inputs_of(cell, 4, torch.bfloat16)
    half_norms = Norms(*norms_of(cell, half[1].shape[1], torch.bfloat16))
    fused, auto = (
        CELLS[cell](*half, Masks(), norms=half_norms, backend=backend, **options)[0]
        for backend in ("fused", "auto")
    )
    assert torch.equal(fused, auto)
    for backend, said in (("native", "no kernels for torch.bfloat16"), ("triton", "has no layer norm")):
        with pytest.raises(ValueError, match=said):
            CELLS[cell](*half, Masks(), norms=half_norms, backend=backend, **options)


def test_gains_act_alone_where_weights_are_scaled() -> None:
    """Layer norm takes no notice of the size of the weights (but for epsilon)."""
    x, h, c, w_ih, w_hh, b_ih, b_hh = inputs_of("lstm", 3, torch.float64)
    norms = Norms(*norms_of("lstm", h.shape[1], torch.float64))
    big = kernels.lstm(x, h, c, 1e3 * w_ih, 1e3 * w_hh, b_ih, b_hh, Masks(), norms=norms)
    bigger = kernels.lstm(x, h, c, 1e6 * w_ih, 1e5 * w_hh, b_ih, b_hh, Masks(), norms=norms)
    torch.testing.assert_close(big, bigger, rtol=1e-5, atol=1e-7)


def test_compile_takes_them_whole() -> None:
    inputs = inputs_of("gru", 3, torch.float32)
    norms = Norms(*norms_of("gru", inputs[1].shape[1], torch.float32))

    def model(*tensors: Tensor) -> Tensor:
        return kernels.gru(*tensors, Masks(), norms=norms)[0].sin()

    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs), model(*inputs)
    )
