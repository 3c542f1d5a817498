"""Derivatives of gradients, and gradients in batches: the hand-written back ends against the definition and
torch's own modules.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.kernels.test_fused import double, inputs_of, masks_of, relative_errors
from tests.kernels.test_head import inputs_of as head
from vdrop_cli import kernels
from vdrop_cli.kernels import linear_cross_entropy
from vdrop_cli.layers import GRU, LSTM

CELLS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"lstm": kernels.lstm, "gru": kernels.gru}
VARIANTS = [("lstm", {}), ("gru", {}), ("gru", {"reset_after": True})]
POLICIES = [
    ("lstm", "none"),
    ("lstm", "naive"),
    ("lstm", "moon"),
    ("lstm", "variational"),
    ("gru", "none"),
    ("gru", "variational_untied"),
]


def pair(cell: str) -> tuple[nn.Module, nn.Module]:
    """Two layers of torch's, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](3, 4, 2, dtype=torch.float64)
    return theirs, {"lstm": LSTM, "gru": GRU}[cell].from_torch(theirs, backend="fused")


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_hessian_is_torchs(cell: str) -> None:
    theirs, ours = pair(cell)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    expected = torch.autograd.functional.hessian(lambda x: theirs(x)[0].sin().sum(), x)
    assert expected.norm() > 0.01
    for vectorize in (False, True):
        same(
            torch.autograd.functional.hessian(lambda x: ours(x)[0].sin().sum(), x, vectorize=vectorize),
            expected,
        )
    v = torch.randn_like(x)
    hvp = [
        torch.autograd.functional.hvp(lambda x, m=module: m(x)[0].sin().sum(), x, v)[1]
        for module in (ours, theirs)
    ]
    same(*hvp)
    jacobians = [
        torch.autograd.functional.jacobian(lambda x, m=m: m(x)[0], x, vectorize=m is ours)
        for m in (ours, theirs)
    ]
    same(*jacobians)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_gradient_penalty_reaches_all_weights_as_with_torch(cell: str) -> None:
    results = []
    for module in reversed(pair(cell)):
        x = torch.randn(
            3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        y, _ = module(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (y.sum() + (dx.norm() - 1).square()).backward()
        results.append([x.grad, *(p.grad for p in module.parameters())])
    same(*results)


def penalty_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], used: slice = slice(None)
) -> list[Tensor]:
    """Of inputs and incoming gradients, of a function of all first gradients."""
    outputs = function(*inputs)[used]
    generator = torch.Generator().manual_seed(9)
    upstream = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype).requires_grad_()
        for y in outputs
    ]
    first = torch.autograd.grad(outputs, inputs, upstream, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [*inputs, *upstream])]


@pytest.mark.parametrize("lengths", [None, [4, 0, 2], [4, 4, 1]], ids=str)
@pytest.mark.parametrize(("cell", "policy"), POLICIES)
def test_masks_and_lengths_are_those_of_the_definition(
    cell: str, policy: str, lengths: list[int] | None
) -> None:
    """Padding is no number for `fused`; it gets no second derivative."""
    masks, lengths_B = double(masks_of(cell, policy, 4)), None if lengths is None else torch.tensor(lengths)
    for option in [{}] if cell == "lstm" else [{"reset_after": False}, {"reset_after": True}]:
        results = []
        for backend, padding in (("fused", torch.nan), ("reference", 0.0)):
            x, *others = inputs_of(cell, 4, torch.float64)
            if lengths_B is not None:
                x = (
                    x.detach()
                    .masked_fill((torch.arange(4)[:, None] >= lengths_B)[..., None], padding)
                    .requires_grad_()
                )
            results.append(
                penalty_gradients(
                    partial(CELLS[cell], masks=masks, lengths=lengths_B, backend=backend, **option),
                    [x, *others],
                )
            )
        same(*results)


@pytest.mark.parametrize("used", [slice(0, 1), slice(1, None)], ids=["outputs", "last state"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_outputs_may_be_unused(cell: str, used: slice) -> None:
    masks = double(masks_of(cell, "variational", 3))
    functions = (partial(CELLS[cell], masks=masks, backend=backend) for backend in ("fused", "reference"))
    same(*(penalty_gradients(function, inputs_of(cell, 3, torch.float64), used) for function in functions))


@pytest.mark.parametrize(("cell", "option"), VARIANTS)
def test_they_agree_with_numerical_differences(cell: str, option: dict[str, bool]) -> None:
    generator = torch.Generator().manual_seed(2)
    rows, states = (8, 2) if cell == "lstm" else (6, 1)
    shapes = [(2, 1, 2), *[(1, 2)] * states, (rows, 2), (rows, 2), (rows,), (rows,)]
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    ]
    masks = kernels.Masks(h=torch.tensor([0.5, 2.0], dtype=torch.float64).view(1, 1, 1, 2))
    assert torch.autograd.gradgradcheck(lambda *a: CELLS[cell](*a, masks, backend="fused", **option), inputs)


@pytest.mark.parametrize(("cell", "option"), VARIANTS)
def test_arguments_may_depend_on_one_another(cell: str, option: dict[str, bool]) -> None:
    """The first state is a function of the input, and both biases are one tensor: nothing is counted twice,
    and views are taken.
    """
    results = []
    for backend in ("fused", "reference"):
        x, *others = inputs_of(cell, 3, torch.float64)
        *states, w_ih, w_hh, b, _ = others
        seen = x.transpose(0, 1).contiguous().transpose(0, 1)
        states = [x.mean() * state for state in states]
        outputs = CELLS[cell](seen, *states, w_ih, w_hh, b, b, kernels.Masks(), backend=backend, **option)
        first = torch.autograd.grad(outputs[0].square().sum(), [x, w_hh, b], create_graph=True)
        results.append(
            [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [x, w_ih, w_hh, b])]
        )
    same(*results)


@pytest.mark.parametrize("frozen", ["input", "weights"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    results = []
    for backend in ("fused", "reference"):
        x, *others = inputs_of("lstm", 3, torch.float64)
        places = [x] if frozen == "input" else others[2:]
        for tensor in places:
            tensor.requires_grad_(False)
        inputs = [t for t in (x, *others) if t.requires_grad]
        loss = kernels.lstm(x, *others, kernels.Masks(), backend=backend)[0].square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    same(*results)


@pytest.mark.parametrize(("cell", "option"), VARIANTS)
def test_plain_gradients_do_not_change_when_second_ones_are_taken(cell: str, option: dict[str, bool]) -> None:
    """The same graph is used for both, in turns; plain gradients need no graph themselves."""
    inputs = inputs_of(cell, 3, torch.float32)
    loss = CELLS[cell](*inputs, masks_of(cell, "variational", 3), backend="fused", **option)[0].square().sum()
    before = torch.autograd.grad(loss, inputs, retain_graph=True)
    graphed = torch.autograd.grad(loss, inputs, create_graph=True)
    second = torch.autograd.grad(graphed[0].square().sum(), inputs, retain_graph=True)
    after = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(before, after, strict=True))
    assert max(relative_errors([g.detach() for g in graphed], list(before))) < 1e-5
    assert all(g.isfinite().all() for g in second) and second[0].any()


def test_bf16_products_have_second_derivatives_close_to_exact_ones() -> None:
    """Also under a user's autocast: to the bit those without."""
    function = partial(kernels.lstm, masks=kernels.Masks(), backend="fused", compute_dtype=torch.bfloat16)
    actual = penalty_gradients(function, inputs_of("lstm", 3, torch.float32))
    expected = penalty_gradients(
        partial(kernels.lstm, masks=kernels.Masks(), backend="reference"), inputs_of("lstm", 3, torch.float64)
    )
    assert 1e-5 < max(relative_errors([t.detach() for t in actual], [t.detach() for t in expected])) < 5e-2
    inputs = inputs_of("lstm", 3, torch.float32)
    y, *_ = function(*inputs)
    (plain,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (cast,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
    assert torch.equal(plain, cast)


def test_an_input_changed_in_place_is_an_error() -> None:
    inputs = inputs_of("lstm", 3, torch.float64)
    start = inputs[1].detach().clone()
    loss = kernels.lstm(inputs[0], start, *inputs[2:], kernels.Masks(), backend="fused")[0].sum()
    start.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, inputs[0], create_graph=True)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("plain_first", [True, False])
def test_the_head_has_the_second_derivatives_of_cross_entropy(even: bool, plain_first: bool) -> None:
    """Whatever backward pass was before, which scales the gradients that are there in place."""
    results = []
    for function in (
        partial(linear_cross_entropy, backend="fused"),
        lambda x, w, b, t: F.cross_entropy(x @ w.T + b, t, reduction="none"),
    ):
        tensors, targets = head(5, 4, torch.float64)
        nll_N = function(*tensors, targets)
        scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        loss = (
            scale * nll_N.sum()
            if even
            else (scale * torch.linspace(-1, 2, 5, dtype=torch.float64) * nll_N).sum()
        )
        plain = torch.autograd.grad(loss, tensors, retain_graph=True) if plain_first else ()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), [*tensors, scale], retain_graph=True
        )
        results.append([*plain, *first, *second, *torch.autograd.grad(loss, tensors)])
    same(*results)
    tensors, targets = head(3, 4, torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda *a: linear_cross_entropy(*a, targets, backend="fused"), tensors
    )


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_a_compiled_layer_keeps_the_penalty() -> None:
    _, ours = pair("lstm")
    results = []
    for module in (torch.compile(ours, backend="eager", fullgraph=True), ours):
        x = torch.ones(2, 1, 3, dtype=torch.float64, requires_grad=True)
        y, _ = module(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(y.sum() + dx.square().sum(), x))
    same(*results)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in its forward mode
@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "hessian"])
def test_transforms_of_torch_func_need_the_reference(transform: str) -> None:
    theirs, ours = pair("lstm")
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    function = {
        "grad": lambda module: torch.func.grad(lambda x: module(x)[0].sin().sum())(x),
        "vmap": lambda module: torch.func.vmap(lambda x: module(x)[0])(torch.stack([x, 2 * x])),
        "jacrev": lambda module: torch.func.jacrev(lambda x: module(x)[0])(x),
        "hessian": lambda module: torch.func.hessian(lambda x: module(x)[0].sin().sum())(x),
    }[transform]
    for backend in ("fused", "native", "triton"):
        ours.backend = backend
        with pytest.raises(
            ValueError,
            match=rf'^backend={backend} does not support .* torch\.func .*; use backend="reference" or',
        ):
            function(ours)
    expected = {
        "grad": lambda: torch.autograd.functional.jacobian(lambda x: theirs(x)[0].sin().sum(), x),
        "vmap": lambda: torch.stack([theirs(x)[0], theirs(2 * x)[0]]),
        "jacrev": lambda: torch.autograd.functional.jacobian(lambda x: theirs(x)[0], x),
        "hessian": lambda: torch.autograd.functional.hessian(lambda x: theirs(x)[0].sin().sum(), x),
    }[transform]()
    for backend in ("reference", "auto"):
        ours.backend = backend
        same(function(ours), expected)


def test_the_head_needs_the_reference_in_transforms_too() -> None:
    (x, w, b), targets = head(3, 4, torch.float64)
    with pytest.raises(ValueError, match=r'use backend="reference" or "auto"$'):
        torch.func.grad(lambda x: linear_cross_entropy(x, w, b, targets, backend="fused").sum())(x)
    actual = torch.func.grad(lambda x: linear_cross_entropy(x, w, b, targets).sum())(x)
    same(actual, torch.autograd.grad(F.cross_entropy(x @ w.T + b, targets, reduction="sum"), x)[0])
