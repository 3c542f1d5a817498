"""The modules as a user meets them: torch's own, with dropout."""

import pytest
import torch
from torch import nn

from vdrop_cli.config import Dropout, Policy
from vdrop_cli.dropout import ModelMasks
from vdrop_cli.kernels import Masks
from vdrop_cli.layers import GRU, LSTM

VARIATIONAL = Dropout("variational", Policy.variational, p_x=0.3, p_h=0.3, p_out=0.3)


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
