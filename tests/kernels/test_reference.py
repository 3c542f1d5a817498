"""The definition of the cells against torch's own, and against numerical gradients."""

import pytest
import torch
from torch import Tensor, nn

from vdrop_cli.kernels import Masks, gru, linear_cross_entropy, lstm


def random_tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).mul_(0.5).requires_grad_()
        for shape in shapes
    ]


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    """With a random gradient from upstream for each output."""
    upstream = random_tensors(*(tuple(y.shape) for y in outputs), seed=1)
    return list(torch.autograd.grad(outputs, inputs, upstream))


@pytest.mark.parametrize("time", [1, 6])
def test_without_masks_the_lstm_is_torchs(time: int) -> None:
    theirs = nn.LSTM(5, 7, dtype=torch.float64)
    x, h, c = random_tensors((time, 3, 5), (3, 7), (3, 7))
    weights = [theirs.weight_ih_l0, theirs.weight_hh_l0, theirs.bias_ih_l0, theirs.bias_hh_l0]
    y, (last_h, last_c) = theirs(x, (h[None], c[None]))
    expected, actual = (y, last_h[0], last_c[0]), lstm(x, h, c, *weights, Masks(), backend="reference")
    inputs = [x, h, c, *weights]
    for theirs_is, ours_is in zip(
        (*expected, *gradients(expected, inputs)), (*actual, *gradients(actual, inputs)), strict=True
    ):
        torch.testing.assert_close(ours_is, theirs_is, rtol=1e-10, atol=1e-10)


def test_without_masks_the_gru_that_resets_after_the_product_is_torchs() -> None:
    theirs = nn.GRU(5, 7, dtype=torch.float64)
    x, h = random_tensors((6, 3, 5), (3, 7))
    weights = [theirs.weight_ih_l0, theirs.weight_hh_l0, theirs.bias_ih_l0, theirs.bias_hh_l0]
    y, last_h = theirs(x, h[None])
    expected, actual = (y, last_h[0]), gru(x, h, *weights, Masks(), reset_after=True, backend="reference")
    inputs = [x, h, *weights]
    for theirs_is, ours_is in zip(
        (*expected, *gradients(expected, inputs)), (*actual, *gradients(actual, inputs)), strict=True
    ):
        torch.testing.assert_close(ours_is, theirs_is, rtol=1e-10, atol=1e-10)


def test_one_step_of_the_papers_gru_by_hand() -> None:
    """One unit, one input: the reset gate multiplies h before the recurrent product of the candidate."""
    w = [0.1, 0.2, 0.3]
    u = [0.4, 0.5, 0.6]
    b = [0.01, 0.02, 0.03]
    x, h = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.8, dtype=torch.float64)
    r = (w[0] * x + u[0] * h + b[0]).sigmoid()
    z = (w[1] * x + u[1] * h + b[1]).sigmoid()
    n = (w[2] * x + u[2] * (r * h) + b[2]).tanh()
    column = lambda values: torch.tensor(values, dtype=torch.float64)[:, None]  # noqa: E731
    zeros = torch.zeros(3, dtype=torch.float64)
    y, _ = gru(
        x.view(1, 1, 1),
        h.view(1, 1),
        column(w),
        column(u),
        column(b)[:, 0],
        zeros,
        Masks(),
        backend="reference",
    )
    assert y.item() == pytest.approx(((1 - z) * n + z * h).item(), abs=1e-15)


@pytest.mark.parametrize("gates", [1, 4])
def test_gradients_of_the_lstm_are_its_derivatives(gates: int) -> None:
    inputs = random_tensors((3, 2, 2), (2, 3), (2, 3), (12, 2), (12, 3), (12,), (12,))
    mask_x, mask_h, mask_c = (
        m.detach() for m in random_tensors((1, gates, 2, 2), (3, gates, 2, 3), (1, 2, 3), seed=2)
    )
    masks = Masks(mask_x, mask_h, mask_c)
    assert torch.autograd.gradcheck(
        lambda *a: lstm(*a, masks, lengths=torch.tensor([3, 2]), backend="reference"), inputs
    )


@pytest.mark.parametrize("reset_after", [False, True])
def test_gradients_of_the_gru_are_its_derivatives(reset_after: bool) -> None:
    inputs = random_tensors((3, 2, 2), (2, 3), (9, 2), (9, 3), (9,), (9,))
    masks = Masks(*(m.detach() for m in random_tensors((3, 3, 2, 2), (1, 3, 2, 3), seed=2)))
    assert torch.autograd.gradcheck(
        lambda *a: gru(*a, masks, lengths=torch.tensor([1, 3]), reset_after=reset_after, backend="reference"),
        inputs,
    )


def test_masks_by_gate_act_on_their_gate_alone() -> None:
    """Masking the input of gate g is the same as setting the input weights of that gate to zero."""
    x, h, c, w_ih, w_hh, b_ih, b_hh = random_tensors(
        (2, 3, 4), (3, 5), (3, 5), (20, 4), (20, 5), (20,), (20,)
    )
    for g in range(4):
        mask = torch.ones(1, 4, 1, 1, dtype=torch.float64)
        mask[0, g] = 0
        without = w_ih.detach().clone()
        without[5 * g : 5 * (g + 1)] = 0
        actual = lstm(x, h, c, w_ih, w_hh, b_ih, b_hh, Masks(x=mask), backend="reference")
        expected = lstm(x, h, c, without, w_hh, b_ih, b_hh, Masks(), backend="reference")
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_carried_state_is_never_masked() -> None:
    """With every recurrent input dropped the past still arrives: through the forget gate in an LSTM, through
    z in a GRU.
    """
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    x, h, c, w_ih, w_hh, b_ih, b_hh = random_tensors(
        (4, 2, 3), (2, 5), (2, 5), (20, 3), (20, 5), (20,), (20,)
    )
    y, *_ = lstm(x, h, c, w_ih, w_hh, b_ih, b_hh, Masks(h=nothing), backend="reference")
    assert torch.autograd.grad(y[-1].sum(), x)[0][0].abs().min() > 0
    y, _ = gru(x, h, w_ih[:15], w_hh[:15], b_ih[:15], b_hh[:15], Masks(h=nothing), backend="reference")
    assert torch.autograd.grad(y[-1].sum(), x)[0][0].abs().min() > 0


@pytest.mark.parametrize("backend", ["reference", "fused", "native"])
def test_a_padded_sequence_is_the_sequence_alone(backend: str) -> None:
    """The state is that after the last word, whatever stands in the padding; beyond it the output is zero."""
    x, h, c, w_ih, w_hh, b_ih, b_hh = random_tensors(
        (5, 2, 3), (2, 4), (2, 4), (16, 3), (16, 4), (16,), (16,)
    )
    y, last_h, last_c = lstm(
        x, h, c, w_ih, w_hh, b_ih, b_hh, Masks(), lengths=torch.tensor([5, 2]), backend=backend
    )
    alone = lstm(x[:2, 1:], h[1:], c[1:], w_ih, w_hh, b_ih, b_hh, Masks(), backend=backend)
    for actual, expected in zip((y[:2, 1:], last_h[1:], last_c[1:]), alone, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert (y[2:, 1] == 0).all()
    assert (torch.autograd.grad(y.sum() + last_h.sum() + last_c.sum(), x)[0][2:, 1] == 0).all()
    y, last_h = gru(
        x,
        h,
        w_ih[:12],
        w_hh[:12],
        b_ih[:12],
        b_hh[:12],
        Masks(),
        lengths=torch.tensor([5, 2]),
        backend=backend,
    )
    alone_y, alone_h = gru(
        x[:2, 1:], h[1:], w_ih[:12], w_hh[:12], b_ih[:12], b_hh[:12], Masks(), backend=backend
    )
    torch.testing.assert_close((y[:2, 1:], last_h[1:]), (alone_y, alone_h), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": (0, 2, 3)}, "x must be"),
        ({"h": (2, 5)}, "h must be"),
        ({"w_ih": (16, 4)}, "w_ih must be"),
        ({"b_hh": (15,)}, "b_hh must be"),
        ({"mask_x": (2, 1, 2, 3)}, r"masks\.x must be"),
        ({"mask_h": (1, 3, 2, 4)}, r"masks\.h must be"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, tuple[int, ...]], named: str) -> None:
    shapes = {
        "x": (5, 2, 3),
        "h": (2, 4),
        "c": (2, 4),
        "w_ih": (16, 3),
        "w_hh": (16, 4),
        "b_ih": (16,),
        "b_hh": (16,),
    }
    tensors = {
        name: torch.zeros(shape)
        for name, shape in ({"mask_x": (1, 1, 2, 3), "mask_h": (1, 1, 2, 4)} | shapes | change).items()
    }
    masks = Masks(tensors.pop("mask_x"), tensors.pop("mask_h"))
    with pytest.raises(ValueError, match=named):
        lstm(*tensors.values(), masks)


def test_cross_entropy_by_hand() -> None:
    """Two words with logits 0 and ln 3: probabilities 1/4 and 3/4."""
    w = torch.zeros(2, 1, dtype=torch.float64)
    b = torch.tensor([0.0, 3.0], dtype=torch.float64).clamp(min=1).log()
    nll = linear_cross_entropy(
        torch.ones(2, 1, dtype=torch.float64), w, b, torch.tensor([0, 1]), backend="reference"
    )
    assert nll.exp().tolist() == pytest.approx([4, 4 / 3])
