"""The modules as a user meets them: torch's own, with dropout."""

import copy
import re

import pytest
import torch
from torch import nn

from vdrop_cli.config import ConfigError, Dropout, Policy
from vdrop_cli.dropout import ModelMasks
from vdrop_cli.kernels import Masks
from vdrop_cli.layers import GRU, LSTM

VARIATIONAL = Dropout("variational", Policy.variational, p_x=0.3, p_h=0.3, p_out=0.3)
MOON = Dropout("moon", Policy.moon, p_c=0.25)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_they_take_torchs_weights_and_give_torchs_outputs(cell: str, batch_first: bool) -> None:
    options = {"num_layers": 2, "batch_first": batch_first}
    theirs = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](5, 7, **options)
    ours = LSTM(5, 7, **options) if cell == "lstm" else GRU(5, 7, reset_after=True, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 5)
    batch = 4 if batch_first else 3
    state = (torch.randn(2, batch, 7), torch.randn(2, batch, 7))
    for start in (None, state if cell == "lstm" else state[0]):
        torch.testing.assert_close(ours(x, start), theirs(x, start), rtol=1e-5, atol=1e-6)


def test_training_mode_draws_new_masks_each_call_from_torchs_random_state() -> None:
    layer, x = LSTM(5, 7, dropout=VARIATIONAL), torch.randn(4, 3, 5)
    torch.manual_seed(3)
    first, second = layer(x)[0], layer(x)[0]
    torch.manual_seed(3)
    assert torch.equal(layer(x)[0], first)
    assert not torch.equal(first, second)


def test_the_carried_state_of_moon_is_multiplied_by_the_keep_probability_in_evaluation() -> None:
    """At every step: with open forget gates and shut input gates, what is carried is 0.75^T of the start."""
    layer = LSTM(5, 7, dropout=Dropout("moon", Policy.moon, p_c=0.25)).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        i, f, _, _ = layer.weights(0)[2].chunk(4)
        i.fill_(-50.0)
        f.fill_(50.0)
        _, (_, c) = layer(torch.zeros(6, 2, 5), (torch.zeros(1, 2, 7), torch.ones(1, 2, 7)))
    assert torch.allclose(c, torch.full_like(c, 0.75**6))


def test_evaluation_mode_has_no_masks_unless_they_are_given() -> None:
    layer, plain, x = GRU(5, 7, dropout=VARIATIONAL).eval(), GRU(5, 7), torch.randn(4, 3, 5)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], plain(x)[0])
    masks = layer.masks(4, 3, x.device)
    assert torch.equal(layer(x, masks=masks)[0], layer(x, masks=masks)[0])
    assert not torch.equal(layer(x, masks=masks)[0], plain(x)[0])


def test_the_masks_act_where_the_policy_says() -> None:
    """The output mask is what is zero in the output; the input mask of layer 0 is what gets no gradient in x."""
    layer, x = LSTM(5, 7, num_layers=2, dropout=VARIATIONAL), torch.randn(4, 3, 5, requires_grad=True)
    masks = layer.masks(4, 3, x.device)
    y, _ = layer(x, masks=masks)
    assert masks.out is not None and masks.layers[0].x is not None
    assert torch.equal(y == 0, (masks.out == 0).expand(4, -1, -1))
    gradient = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(gradient == 0, (masks.layers[0].x[0] == 0).expand(4, -1, -1))


def test_what_does_not_go_together_is_an_error() -> None:
    with pytest.raises(ValueError, match="moon"):
        GRU(5, 7, dropout=Dropout("moon", Policy.moon, p_c=0.5))
    with pytest.raises(ValueError, match="2 layers"):
        LSTM(5, 7, num_layers=2)(torch.randn(4, 3, 5), masks=ModelMasks([Masks()]))
    with pytest.raises(TypeError, match=r"dropout must be a vdrop_cli\.config\.Dropout, got 0\.3; Policy\.zaremba"):
        LSTM(5, 7, dropout=0.3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"dropout\.policy must be a Policy: none, .*, got 'variational'"):
        Dropout("mine", "variational", p_x=0.3)  # type: ignore[arg-type]
    for name, sizes in (("input_size", (0, 7, 1)), ("hidden_size", (5, 0, 1)), ("num_layers", (5, 7, 0))):
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
            LSTM(*sizes)


def test_inputs_and_states_that_do_not_fit_are_told_as_they_were_given() -> None:
    x, state = torch.randn(4, 3, 5), torch.randn(2, 3, 7)
    lstm, gru = LSTM(5, 7, num_layers=2), GRU(5, 7, num_layers=2)
    for wrong in (x[..., :4], x[0]):
        with pytest.raises(ValueError, match=rf"^x must be \[T, B, 5\], got {re.escape(str(list(wrong.shape)))}$"):
            lstm(wrong)
    with pytest.raises(ValueError, match=r"^x must be \[B, T, 5\], got \[3, 5\]$"):
        LSTM(5, 7, batch_first=True)(x[0])
    deeper = torch.randn(4, 3, 7)
    for states in (state, (state,), (deeper, deeper), (state[:1], state), (state, state, state)):
        with pytest.raises(ValueError, match=r"^the state must be \(h, c\), each \[2, 3, 7\], got \["):
            lstm(x, states)
    with pytest.raises(ValueError, match=r"^the state must be h, \[2, 3, 7\], got \[4, 3, 7\]$"):
        gru(x, deeper)
    assert torch.equal(lstm(x, [state, state])[0], lstm(x, (state, state))[0]), "torch takes lists, too"
    assert torch.equal(lstm(x, lengths=[4, 1, 2])[0], lstm(x, lengths=torch.tensor([4, 1, 2]))[0])


@pytest.mark.parametrize(("cell", "dropout"), [(LSTM, VARIATIONAL), (GRU, VARIATIONAL), (LSTM, MOON)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-6), (torch.bfloat16, 0.03), (torch.float16, 0.003)])
def test_they_train_and_evaluate_in_other_types(cell: type[LSTM | GRU], dropout: Dropout, dtype: torch.dtype, error: float) -> None:
    """With the same masks as in fp32, forward and back."""
    layer, x = cell(5, 7, num_layers=2, dropout=dropout), torch.randn(4, 3, 5)
    other = copy.deepcopy(layer).to(dtype)
    for training in (True, False):
        found = []
        for one in (layer, other):
            torch.manual_seed(1)
            one.train(training).zero_grad()
            y, _ = one(x.to(one.weight_ih_l0.dtype))
            y.sum().backward()
            assert y.dtype == one.weight_hh_l1.grad.dtype == one.weight_ih_l0.dtype
            found.append([y, one.weight_hh_l1.grad, one.weight_ih_l0.grad])
        for exact, ours in zip(*found, strict=True):
            assert (ours.float() - exact).norm() <= error * exact.norm()


@pytest.mark.parametrize("dropout", [VARIATIONAL, MOON])
@pytest.mark.parametrize("training", [False, True])
def test_under_autocast_they_take_what_it_rounds_and_work_as_without(dropout: Dropout, training: bool) -> None:
    layer = LSTM(5, 7, dropout=dropout).train(training)
    x, state = torch.randn(4, 3, 5).bfloat16(), torch.randn(1, 3, 7).bfloat16()
    torch.manual_seed(1)
    expected, _ = layer(x.float(), (state.float(), state.float()))
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = layer(x, (state, state))
    assert torch.equal(found, expected)


def test_weights_may_be_put_in_place_of_the_parameters() -> None:
    """By `functional_call`, whose gradients go to them, and by parametrizations."""
    layer, x = LSTM(5, 7, num_layers=2), torch.randn(4, 3, 5)
    doubled = {name: (2 * value).detach().requires_grad_() for name, value in layer.named_parameters()}
    other = LSTM(5, 7, num_layers=2)
    other.load_state_dict(doubled)
    found, _ = torch.func.functional_call(layer, doubled, (x,))
    assert torch.equal(found, other(x)[0])
    assert all(gradient.any() for gradient in torch.autograd.grad(found.sum(), list(doubled.values())))
    nn.utils.parametrizations.weight_norm(other, "weight_hh_l1")
    torch.testing.assert_close(other(x)[0], found)


def test_without_dropout_torchs_random_state_stays_as_it_is() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    for dropout in (None, Dropout("idle", Policy.variational)):
        layer = LSTM(5, 7, dropout=dropout)
        torch.manual_seed(1)
        layer(torch.zeros(4, 3, 5))
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ours", "theirs"), [(LSTM, nn.LSTM), (GRU, nn.GRU)])
def test_from_torch_takes_weights_and_variant(ours: type[LSTM | GRU], theirs: type[nn.LSTM | nn.GRU], dtype: torch.dtype) -> None:
    module = theirs(5, 7, 2, batch_first=True, dropout=0.5, dtype=dtype).eval()
    module.weight_hh_l1.requires_grad_(False)
    before = torch.get_rng_state()
    layers = ours.from_torch(module, dropout=Dropout("mine", Policy.variational, p_h=0.3), backend="fused")
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(3, 4, 5, dtype=dtype)
    expected = module(x)
    torch.testing.assert_close(layers(x), expected, rtol=1e-5, atol=1e-6)
    assert layers.dropout.p_h == 0.3 and not layers.training and layers.backend == "fused" and layers.batch_first
    assert not layers.weight_hh_l1.requires_grad and layers.weight_hh_l0.requires_grad
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    torch.testing.assert_close(layers(x), expected, rtol=1e-5, atol=1e-6)
    assert {p.device.type for p in ours.from_torch(theirs(5, 7, device="meta")).parameters()} == {"meta"}


def test_a_gru_with_the_weights_of_torchs_computes_something_else_unless_it_resets_after() -> None:
    theirs, x = nn.GRU(5, 7), torch.randn(4, 3, 5)
    loaded = GRU(5, 7)
    loaded.load_state_dict(theirs.state_dict())
    assert (loaded(x)[0] - theirs(x)[0]).abs().max() > 1e-3
    assert "reset_after=False" in repr(loaded) and "reset_after=True" in repr(GRU.from_torch(theirs))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"bidirectional": True}, "bidirectional"), ({"proj_size": 2}, "proj_size"), ({"bias": False}, "bias")],
)
def test_what_cannot_be_taken_over_from_torch_is_named(options: dict[str, bool | int], named: str) -> None:
    with pytest.raises(ValueError, match=rf"{named}={next(iter(options.values()))} cannot be taken over"):
        LSTM.from_torch(nn.LSTM(5, 7, **options))
    with pytest.raises(ValueError, match=r"dropout=0\.5: give dropout=Dropout"):
        LSTM.from_torch(nn.LSTM(5, 7, 2, dropout=0.5))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.LSTM, got GRU"):
        LSTM.from_torch(nn.GRU(5, 7))


def test_repr_names_what_is_computed() -> None:
    said = repr(LSTM(5, 7, 2, batch_first=True, dropout=VARIATIONAL))
    assert all(part in said for part in ("num_layers=2", "batch_first=True", "variational(p_x=0.3, p_h=0.3, p_out=0.3)"))
    assert "dropout=none, reset_after=False" in repr(GRU(5, 7)) and "moon(p_c=0.25)" in repr(LSTM(5, 7, dropout=MOON))
