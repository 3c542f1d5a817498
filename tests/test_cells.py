"""Single steps: those of torch's cells, those of the layers, and masks that belong to the sequence."""

from typing import Any

import pytest
import torch
from torch import nn

from vdrop_cli.cells import GRUCell, LSTMCell
from vdrop_cli.dropout import ModelMasks
from vdrop_cli.kernels import Masks
from vdrop_cli.layer_dropout import describe
from vdrop_cli.layers import GRU, LSTM, Dropout

BOTH = [
    (LSTMCell, nn.LSTMCell, LSTM, {}),
    (GRUCell, nn.GRUCell, GRU, {"reset_after": True}),
    (GRUCell, None, GRU, {}),
]
POLICIES = [
    Dropout("variational", p_x=0.3, p_h=0.3),
    Dropout("variational", p_x=0.3, p_h=0.4, tie="none"),
    Dropout("variational", p_x=0.3, p_h=0.4, tie="gates"),
    Dropout("moon", p_c=0.3),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("ours", "theirs", "layer", "variant"), BOTH[:2])
def test_they_take_the_place_of_torchs(
    ours: Any, theirs: Any, layer: Any, variant: dict[str, bool], bias: bool
) -> None:
    torch.manual_seed(1)
    module = theirs(5, 7, bias, dtype=torch.float64)
    torch.manual_seed(1)
    cell = ours(5, 7, bias, dtype=torch.float64, **variant)
    assert list(cell.state_dict()) == list(module.state_dict())
    assert all(map(torch.equal, cell.parameters(), module.parameters())), "the same start"
    cell.load_state_dict(theirs(5, 7, bias).double().state_dict())
    module.load_state_dict(cell.state_dict())
    x, h, c = (torch.randn(3, size, dtype=torch.float64) for size in (5, 7, 7))
    state = (h, c) if theirs is nn.LSTMCell else h
    alone = (h[0], c[0]) if theirs is nn.LSTMCell else h[0]
    for arguments in ((x,), (x, state), (x[0],), (x[0], alone)):
        expected, result = module(*arguments), cell(*arguments)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
        gradients = torch.autograd.grad(
            sum(t.square().sum() for t in parts(expected)), list(module.parameters())
        )
        torch.testing.assert_close(
            torch.autograd.grad(sum(t.square().sum() for t in parts(result)), list(cell.parameters())),
            gradients,
        )


def parts(state: Any) -> tuple[torch.Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", POLICIES, ids=describe)
@pytest.mark.parametrize(("ours", "theirs", "layer", "variant"), BOTH)
def test_steps_with_held_masks_are_the_whole_sequence(
    ours: Any, theirs: Any, layer: Any, variant: dict[str, bool], dropout: Dropout, bias: bool
) -> None:
    """By the layer, with the same weights and masks."""
    if dropout.p_c and ours is GRUCell:
        pytest.skip("a GRU has no cell state")
    options = {"bias": bias, "dropout": dropout, **variant}
    cell, whole = ours(5, 7, **options), layer(5, 7, **options)
    whole.load_state_dict({f"{name}_l0": weight for name, weight in cell.state_dict().items()})
    masks = cell.masks(3)
    x = torch.randn(6, 3, 5)
    state = None
    y, last = whole(x, masks=masks)
    outputs = []
    for step in x:
        state = cell(step, state, masks=masks)
        outputs.append(parts(state)[0])
    torch.testing.assert_close(torch.stack(outputs), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([t[None] for t in parts(state)], list(parts(last)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ours", [LSTMCell, GRUCell])
def test_training_without_masks_is_refused_and_evaluation_takes_their_means(ours: Any) -> None:
    cell, x = ours(5, 7, variational=0.3), torch.randn(3, 5)
    with pytest.raises(
        ValueError, match=r"masks are required in training mode: masks = cell\.masks\(batch\)"
    ):
        cell(x)
    cell.eval()
    assert torch.equal(parts(cell(x))[0], parts(cell(x, masks=cell.masks(3)))[0])
    plain = ours(5, 7)
    plain.load_state_dict(cell.state_dict())
    assert torch.equal(parts(cell(x))[0], parts(plain(x))[0])
    cell.sampling.train()
    drawn = parts(cell(x, masks=cell.masks(3)))[0]
    assert not torch.equal(drawn, parts(plain(x))[0])


def test_rows_of_masks_stay_with_their_sentences() -> None:
    cell, x = GRUCell(5, 7, variational=0.5), torch.randn(2, 5)
    masks, h = cell.masks(2), torch.randn(2, 7)
    beam = cell(x.repeat_interleave(4, 0), h.repeat_interleave(4, 0), masks=masks.repeat(4))
    torch.testing.assert_close(beam, cell(x, h, masks=masks).repeat_interleave(4, 0))
    torch.testing.assert_close(cell(x[1:], h[1:], masks=masks.rows([1])), cell(x, h, masks=masks)[1:])


def test_moons_evaluation_is_a_plain_cell_and_its_steps_are_those_of_a_layer() -> None:
    cell, plain = LSTMCell(5, 7, dropout=Dropout("moon", p_c=0.25)), torch.nn.LSTMCell(5, 7)
    layer = LSTM(5, 7, dropout=Dropout("moon", p_c=0.25))
    plain.load_state_dict(cell.state_dict())
    layer.load_state_dict({f"{name}_l0": weight for name, weight in cell.state_dict().items()})
    x, state = torch.randn(4, 3, 5), (torch.randn(3, 7), torch.randn(3, 7))
    masks = cell.masks(3)
    y, (h, c) = layer(x, tuple(part[None] for part in state), masks=masks)
    steps, last = [], state
    for x_BD in x:
        last = cell(x_BD, last, masks=masks)
        steps.append(last[0])
    torch.testing.assert_close(torch.stack(steps), y)
    torch.testing.assert_close(last, (h[0], c[0]))
    torch.testing.assert_close(cell.eval()(x[0], state), plain(x[0], state))


def test_a_mask_on_the_hidden_state_goes_with_one_on_the_cell_state() -> None:
    """Both act on the recurrence: steps of a cell are those of a layer."""
    cell, layer = LSTMCell(5, 7), LSTM(5, 7)
    layer.load_state_dict({f"{name}_l0": weight for name, weight in cell.state_dict().items()})
    masks = ModelMasks([Masks(h=torch.rand(1, 1, 3, 7), c=torch.rand(1, 3, 7).round())], cell_scales=(1.5,))
    x, state = torch.randn(4, 3, 5), (torch.randn(3, 7), torch.randn(3, 7))
    y, _ = layer(x, tuple(part[None] for part in state), masks=masks)
    for t, x_BD in enumerate(x):
        state = cell(x_BD, state, masks=masks)
        torch.testing.assert_close(state[0], y[t])


def test_what_a_cell_cannot_do_is_refused() -> None:
    cell, x = LSTMCell(5, 7, recurrent_dropout=0.3), torch.randn(3, 5)
    for masks in (cell.masks(2), ModelMasks([*cell.masks(3).layers] * 2)):
        with pytest.raises(ValueError, match="masks must be for one layer and 3 sequences"):
            cell(x, masks=masks)
    with pytest.raises(ValueError, match=r"the state must be \(h, c\), each \[3, 7\], got \[3, 7\]"):
        cell(x, torch.zeros(3, 7), masks=cell.masks(3))
    with pytest.raises(ValueError, match=r"input must be \[B, 5\] or \[5\], got \[3, 4\]"):
        cell(x[:, :4])
    with pytest.raises(ValueError, match="policy must be variational or moon in a cell"):
        LSTMCell(5, 7, dropout=Dropout("naive", p_h=0.3))
    with pytest.raises(ValueError, match="p_out must be 0 in a cell"):
        LSTMCell(5, 7, dropout=Dropout("variational", p_out=0.3))
    with pytest.raises(ValueError, match="one_state_mask must be False in a cell"):
        LSTMCell(5, 7, dropout=Dropout("variational", p_h=0.3, one_state_mask=True))
    with pytest.raises(ValueError, match="moon"):
        GRUCell(5, 7, dropout=Dropout("moon", p_c=0.3))
    for name in ("variational", "recurrent_dropout"):
        with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\), got 1\.0$"):
            LSTMCell(5, 7, **{name: 1.0})
    with pytest.raises(ValueError, match="give one of dropout and variational"):
        LSTMCell(5, 7, dropout=Dropout("moon", p_c=0.3), variational=0.3)
    with pytest.raises(TypeError, match=r"dropout must be a Dropout"):
        GRUCell(5, 7, dropout=0.3)


def test_the_dropout_of_a_cell_can_be_set_and_is_checked_as_that_of_a_new_one() -> None:
    cell, x = LSTMCell(5, 7), torch.randn(3, 5)
    cell.dropout = Dropout("variational", p_x=0.5)
    with pytest.raises(ValueError, match="masks are required in training mode"):
        cell(x)
    h, _ = cell(x, masks=cell.masks(3))
    assert not torch.equal(h, cell.eval()(x)[0])
    for wrong in (Dropout("naive", p_h=0.3), Dropout("variational", p_out=0.3)):
        with pytest.raises(ValueError, match="in a cell"):
            cell.dropout = wrong
    with pytest.raises(TypeError, match="got the module"):
        cell.dropout = torch.nn.Dropout(0.3)
    with pytest.raises(AttributeError, match=r"sampling\.p cannot be set, got 0\.1: .* layer\.dropout"):
        cell.sampling.p = 0.1
    assert cell.dropout == Dropout("variational", p_x=0.5) and cell.sampling.p == 0.5


def test_masks_of_another_cell_are_refused() -> None:
    untied = Dropout("variational", p_x=0.3, p_h=0.3, tie="none")
    x = torch.randn(3, 5)
    cases = [
        (
            LSTMCell(5, 6, dropout=untied),
            GRUCell(5, 6, dropout=untied).masks(3),
            r"masks\.x must be broadcastable to \[1, 4, 3, 5\], got \[1, 3, 3, 5\]",
        ),
        (
            GRUCell(5, 7),
            LSTM(5, 7, dropout=Dropout("moon", p_c=0.3)).masks(4, 3),
            r"masks\.c must be None: a GRU has no cell state",
        ),
        (
            LSTMCell(5, 7),
            LSTM(5, 7, variational=0.3).masks(4, 3),
            r"masks\.word, masks\.out and masks\.head must be None",
        ),
        (
            LSTMCell(5, 7),
            LSTM(5, 7, dropout=Dropout("variational", p_weight=0.5)).masks(1, 3),
            r"masks\.weights must be None: a cell drops no weights",
        ),
        (LSTMCell(5, 7), ModelMasks([Masks(x=torch.ones(9, 1, 3, 5))]), r"masks\.x must be broadcastable"),
    ]
    for cell, masks, message in cases:
        with pytest.raises(ValueError, match=message):
            cell(x, masks=masks)
    with pytest.raises(TypeError, match=r"masks must be a ModelMasks, .*, got Masks"):
        LSTMCell(5, 7)(x, masks=Masks())


@pytest.mark.parametrize(("ours", "theirs"), [(LSTMCell, nn.LSTMCell), (GRUCell, nn.GRUCell)])
def test_cells_work_under_autocast(ours: Any, theirs: Any) -> None:
    cell = ours(5, 7, variational=0.3)
    module = theirs(5, 7)
    x = torch.randn(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks = cell.masks(3)
        result, types = parts(cell(input=x, masks=masks)), [t.dtype for t in parts(module(x))]
    assert [t.dtype for t in result][-1] == types[-1]
    torch.testing.assert_close(result[0].float(), parts(cell(x, masks=masks))[0], rtol=0.05, atol=0.02)


def test_transforms_work() -> None:
    cell, x = LSTMCell(5, 7, variational=0.3), torch.randn(4, 5)
    masks = cell.masks(1)
    per_sample = torch.func.vmap(lambda one: cell(one[None], masks=masks)[0][0])(x)
    torch.testing.assert_close(per_sample, cell(x, masks=masks.repeat(4))[0])


@pytest.mark.parametrize("kind", [LSTMCell, GRUCell])
def test_masks_that_fitted_one_step_are_still_refused_where_they_do_not_fit(
    kind: type[LSTMCell] | type[GRUCell],
) -> None:
    """They are checked at the first step of a sequence alone, and again where anything that they are for is
    different.
    """
    cell, other = kind(3, 4, variational=0.3), kind(5, 4, variational=0.3)
    masks, x_BD = cell.masks(2), torch.rand(2, 3)
    for _ in range(2):
        cell(x_BD, masks=masks)
    with pytest.raises(ValueError, match="masks must be"):
        cell(torch.rand(3, 3), masks=masks)
    with pytest.raises(ValueError, match=r"masks\.x must be"):
        other(torch.rand(2, 5), masks=masks)
    cell(x_BD, masks=masks)
    masks.layers[0] = Masks(x=torch.ones(1, 1, 2, 7))
    with pytest.raises(ValueError, match=r"masks\.x must be"):
        cell(x_BD, masks=masks)


@pytest.mark.parametrize("kind", [LSTMCell, GRUCell])
def test_a_mask_that_is_learned_has_its_gradient_whatever_step_came_first(
    kind: type[LSTMCell] | type[GRUCell],
) -> None:
    """And masks that were first met within a transform hold nothing of it."""
    cell = kind(3, 4, variational=0.3)
    x_BD = torch.rand(2, 3)
    mask = torch.full((1, 1, 2, 3), 0.5, requires_grad=True)
    masks = ModelMasks([Masks(x=mask)])
    with torch.no_grad():
        expected = parts(cell(x_BD, masks=masks))[0]
    result = parts(cell(x_BD, masks=masks))[0]
    assert torch.equal(result, expected)
    (gradient,) = torch.autograd.grad(result.sum(), mask)
    assert gradient.abs().min() > 0
    later = ModelMasks([Masks(x=torch.full((1, 1, 2, 3), 0.5))])
    cell(x_BD, masks=later)
    later.layers[0].x.requires_grad_()
    (gradient,) = torch.autograd.grad(parts(cell(x_BD, masks=later))[0].sum(), later.layers[0].x)
    assert gradient.abs().min() > 0
    drawn = cell.masks(2)
    torch.func.grad(lambda x: parts(cell(x, masks=drawn))[0].sum())(x_BD)
    assert drawn.checked_masks is None
