"""The modules as a user meets them: torch's own, with dropout."""

import copy
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tests.kernels.test_fused import relative_errors
from vdrop_cli.cells import GRUCell, LSTMCell
from vdrop_cli.dropout import ModelMasks, WordMasks
from vdrop_cli.kernels import Masks, native
from vdrop_cli.layer_dropout import describe
from vdrop_cli.layers import GRU, LSTM
from vdrop_cli.modules import WeightDrop, WordDropout
from vdrop_cli.policies import Dropout, Policy, Tie

VARIATIONAL = Dropout(Policy.variational, p_x=0.3, p_h=0.3, p_out=0.3)
MOON = Dropout(Policy.moon, p_c=0.25)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
    {"proj_size": 3},
    {"num_layers": 2, "proj_size": 3, "bidirectional": True, "bias": False},
]
BOTH = [(LSTM, nn.LSTM, {}), (GRU, nn.GRU, {"reset_after": True})]


def same(result: Any, expected: Any, error: float = 1e-6) -> None:
    torch.testing.assert_close(result, expected, rtol=error, atol=error)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize(("ours", "theirs", "variant"), BOTH)
def test_they_take_the_place_of_torchs_by_another_import(
    ours: Any, theirs: Any, variant: Any, options: dict[str, Any]
) -> None:
    """Outputs, states and all gradients, with every argument of the constructor; weights both ways; packed
    sequences, and no batch.
    """
    if "proj_size" in options and ours is GRU:
        pytest.skip("a GRU has no projections")
    torch.manual_seed(1)
    module = theirs(5, 7, **options, dtype=torch.float64)
    torch.manual_seed(1)
    layer = ours(5, 7, **options, dtype=torch.float64, device="cpu", **variant)
    assert list(layer.state_dict()) == list(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), module.parameters(), strict=True)), (
        "the same start"
    )
    again = theirs(5, 7, **options, dtype=torch.float64)
    again.load_state_dict(layer.state_dict())
    layer.load_state_dict(again.state_dict())
    for name in (
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "bidirectional",
        "proj_size",
    ):
        assert getattr(layer, name) == getattr(module, name), name
    copied = ours.from_torch(module)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    batch = 4 if module.batch_first else 3
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(rows, batch, module.proj_size or 7, dtype=torch.float64)
    c = torch.randn(rows, batch, 7, dtype=torch.float64)
    start = (h, c) if theirs is nn.LSTM else h
    packed = nn.utils.rnn.pack_padded_sequence(
        x, [1, 3, 2, 3][:batch], module.batch_first, enforce_sorted=False
    )
    alone = tuple(part[:, 0] for part in start) if isinstance(start, tuple) else start[:, 0]
    for arguments in ((x,), (x, start), (packed, start), (packed,), (x[0],), (x[0], alone)):
        expected = module(*arguments)
        upstream = [torch.randn_like(t) for t in flat(expected)]
        gradients = torch.autograd.grad(flat(expected), list(module.parameters()), upstream)
        for one in (layer, copied):
            result = one(*arguments)
            same(flat(result), flat(expected))
            assert type(result[0]) is type(expected[0])
            same(torch.autograd.grad(flat(result), list(one.parameters()), upstream), gradients)
    result, expected = layer(packed)[0], module(packed)[0]
    for ours_part, theirs_part in zip(result[1:], expected[1:], strict=True):
        assert torch.equal(ours_part, theirs_part)


def flat(results: Any) -> list[torch.Tensor]:
    """The tensors of an output, packed or not, and of the states."""
    y, states = results
    return [
        y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y,
        *(states if isinstance(states, tuple) else (states,)),
    ]


@pytest.mark.parametrize(("ours", "theirs", "variant"), BOTH)
def test_arguments_have_torchs_order(ours: Any, theirs: Any, variant: Any) -> None:
    arguments = (5, 7, 2, False, True, 0.0, True)
    layer, module = ours(*arguments, **variant), theirs(*arguments)
    layer.load_state_dict(module.state_dict())
    x = torch.randn(3, 4, 5)
    same(flat(layer(x)), flat(module(x)))
    same(flat(layer(x, hx=None)), flat(module(x, hx=None)))


def test_a_probability_means_what_it_means_in_torch() -> None:
    """Between layers, new at every step; nothing on the input and the output."""
    layer = LSTM(50, 60, 3, dropout=0.25)
    masks = layer.masks(20, 30)
    assert masks.out is None and masks.layers[0] == Masks()
    for part in masks.layers[1:]:
        assert part.h is None and part.c is None and part.x is not None
        assert part.x.shape == (20, 1, 30, 60) and (part.x == 0).float().mean().item() == pytest.approx(
            0.25, abs=0.015
        )
    with pytest.warns(UserWarning, match="no effect with num_layers=1"):
        LSTM(5, 7, dropout=0.25)
    dropout = GRU(5, 7, 2, variational=0.3).dropout
    assert (dropout.p_x, dropout.p_h, dropout.p_out, dropout.tie) == (0.3, 0.3, 0.3, Tie.all)
    assert LSTM(5, 7, recurrent_dropout=0.3).dropout == Dropout("variational", p_h=0.3)


SIZES = (7, 4, 6)


def chain(stack: LSTM | GRU) -> list[LSTM | GRU]:
    """The layers of a stack as layers of their own."""
    layers = []
    for number, (inputs, size) in enumerate(zip(stack.input_sizes, stack.hidden_sizes, strict=True)):
        layer = type(stack)(inputs, size, bidirectional=stack.bidirectional, dtype=torch.float64)
        for name in list(layer._parameters):
            setattr(layer, name, nn.Parameter(getattr(stack, name.replace("_l0", f"_l{number}")).detach()))
        layers.append(layer)
    return layers


@pytest.mark.parametrize(
    ("residual", "bidirectional", "one_state_mask"),
    [
        (False, False, False),
        (False, False, True),
        (False, True, False),
        (True, False, False),
        (True, True, False),
    ],
)
@pytest.mark.parametrize("ours", [LSTM, GRU])
def test_a_stack_is_its_layers_one_after_the_other(
    ours: Any, residual: bool, bidirectional: bool, one_state_mask: bool
) -> None:
    """With sizes that differ or the layer's input added to its output: outputs, states and gradients, under
    masks on inputs and states, and with lengths.
    """
    sizes = (7, 7, 7) if residual else SIZES
    p_out = 0.0 if one_state_mask else 0.3
    dropout = Dropout("variational", p_x=0.3, p_h=0.3, p_out=p_out, one_state_mask=one_state_mask)
    stack = ours(
        5, sizes, dropout=dropout, residual=residual, bidirectional=bidirectional, dtype=torch.float64
    )
    assert stack.num_layers == 3 and stack.hidden_size == (7 if residual else sizes)
    layers, lengths = chain(stack), torch.tensor([4, 2, 3])
    masks, x_TBD = stack.masks(4, 3), torch.randn(4, 3, 5, dtype=torch.float64)
    directions = stack.directions
    states = [[torch.randn(directions, 3, size).double() for size in sizes] for _ in stack.zero_state(3)]
    joined = tuple(torch.cat(part, 0 if residual else -1) for part in states)
    assert [part.shape for part in joined] == [part.shape for part in stack.zero_state(3)]
    hx = joined if ours is LSTM else joined[0]
    y_TBH, last = stack(x_TBD, hx, masks=masks, lengths=lengths)
    expected, ends = x_TBD, []
    for number, layer in enumerate(layers):
        own = ModelMasks(masks.layers[number * directions : (number + 1) * directions])
        first = tuple(part[number] for part in states)
        h_TBH, end = layer(expected, first if ours is LSTM else first[0], masks=own, lengths=lengths)
        expected = h_TBH + expected if residual and number > 0 else h_TBH
        ends.append(end if ours is LSTM else (end,))
    expected_last = tuple(torch.cat(part, 0 if residual else -1) for part in zip(*ends, strict=True))
    same(y_TBH, expected * masks.out)
    same(last if ours is LSTM else (last,), expected_last)
    weights = [weight for layer in layers for weight in layer.parameters()]
    upstream = torch.randn_like(y_TBH)
    same(
        torch.autograd.grad(y_TBH, list(stack.parameters()), upstream),
        torch.autograd.grad(expected * masks.out, weights, upstream),
    )


def test_a_stack_of_equal_sizes_is_that_of_one_size() -> None:
    torch.manual_seed(1)
    one = LSTM(5, 7, 2)
    torch.manual_seed(1)
    other = LSTM(5, [7, 7])
    x_TBD = torch.randn(4, 3, 5)
    (y, state), (other_y, other_state) = one(x_TBD), other(x_TBD)
    assert torch.equal(y, other_y) and all(map(torch.equal, state, other_state)) and other.hidden_size == 7
    assert one.zero_state(3)[0].shape == (2, 3, 7) and LSTM(5, SIZES).zero_state(3)[0].shape == (1, 3, 17)


@pytest.mark.parametrize("ours", [LSTM, GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_weight_drop_is_the_layer_with_masked_recurrent_weights(ours: Any, bidirectional: bool) -> None:
    """And gradients are zero where a weight is dropped; other places drop as without it."""
    p = 0.4
    layer = ours(5, SIZES, bidirectional=bidirectional, dropout=Dropout("variational", p_h=0.3, p_weight=p))
    masks, x_TBD = layer.masks(4, 3), torch.randn(4, 3, 5)
    assert masks.weights is not None and len(masks.weights) == 3 * layer.directions
    y_TBH, _ = layer(x_TBD, masks=masks)
    names = [f"weight_hh{suffix}" for number in range(3) for suffix in layer.suffixes(number)]
    gradients = torch.autograd.grad(y_TBH.sum(), [getattr(layer, name) for name in names])
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        for name, mask, gradient in zip(names, masks.weights, gradients, strict=True):
            assert mask is not None
            assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-4)
            assert not gradient[mask == 0].any() and gradient[mask > 0].any()
            getattr(plain, name).mul_(mask)
    assert torch.equal(y_TBH, plain(x_TBD, masks=ModelMasks(masks.layers))[0])
    share = torch.cat([mask.flatten() for mask in masks.weights if mask is not None]).eq(0).double().mean()
    assert share.item() == pytest.approx(p, abs=0.07)
    assert layer.eval().masks(4, 3).weights is None, "the mean of a mask is 1"


def test_weight_drop_is_drawn_after_the_other_masks() -> None:
    """Which are those of the same policy without it; selected sequences keep the masks on weights."""
    drawn = []
    for p in (0.0, 0.5):
        torch.manual_seed(1)
        layer = LSTM(5, 7, 2, dropout=Dropout("variational", p_x=0.3, p_h=0.3, p_out=0.3, p_weight=p))
        drawn.append(layer.masks(4, 3))
    without, with_weights = drawn
    same([list(masks) for masks in with_weights.layers], [list(masks) for masks in without.layers])
    same(with_weights.out, without.out)
    rows = with_weights.rows([2, 0]).to("cpu", torch.float64).weights
    assert rows is not None and with_weights.weights is not None
    for mask, whole in zip(rows, with_weights.weights, strict=True):
        assert mask is not None and whole is not None and torch.equal(mask, whole.double())


def test_sizes_and_weight_masks_that_do_not_fit_are_refused() -> None:
    for arguments, options, message in (
        ((5, (7, 4), 3), {}, r"hidden_size must be one size or 3, one for each layer, got \[7, 4\]"),
        ((5, ()), {}, "hidden_size must be one size or 1, one for each layer, got"),
        ((5, (7, 0)), {}, "hidden_size must be at least 1, got 0"),
        (
            (5, (7, 4)),
            {"residual": True},
            r"residual must be False where .* differ, got hidden_size=\(7, 4\)",
        ),
        ((5, 7), {"residual": True}, "residual must be False in a single layer"),
        ((5, (7, 4)), {"proj_size": 2}, "proj_size must be 0 where the sizes of the layers differ"),
    ):
        with pytest.raises(ValueError, match=message):
            LSTM(*arguments, **options)  # type: ignore[arg-type]
    layer, x_TBD = LSTM(5, (7, 4)), torch.randn(4, 3, 5)
    with pytest.raises(ValueError, match=r"the state must be \(h, c\), each \[1, 3, 11\], got"):
        layer(x_TBD, (torch.zeros(2, 3, 7), torch.zeros(2, 3, 7)))
    wrong = ModelMasks([Masks(), Masks()], weights=[None, torch.ones(16, 5)])
    with pytest.raises(ValueError, match=r"masks.weights must be \[16, 4\] on cpu .*, got \[16, 5\]"):
        layer(x_TBD, masks=wrong)
    with pytest.raises(ValueError, match=r"masks\.weights must be for 2 layers, got 1"):
        layer(x_TBD, masks=ModelMasks([Masks(), Masks()], weights=[None]))


def test_layers_may_have_probabilities_of_their_own() -> None:
    layer = LSTM(400, 500, 2, dropout=Dropout("variational", p_x=(0.5, 0.0), p_h=[0.1, 0.4]))
    first, second = layer.masks(1, 20).layers
    assert second.x is None and first.x is not None and first.h is not None and second.h is not None
    for mask, p in ((first.x, 0.5), (first.h, 0.1), (second.h, 0.4)):
        assert (mask == 0).float().mean().item() == pytest.approx(p, abs=0.03)


POLICIES = [
    Dropout("variational", p_x=0.3, p_h=0.3, p_out=0.3),
    Dropout("variational", p_x=0.3, p_h=0.3, tie="none"),
    Dropout("naive", p_x=0.3, p_h=0.3, p_out=0.3),
    Dropout("zaremba", p_x=0.3, p_out=0.3),
    Dropout("moon", p_c=0.3),
]


def reversed_part(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    return mask if mask is None or len(mask) == 1 else mask[:length].flip(0)


@pytest.mark.parametrize("dropout", POLICIES, ids=describe)
@pytest.mark.parametrize("ours", [LSTM, GRU])
def test_a_backward_layer_is_a_forward_one_on_the_reversed_text(ours: Any, dropout: Dropout) -> None:
    """Its masks belong to places in the text, so they are reversed with it; of each sequence by its own
    length.
    """
    if dropout.policy is Policy.moon and ours is GRU:
        pytest.skip("a GRU has no cell state")
    backward, forward = ours(5, 7, dropout=dropout, reverse=True), ours(5, 7, dropout=dropout)
    forward.load_state_dict(backward.state_dict())
    x, lengths = torch.randn(6, 3, 5), [6, 2, 4]
    masks = backward.masks(6, 3)
    y, last = backward(x, lengths=lengths, masks=masks)
    for b, length in enumerate(lengths):
        own = masks.rows([b])
        own = replace(
            own,
            layers=[Masks(*(reversed_part(mask, length) for mask in own.layers[0]))],
            out=reversed_part(own.out, length),
            time=None,
        )
        y_alone, last_alone = forward(x[:length, b : b + 1].flip(0), masks=own)
        same(y[:length, b : b + 1], y_alone.flip(0))
        same(flat((y, last))[1][:, b : b + 1], flat((y_alone, last_alone))[1])
    assert not y[2:, 1].any()
    whole = backward(x, masks=masks)
    same(whole[0], backward(x, masks=masks, lengths=[6, 6, 6])[0])


@pytest.mark.parametrize("dropout", POLICIES[:3], ids=describe)
def test_both_directions_are_a_forward_and_a_backward_layer_with_masks_of_their_own(dropout: Dropout) -> None:
    both = LSTM(5, 7, bidirectional=True, dropout=dropout)
    masks, x = both.masks(6, 3), torch.randn(6, 3, 5)
    one_x, other_x = masks.layers[0].x, masks.layers[1].x
    assert one_x is not None and other_x is not None and not torch.equal(one_x, other_x)
    y, (h, c) = both(x, masks=masks)
    out = torch.ones(6, 3, 14) if masks.out is None else masks.out.expand(6, -1, -1)
    for direction, suffix in enumerate(("_l0", "_l0_reverse")):
        alone = LSTM(5, 7, dropout=dropout, reverse=direction == 1)
        alone.load_state_dict(
            {name.replace(suffix, "_l0"): w for name, w in both.state_dict().items() if name.endswith(suffix)}
        )
        part = slice(7 * direction, 7 * direction + 7)
        scales = masks.cell_scales and masks.cell_scales[direction : direction + 1]
        own = replace(masks, layers=[masks.layers[direction]], out=None, cell_scales=scales)
        y_alone, (h_alone, c_alone) = alone(x, masks=own)
        same(y[..., part], y_alone * out[..., part])
        same((h[direction], c[direction]), (h_alone[0], c_alone[0]))


@pytest.mark.parametrize("ours", [LSTM, GRU])
def test_rows_of_masks_belong_to_sequences(ours: Any) -> None:
    """A beam of three has its sentence's masks; sentences that leave the batch take theirs with them."""
    layer, x = ours(5, 7, 2, bidirectional=True, variational=0.4), torch.randn(4, 3, 5)
    masks = layer.masks(4, 3)
    y, _ = layer(x, masks=masks)
    beam, _ = layer(x.repeat_interleave(3, 1), masks=masks.repeat(3))
    same(beam, y.repeat_interleave(3, 1))
    some, _ = layer(x[:, [2, 0]], masks=masks.rows([2, 0]))
    same(some, y[:, [2, 0]])
    with pytest.raises(TypeError, match=r"masks\.rows"):
        masks[:2]
    with pytest.raises(ValueError, match=r"masks must be for 3 .*, got masks for 2"):
        layer(x, masks=masks.rows([0, 1]))
    same(layer(x, masks=layer.mean_masks().repeat(3))[0], layer.eval()(x)[0])


@pytest.mark.parametrize("backend", ["reference", "fused", "native"])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=["plain", "both"]
)
def test_the_states_of_all_steps_are_those_of_shorter_texts(options: dict[str, Any], backend: str) -> None:
    """The state after step t is the last one of a text that ends there; h of the top layer is the output
    before its mask.
    """
    layer = LSTM(
        5, 7, **options, dropout=Dropout("variational", p_x=0.3, p_h=0.3, p_out=0.3), backend=backend
    )
    batch_first = layer.batch_first
    x = torch.randn(4, 3, 5)
    masks = layer.masks(4, 3)
    inputs = x.transpose(0, 1) if batch_first else x
    y, _, states = layer(inputs, masks=masks, return_states=True)
    assert len(states) == layer.num_layers * layer.directions
    states = [[part.transpose(0, 1) if batch_first else part for part in state] for state in states]
    for t in range(4):
        _, (h, c) = layer(inputs, lengths=[t + 1] * 3, masks=masks)
        for index in range(
            1 if layer.bidirectional else layer.num_layers
        ):  # the first forward layer sees nothing that comes later
            same((states[index][0][t], states[index][1][t]), (h[index], c[index]))
        if layer.bidirectional:  # the first backward layer has seen what comes from step t on
            _, (h, c) = layer(x[t:].transpose(0, 1) if batch_first else x[t:], masks=masks)
            same((states[1][0][t], states[1][1][t]), (h[1], c[1]))
    top = torch.cat([state[0] for state in states[-layer.directions :]], -1) * masks.out
    same(y.transpose(0, 1) if batch_first else y, top)


def test_states_come_in_the_form_of_the_input() -> None:
    lstm = LSTM(5, 7)
    gru = GRU(5, 7, bidirectional=True)
    x = torch.randn(4, 3, 5)
    y, h, states = gru(x, return_states=True)
    assert torch.equal(torch.cat([state[0] for state in states], -1), y) and [
        len(state) for state in states
    ] == [1, 1]
    y, (h, c), ((h_steps, c_steps),) = lstm(x[:, 0], return_states=True)
    same((h_steps[-1], c_steps[-1]), (h[0], c[0]))
    assert h_steps.shape == c_steps.shape == y.shape
    packed = nn.utils.rnn.pack_padded_sequence(x, [4, 2, 1])
    y, _, ((h_steps, c_steps),) = lstm(packed, return_states=True)
    assert torch.equal(h_steps.data, y.data) and c_steps.data.shape == y.data.shape


def test_new_weights_are_as_large_as_the_size_of_their_own_layer_asks_for() -> None:
    """Uniform in ±1/√H; gains of layer norm are 1 and its biases 0."""
    layer = LSTM(5, (400, 25), layer_norm=True, bidirectional=True)
    for name, parameter in layer.named_parameters():
        if name.startswith("norm_"):
            assert torch.equal(parameter, torch.full_like(parameter, "bias" not in name)), name
        else:
            limit = 0.05 if "_l0" in name else 0.2
            assert parameter.abs().max().item() == pytest.approx(limit, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.1 * limit, name


def test_layer_norm_magnifies_rounding() -> None:
    """The numbers of docs/layers.md: by how much gradients change if the weights are rounded to bf16."""
    changes: dict[bool, list[float]] = {True: [], False: []}
    for layer_norm, largest in changes.items():
        for size, seed in itertools.product((64, 200), range(4)):
            torch.manual_seed(seed)
            layer = LSTM(size, size, 2, layer_norm=layer_norm, backend="fused").double()
            x = torch.randn(35, 20, size).double()

            def gradients(layer: LSTM = layer, x: torch.Tensor = x) -> list[torch.Tensor]:
                y, _ = layer(x)
                return list(torch.autograd.grad(y.square().sum(), list(layer.parameters())))

            exact = gradients()
            with torch.no_grad():
                for name, parameter in layer.named_parameters():
                    if name.startswith("weight"):
                        parameter.copy_(parameter.bfloat16())
            largest.append(max(relative_errors(gradients(), exact)))
    text = " ".join((Path(__file__).parents[1] / "docs/layers.md").read_text().split())
    least, most = min(changes[True]), max(changes[True])
    assert f"by {100 * least:.0f} to {100 * most:.0f} %" in text
    assert f"{100 * min(changes[False]):.1f} to {100 * max(changes[False]):.1f} %" in text


def normalised(a: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Layer norm by its definition."""
    return (a - a.mean(-1, keepdim=True)) / (a.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * gain


def test_layer_norm_is_that_of_the_paper() -> None:
    """One step of an LSTM by hand (Ba et al. 2016): both products over all gates, and the cell state where it
    is shown.
    """
    layer = LSTM(5, 7, layer_norm=True, dtype=torch.float64)
    w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh, gain_c, bias_c = (p.detach() for p in layer.parameters())
    with torch.no_grad():
        for gain in (gain_ih, gain_hh, gain_c, bias_c):
            gain.uniform_(0.5, 1.5)
    x, h, c = (torch.randn(1, 3, size, dtype=torch.float64) for size in (5, 7, 7))
    i, f, g, o = (
        normalised(x[0] @ w_ih.T, gain_ih) + normalised(h[0] @ w_hh.T, gain_hh) + b_ih + b_hh
    ).chunk(4, 1)
    c_new = f.sigmoid() * c[0] + i.sigmoid() * g.tanh()
    h_new = o.sigmoid() * (normalised(c_new, gain_c) + bias_c).tanh()
    _, (h_layer, c_layer) = layer(x, (h, c))
    same((h_layer[0], c_layer[0]), (h_new, c_new), 1e-10)


@pytest.mark.parametrize("reset_after", [False, True])
def test_layer_norm_of_a_gru(reset_after: bool) -> None:
    layer = GRU(5, 7, layer_norm=True, reset_after=reset_after, dtype=torch.float64)
    w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh = (p.detach() for p in layer.parameters())
    with torch.no_grad():
        for gain in (gain_ih, gain_hh):
            gain.uniform_(0.5, 1.5)
    x, h = (torch.randn(1, 3, size, dtype=torch.float64) for size in (5, 7))
    w_x = x[0] @ w_ih.T
    a_rz = normalised(w_x[:, :14], gain_ih[:14]) + b_ih[:14]
    a_n = normalised(w_x[:, 14:], gain_ih[14:]) + b_ih[14:]
    r, z = (a_rz + normalised(h[0] @ w_hh[:14].T, gain_hh[:14]) + b_hh[:14]).sigmoid().chunk(2, 1)
    u_n = normalised((h[0] if reset_after else r * h[0]) @ w_hh[14:].T, gain_hh[14:]) + b_hh[14:]
    n = (a_n + (r * u_n if reset_after else u_n)).tanh()
    same(layer(x, h)[1][0], (1 - z) * n + z * h[0], 1e-10)


def test_layer_norm_goes_with_masks_directions_and_lengths() -> None:
    layer = LSTM(5, 7, 2, bidirectional=True, layer_norm=True, variational=0.3)
    x, masks = torch.randn(6, 3, 5), layer.masks(6, 3)
    y, _ = layer(x, lengths=[6, 2, 4], masks=masks)
    same(y[:2, 1:2], layer(x[:2, 1:2], masks=masks.rows([1]))[0])
    y.square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in layer.parameters()
    )
    assert "layer_norm=True" in repr(layer)
    with pytest.raises(
        ValueError, match=r"backend=native has no projections \(proj_size\); use backend=reference or auto"
    ):
        LSTM(5, 7, proj_size=3, backend="native")(x)


def test_masks_that_do_not_fit_are_refused() -> None:
    x, naive = torch.randn(4, 3, 5), LSTM(5, 7, dropout=Dropout("naive", p_h=0.3))
    with pytest.raises(
        ValueError, match=r"masks that are new at every step must be for 4 .*, got masks for 1"
    ):
        naive(x, masks=naive.masks(1, 3))
    layer = LSTM(5, 7, dropout=Dropout("variational", p_out=0.3))
    with pytest.raises(ValueError, match=r"masks must be for 1 .*, got masks for 6"):
        layer(x[:, :1], masks=layer.masks(4, 6))
    with pytest.raises(ValueError, match=r"masks\.out must be broadcastable to \[4, 3, 7\], got \[1, 3, 6\]"):
        layer(x, masks=ModelMasks([Masks()], None, torch.ones(1, 3, 6)))
    with pytest.raises(ValueError, match=r"masks\.head must be None"):
        layer(x, masks=ModelMasks([Masks()], head=torch.ones(1, 3, 6)))
    with pytest.raises(ValueError, match=r"masks\.word must be None"):
        layer(x, masks=ModelMasks([Masks()], WordMasks(0.5, by_type_B=torch.arange(3))))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
@pytest.mark.parametrize("options", [{}, {"proj_size": 3}, {"layer_norm": True}, {"reverse": True}], ids=str)
def test_lengths_of_small_types_count_as_far_as_int64(options: dict[str, Any], dtype: torch.dtype) -> None:
    layer, x = LSTM(3, 4, backend="reference", **options), torch.randn(130, 2, 3)
    lengths = torch.tensor([120, 90])
    same(layer(x, lengths=lengths.to(dtype))[0], layer(x, lengths=lengths)[0])
    with pytest.raises(ValueError, match=r"lengths must be whole numbers, got torch\.float32"):
        layer(x, lengths=lengths.float())
    with pytest.raises(ValueError, match=r"lengths must be \[2\], got \[1\]"):
        layer(x, lengths=lengths[:1])


def test_padding_is_not_read_by_layers_with_projections() -> None:
    """It may be no number: neither outputs nor gradients are."""
    layer, x, lengths = LSTM(5, 7, 2, proj_size=3), torch.randn(4, 3, 5), torch.tensor([2, 4, 0])
    padding_TB = torch.arange(4)[:, None] >= lengths
    results = []
    for padding in (0.0, torch.nan):
        y, _ = layer(x.masked_fill(padding_TB[..., None], padding), lengths=lengths)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    for from_nan, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(from_nan, expected)


@pytest.mark.parametrize("ours", [LSTM, GRU])
def test_masks_of_a_packed_input_are_those_of_its_sequences_in_the_order_in_which_they_were_packed(
    ours: type[LSTM | GRU],
) -> None:
    layer, x, lengths = ours(5, 7, 2, bidirectional=True, variational=0.4), torch.randn(4, 3, 5), [2, 4, 3]
    masks = layer.masks(4, 3)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, state = layer(packed, masks=masks)
    padded = nn.utils.rnn.pad_packed_sequence(y)[0]
    same(flat((padded, state)), flat(layer(x, lengths=lengths, masks=masks)))
    longer, whole = (layer(x, lengths=[last, 4, 2], masks=masks) for last in (9, 4))
    same(flat(longer), flat(whole))


def test_ordinary_dropout_is_of_the_joined_output() -> None:
    """As in torch: both directions of the next layer read the same."""
    masks = LSTM(5, 7, 2, bidirectional=True, dropout=0.5).masks(4, 3)
    assert masks.layers[2].x is masks.layers[3].x is not None


def test_arguments_that_cannot_be_meant_are_named() -> None:
    layer, x = LSTM(5, 7), torch.randn(4, 3, 5)
    for name in ("variational", "recurrent_dropout"):
        with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\), got 1\.0$"):
            LSTM(5, 7, **{name: 1.0})
    with pytest.raises(TypeError, match="dropout must be a Dropout, got the module Dropout"):
        layer.dropout = nn.Dropout(0.3)  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"dropout must be a Dropout, as Dropout\(.*\), got 0\.3"):
        layer.dropout = 0.3  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"masks must be a ModelMasks, .*, got Masks"):
        layer(x, masks=Masks())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"the state must be tensors, got \[1, 3, 7\], NoneType"):
        layer(x, (torch.zeros(1, 3, 7), None))
    with pytest.raises(ValueError, match=r"input must be packed rows of 5, got \[12, 4\]"):
        layer(nn.utils.rnn.pack_padded_sequence(x[..., :4], [4, 4, 4]))
    with pytest.raises(
        ValueError, match=r"masks\.out must be torch\.float32 on cpu like the input, got torch\.float64"
    ):
        layer(x, masks=ModelMasks([Masks()], None, torch.ones(1, 3, 7, dtype=torch.float64)))
    with pytest.raises(ValueError, match="module must have plain weights"):
        LSTM.from_torch(WeightDrop(nn.LSTM(5, 7), 0.5))


def test_scripts_find_what_they_call_of_torchs_layers() -> None:
    layer = LSTM(5, 7, 2)
    module = nn.LSTM(5, 7, 2)
    x = torch.randn(4, 3, 5)
    layer.flatten_parameters()
    assert [[w.shape for w in part] for part in layer.all_weights] == [
        [w.shape for w in part] for part in module.all_weights
    ]
    assert torch.equal(layer(input=x, hx=None)[0], layer(x)[0])
    assert LSTM(5, 7, 2, dropout=np.float32(0.5)).dropout.max_probability == 0.5


def test_the_warning_of_one_layer_points_to_the_call() -> None:
    for ours in (LSTM, GRU):
        with pytest.warns(UserWarning, match="no effect with num_layers=1") as caught:
            ours(5, 7, dropout=0.3)
        assert caught[0].filename == __file__


def test_projections_take_no_notice_of_autocast() -> None:
    layer, x = LSTM(5, 7, 2, proj_size=3), torch.randn(4, 3, 5)
    expected = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x)[0], expected)


def test_per_sample_gradients_work_with_dropout() -> None:
    """Each sample with masks of its own, through `reference`."""
    layer, x = LSTM(5, 7, variational=0.5, backend="reference"), torch.randn(4, 3, 5)
    parameters = {name: weight.detach() for name, weight in layer.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (one[:, None],))[0].square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 1), randomness="different")(parameters, x)
    dropped = (
        gradients["weight_hh_l0"].abs().amax(1) == 0
    )  # [sample, H]: what entered no product has no gradient
    assert dropped.any(1).all() and not torch.equal(dropped[0], dropped[1])


def test_tools_for_mc_dropout_find_the_switch() -> None:
    """A child that is an `nn.Dropout`, without parameters, which decides whether masks are drawn."""
    layer = GRU(5, 7, 2, dropout=Dropout("variational", p_x=0.3, p_h=[0.0, 0.4])).eval()
    x = torch.randn(4, 3, 5)
    plain = layer(x)[0]
    switches = [module for module in layer.modules() if isinstance(module, nn.Dropout)]
    assert len(switches) == 1 and switches[0].p == 0.4 and not list(switches[0].parameters())
    assert type(switches[0]).__name__.startswith("Dropout"), "many programs look for the name"
    switches[0].train()
    assert not torch.equal(layer(x)[0], plain) and not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], plain)
    layer.dropout = Dropout("variational", p_h=0.6)
    assert switches[0].p == 0.6
    with pytest.raises(ValueError, match="moon"):
        layer.dropout = Dropout("moon", p_c=0.3)
    with pytest.raises(AttributeError):
        switches[0].p = 0.1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("backend", "dropout"),
    [
        ("native", Dropout("variational", p_x=0.5, p_h=0.5)),
        ("fused", Dropout("variational", p_x=0.5, p_h=0.5)),
        ("native", MOON),
    ],
    ids=["native", "fused", "moon"],
)
def test_a_layer_that_draws_its_own_masks_compiles_whole(
    backend: str, dropout: Dropout, dynamic: bool
) -> None:
    """With sizes that the compiler knows, and that it does not."""
    layer = LSTM(5, 7, dropout=dropout, backend=backend)
    x = torch.randn(4, 3, 5)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    first, second = compiled(x)[0], compiled(x)[0]
    assert not torch.equal(first, second)
    first.sum().backward()
    assert layer.weight_hh_l0.grad is not None and layer.weight_hh_l0.grad.abs().max() > 0


def test_layers_on_the_cpu_ignore_torchs_default_device() -> None:
    x_BTD = torch.randn(3, 4, 5)
    layer = LSTM(5, 7, batch_first=True, dropout=Dropout("variational", p_x=0.5))
    masks = layer.masks(4, 3)
    with torch.device("meta"):
        chosen = masks.repeat(2).rows([5, 0, 2])
        y_BTH, _ = layer(x_BTD, lengths=[4, 0, 2], masks=chosen)
        lengths = torch.tensor([4, 0, 2], device="cpu")
        again_BTH, _ = layer(x_BTD, lengths=lengths, masks=masks.rows([2, 0, 1]))
    assert torch.equal(y_BTH, again_BTH) and torch.equal(y_BTH[1], torch.zeros(4, 7))


def test_an_input_without_a_batch_compiles_whole() -> None:
    layer = LSTM(5, 7, variational=0.5).eval()
    x_TD = torch.randn(4, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for own, expected in zip(tree_leaves(compiled(x_TD)), tree_leaves(layer(x_TD)), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "layer norm"])
@pytest.mark.parametrize("layer_type", [LSTM, GRU])
@pytest.mark.parametrize("backend", ["reference", "fused", "native"])
def test_activation_checkpoints_give_the_same_gradients(
    backend: str, layer_type: type[LSTM | GRU], layer_norm: bool
) -> None:
    """They count what is saved for the backward pass, in the first call of a process, too, which checks the
    back end.
    """
    layer = layer_type(5, 7, 2, variational=0.3, backend=backend, layer_norm=layer_norm)
    x, masks = torch.randn(4, 3, 5), layer.masks(4, 3)
    gradients = []
    for call in (layer, partial(checkpoint, layer, use_reentrant=False)):
        native.unavailable_reason.cache_clear()
        call(x, masks=masks)[0].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
        layer.zero_grad()
    for plain, recomputed in zip(*gradients, strict=True):
        same(recomputed, plain)


@pytest.mark.native  # with `fused`, lengths break the graph
def test_compiled_code_refuses_negative_lengths() -> None:
    layer, x = LSTM(5, 7).eval(), torch.randn(4, 3, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    lengths = torch.tensor([4, 1, 2])
    same(compiled(x, lengths=lengths)[0], layer(x, lengths=lengths)[0])
    with pytest.raises(RuntimeError, match="lengths must be at least 0"):
        compiled(x, lengths=-lengths)


@pytest.mark.native
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_transforms_traces_exports_and_forward_derivatives_need_the_reference() -> None:
    x = torch.randn(4, 3, 5)
    layer = LSTM(5, 7, backend="reference")
    expected = layer(x)[0]
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    same(traced(x)[0], expected)
    program = torch.export.export(layer, (x,))
    same(program.module()(x)[0], expected)
    per_sample = torch.func.vmap(lambda one: layer(one[:, None])[0], 1, 1)(x)
    same(per_sample[:, :, 0], expected)
    tangent = torch.randn_like(x)
    _, slope = torch.func.jvp(lambda x: layer(x)[0], (x,), (tangent,))
    step = 1e-2
    same(slope, (layer(x + step * tangent)[0] - layer(x - step * tangent)[0]) / (2 * step), 1e-3)
    with torch.no_grad(), forward_ad.dual_level():
        same(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))[0]).tangent, slope)
    dropping = LSTM(5, 7, variational=0.5, backend="reference")
    with pytest.raises(ValueError, match=r"masks are required under torch\.jit\.trace"):
        torch.jit.trace(dropping, (x,), check_trace=False)
    same(torch.jit.trace(dropping.eval(), (x,), check_trace=False)(x)[0], dropping(x)[0])
    layer.backend = "auto"
    same(torch.jit.trace(layer, (x,), check_trace=False)(x)[0], expected)
    same(torch.export.export(layer, (x,)).module()(x)[0], expected)
    same(torch.func.jvp(lambda x: layer(x)[0], (x,), (tangent,))[1], slope)
    for backend in ("native", "fused"):
        other = LSTM(5, 7, backend=backend)
        with pytest.raises(
            ValueError, match=rf"backend={backend} does not support torch\.jit\.trace; use backend=.reference"
        ):
            torch.jit.trace(other, (x,), check_trace=False)
        with pytest.raises(
            ValueError, match=rf"backend={backend} does not support the transforms of torch\.func"
        ):
            torch.func.vmap(lambda one, layer=other: layer(one[:, None])[0], 1, 1)(x)
        with (
            torch.no_grad(),
            forward_ad.dual_level(),
            pytest.raises(ValueError, match=rf"backend={backend} does not support forward-mode derivatives"),
        ):
            other(forward_ad.make_dual(x, tangent))


def test_importing_them_needs_neither_hydra_nor_omegaconf() -> None:
    program = (
        "import sys; sys.modules.update(hydra=None, omegaconf=None)\n"
        "import torch; from vdrop_cli.layers import LSTM, Dropout\n"
        "LSTM(5, 7, dropout=Dropout('variational', p_h=0.3))(torch.zeros(4, 3, 5))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_training_mode_draws_new_masks_each_call_from_torchs_random_state() -> None:
    layer, x = LSTM(5, 7, dropout=VARIATIONAL), torch.randn(4, 3, 5)
    torch.manual_seed(3)
    first, second = layer(x)[0], layer(x)[0]
    torch.manual_seed(3)
    assert torch.equal(layer(x)[0], first)
    assert not torch.equal(first, second)


def test_moon_without_masks_is_a_plain_lstm() -> None:
    layer, plain = LSTM(5, 7, 2, dropout=MOON).eval(), torch.nn.LSTM(5, 7, 2)
    plain.load_state_dict(layer.state_dict())
    x, state = torch.randn(6, 3, 5), (torch.randn(2, 3, 7), torch.randn(2, 3, 7))
    same(flat(layer(x, state)), flat(plain(x, state)))


def test_moons_hidden_state_is_on_average_that_of_evaluation_after_any_number_of_steps() -> None:
    """With open gates all that is carried stays: the mean over masks is the state without them."""
    layer = LSTM(5, 40, dropout=MOON)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        i, f, _, o = layer.weights(0)[2].chunk(4)
        i.fill_(-50.0)
        f.fill_(50.0)
        o.fill_(50.0)
    x, state = torch.zeros(30, 1000, 5), (torch.zeros(1, 1000, 40), torch.ones(1, 1000, 40))
    drawn, (h, _) = layer(x, state)
    expected = math.tanh(1.0)
    assert drawn[0].mean().item() == pytest.approx(expected, rel=0.01)
    assert torch.equal(drawn[-1], drawn[0]) and torch.equal(h[0], drawn[-1])
    assert drawn.unique().tolist() == pytest.approx([0.0, expected / 0.75], rel=1e-3)
    same(layer.eval()(x, state)[0], torch.full_like(drawn, expected))


@pytest.mark.parametrize(
    "options",
    [
        *({"backend": backend} for backend in ("reference", "fused")),
        pytest.param({"backend": "native"}, marks=pytest.mark.native),
        {"residual": True},
        {"proj_size": 3},
        {"bidirectional": True},
    ],
    ids=str,
)
def test_moons_mask_is_one_on_the_hidden_state_wherever_it_is_read(options: dict[str, Any]) -> None:
    """From a state of zeros; so what the next layer, the recurrence and the caller read has the mean of
    evaluation.
    """
    moon, plain = (LSTM(5, 7, 2, **options) for _ in range(2))
    moon.dropout = Dropout("moon", p_c=(0.25, 0.5))
    plain.load_state_dict(moon.state_dict())
    x = torch.randn(6, 3, 5, requires_grad=True)
    masks = moon.masks(6, 3)
    y, (h, _), states = moon(x, masks=masks, return_states=True)
    expected, last, directions = x, [], moon.directions
    for depth, p in enumerate((0.25, 0.5)):
        outputs = []
        for direction in range(directions):
            number = depth * directions + direction
            mask = masks.layers[number].c
            assert mask is not None and set(mask.unique().tolist()) <= {0.0, 1.0}
            outputs.append(masked_by_definition(plain, depth, direction, expected, mask[0] / (1 - p)))
            same(states[number][0], outputs[-1])
            last.append(outputs[-1][0 if direction else -1])
        joined = torch.cat(outputs, -1)
        expected = joined + expected if options.get("residual") and depth else joined
    same(y, expected)
    same(h, torch.stack(last))
    upstream = torch.randn_like(y)
    same(
        torch.autograd.grad(y, [x, *moon.parameters()], upstream),
        torch.autograd.grad(expected, [x, *plain.parameters()], upstream),
    )


def masked_by_definition(
    layers: LSTM, depth: int, direction: int, x_TBD: torch.Tensor, mask_BH: torch.Tensor
) -> torch.Tensor:
    """Returns the hidden states of one layer and direction; the mask multiplies them where they are made."""
    w_ih, w_hh, b_ih, b_hh = layers.weights(depth, direction)
    w_hr = layers.projection(depth, direction)
    h, c = x_TBD.new_zeros(x_TBD.shape[1], w_hh.shape[1]), torch.zeros_like(mask_BH)
    states = []
    for x_BD in x_TBD.flip(0) if direction else x_TBD:
        i, f, g, o = (x_BD @ w_ih.T + h @ w_hh.T + b_ih + b_hh).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = mask_BH * o.sigmoid() * c.tanh()
        h = h if w_hr is None else h @ w_hr.T
        states.append(h)
    return torch.stack(states[::-1] if direction else states)


def test_a_text_in_two_parts_with_moons_masks_is_that_text() -> None:
    layer, x = LSTM(5, 7, 2, dropout=MOON), torch.randn(6, 3, 5)
    masks = layer.masks(6, 3)
    y, state = layer(x, masks=masks)
    first, between = layer(x[:4], masks=masks)
    second, last = layer(x[4:], between, masks=masks)
    same(torch.cat([first, second]), y)
    same(flat(last), flat(state))


def test_evaluation_mode_has_no_masks_unless_they_are_given() -> None:
    layer = GRU(5, 7, dropout=VARIATIONAL).eval()
    plain = GRU(5, 7)
    x = torch.randn(4, 3, 5)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], plain(x)[0])
    assert torch.equal(layer(x, masks=layer.masks(4, 3))[0], plain(x)[0]), "masks of evaluation are means"
    layer.sampling.train()
    masks = layer.masks(4, 3, x.device)
    layer.eval()
    assert torch.equal(layer(x, masks=masks)[0], layer(x, masks=masks)[0])
    assert not torch.equal(layer(x, masks=masks)[0], plain(x)[0])


def test_the_masks_act_where_the_policy_says() -> None:
    """The output mask is what is zero in the output; the input mask of layer 0 is what gets no gradient in
    x.
    """
    layer, x = LSTM(5, 7, num_layers=2, dropout=VARIATIONAL), torch.randn(4, 3, 5, requires_grad=True)
    masks = layer.masks(4, 3, x.device)
    y, _ = layer(x, masks=masks)
    assert masks.out is not None and masks.layers[0].x is not None
    assert torch.equal(y == 0, (masks.out == 0).expand(4, -1, -1))
    gradient = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(gradient == 0, (masks.layers[0].x[0] == 0).expand(4, -1, -1))


def test_what_does_not_go_together_is_an_error() -> None:
    with pytest.raises(ValueError, match="moon"):
        GRU(5, 7, dropout=Dropout(Policy.moon, p_c=0.5))
    with pytest.raises(ValueError, match="policy must not be moon with layer_norm=True"):
        LSTM(5, 7, layer_norm=True, dropout=MOON)
    with pytest.raises(ValueError, match="2 layers"):
        LSTM(5, 7, num_layers=2)(torch.randn(4, 3, 5), masks=ModelMasks([Masks()]))
    with pytest.raises(TypeError, match=r"dropout must be a Dropout or a probability, got 'variational'"):
        LSTM(5, 7, dropout="variational")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        LSTM(5, 7, 2, dropout=1.0)
    with pytest.raises(ValueError, match="give one of dropout and variational"):
        LSTM(5, 7, 2, dropout=0.2, variational=0.3)
    with pytest.raises(ValueError, match=r"p_word must be 0 in a layer, .* use WordDropout"):
        LSTM(5, 7, dropout=Dropout("variational", p_word=0.3))
    with pytest.raises(
        ValueError, match=r"p_head must be 0, and not in new_each_step, .* got 0\.3; use Lock"
    ):
        LSTM(5, 7, dropout=Dropout("variational", p_head=0.3))
    one = Dropout("variational", p_h=0.3, one_state_mask=True)
    for option in ("bidirectional", "residual"):
        with pytest.raises(ValueError, match="one_state_mask must be False with bidirectional=True or resid"):
            LSTM(5, 7, 2, dropout=one, **{option: True})
    with pytest.raises(ValueError, match="p_head must be 0, and not in new_each_step, in a layer"):
        LSTM(5, 7, dropout=Dropout("variational", p_x=0.3, new_each_step=["p_head"]))
    with pytest.raises(ValueError, match="p_h must be one probability or 2, one for each layer, got 3"):
        LSTM(5, 7, 2, dropout=Dropout("variational", p_h=[0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="proj_size must be 0 for a GRU"):
        GRU(5, 7, proj_size=3)
    with pytest.raises(ValueError, match="reverse must be False with bidirectional=True"):
        GRU(5, 7, bidirectional=True, reverse=True)
    for name, sizes in (("input_size", (0, 7, 1)), ("hidden_size", (5, 0, 1)), ("num_layers", (5, 7, 0))):
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
            LSTM(*sizes)


def test_errors_about_inputs_and_states_show_the_shapes_that_were_passed() -> None:
    x, state = torch.randn(4, 3, 5), torch.randn(2, 3, 7)
    lstm, gru = LSTM(5, 7, num_layers=2), GRU(5, 7, num_layers=2)
    for wrong in (x[..., :4], x[0, :, :4], x[None]):
        with pytest.raises(
            ValueError,
            match=rf"^input must be \[T, B, 5\], or \[T, 5\], got {re.escape(str(list(wrong.shape)))}$",
        ):
            lstm(wrong)
    with pytest.raises(ValueError, match=r"^input must be \[B, T, 5\], or \[T, 5\], got \[3, 4\]$"):
        LSTM(5, 7, batch_first=True)(x[0, :, :4])
    with pytest.raises(ValueError, match=r"^x must be torch.float32 like the weights, got torch.float16$"):
        lstm(x.half(), (state.half(), state.half()))
    with pytest.raises(ValueError, match=r"^lengths must be at least 0, got -1"):
        lstm(x, lengths=[4, -1, 2])
    with pytest.raises(ValueError, match=r"^lengths must be None with an input without a batch"):
        lstm(x[:, 0], lengths=[4])
    packed = nn.utils.rnn.pack_padded_sequence(x, [4, 4, 4])
    with pytest.raises(ValueError, match=r"^lengths must be None with a PackedSequence"):
        lstm(packed, lengths=[4, 4, 4])
    deeper = torch.randn(4, 3, 7)
    for states in (state, (state,), (deeper, deeper), (state[:1], state), (state, state, state)):
        with pytest.raises(ValueError, match=r"^the state must be \(h, c\), each \[2, 3, 7\], got \["):
            lstm(x, states)
    with pytest.raises(ValueError, match=r"^the state must be h, \[2, 3, 7\], got \[4, 3, 7\]$"):
        gru(x, deeper)
    assert torch.equal(lstm(x, [state, state])[0], lstm(x, (state, state))[0]), "torch takes lists, too"
    assert torch.equal(lstm(x, lengths=[4, 1, 2])[0], lstm(x, lengths=torch.tensor([4, 1, 2]))[0])


@pytest.mark.parametrize(("cell", "dropout"), [(LSTM, VARIATIONAL), (GRU, VARIATIONAL), (LSTM, MOON)])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-6), (torch.bfloat16, 0.03), (torch.float16, 0.003)]
)
def test_they_train_and_evaluate_in_other_types(
    cell: type[LSTM | GRU], dropout: Dropout, dtype: torch.dtype, error: float
) -> None:
    """With the same masks as in fp32, forward and back."""
    layer, x = cell(5, 7, num_layers=2, dropout=dropout), torch.randn(4, 3, 5)
    other = copy.deepcopy(layer).to(dtype)
    for training in (True, False):
        results = []
        for one in (layer, other):
            torch.manual_seed(1)
            one.train(training).zero_grad()
            y, _ = one(x.to(one.weight_ih_l0.dtype))
            y.sum().backward()
            assert y.dtype == one.weight_hh_l1.grad.dtype == one.weight_ih_l0.dtype
            results.append([y, one.weight_hh_l1.grad, one.weight_ih_l0.grad])
        for exact, ours in zip(*results, strict=True):
            assert (ours.float() - exact).norm() <= error * exact.norm()


@pytest.mark.parametrize("dropout", [VARIATIONAL, MOON])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_under_autocast_they_take_what_it_rounds_and_work_as_without(
    dropout: Dropout, training: bool, backend: str
) -> None:
    layer = LSTM(5, 7, dropout=dropout, backend=backend).train(training)
    x, state = torch.randn(4, 3, 5).bfloat16(), torch.randn(1, 3, 7).bfloat16()
    torch.manual_seed(1)
    expected, _ = layer(x.float(), (state.float(), state.float()))
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, _ = layer(x, (state, state))
    assert torch.equal(result, expected)


def test_weights_may_be_put_in_place_of_the_parameters() -> None:
    """By `functional_call`, whose gradients go to them, and by parametrizations."""
    layer, x = LSTM(5, 7, num_layers=2), torch.randn(4, 3, 5)
    doubled = {name: (2 * value).detach().requires_grad_() for name, value in layer.named_parameters()}
    other = LSTM(5, 7, num_layers=2)
    other.load_state_dict(doubled)
    result, _ = torch.func.functional_call(layer, doubled, (x,))
    assert torch.equal(result, other(x)[0])
    assert all(gradient.any() for gradient in torch.autograd.grad(result.sum(), list(doubled.values())))
    nn.utils.parametrizations.weight_norm(other, "weight_hh_l1")
    torch.testing.assert_close(other(x)[0], result)


def test_without_dropout_torchs_random_state_stays_as_it_is() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    for dropout in (None, Dropout(Policy.variational)):
        layer = LSTM(5, 7, dropout=dropout)
        torch.manual_seed(1)
        layer(torch.zeros(4, 3, 5))
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ours", "theirs"), [(LSTM, nn.LSTM), (GRU, nn.GRU)])
def test_from_torch_takes_weights_and_variant(
    ours: type[LSTM | GRU], theirs: type[nn.LSTM | nn.GRU], dtype: torch.dtype
) -> None:
    module = theirs(5, 7, 2, batch_first=True, dropout=0.5, dtype=dtype).eval()
    module.weight_hh_l1.requires_grad_(False)
    before = torch.get_rng_state()
    layers = ours.from_torch(module, dropout=Dropout(Policy.variational, p_h=0.3), backend="fused")
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(3, 4, 5, dtype=dtype)
    expected = module(x)
    torch.testing.assert_close(layers(x), expected, rtol=1e-5, atol=1e-6)
    assert (
        layers.dropout.p_h == 0.3 and not layers.training and layers.backend == "fused" and layers.batch_first
    )
    assert not layers.weight_hh_l1.requires_grad and layers.weight_hh_l0.requires_grad
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    torch.testing.assert_close(layers(x), expected, rtol=1e-5, atol=1e-6)
    assert {p.device.type for p in ours.from_torch(theirs(5, 7, device="meta")).parameters()} == {"meta"}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "layer",
    [
        lambda **options: LSTM(5, 7, 2, variational=0.3, **options),
        lambda **options: LSTM(5, 7, dropout=Dropout("moon", p_c=0.3), batch_first=True, **options),
        lambda **options: LSTM(5, 7, 2, bidirectional=True, proj_size=3, bias=False, **options),
        lambda **options: GRU(
            5, 7, 2, bidirectional=True, reset_after=True, recurrent_dropout=0.3, **options
        ),
    ],
)
def test_to_torch_gives_a_module_with_the_same_results(
    layer: Callable[..., LSTM | GRU], dtype: torch.dtype
) -> None:
    ours = layer(dtype=dtype).eval()
    ours.weight_hh_l0.requires_grad_(False)
    before = torch.get_rng_state()
    theirs = ours.to_torch()
    assert type(theirs) is ours.torch_module and torch.equal(torch.get_rng_state(), before)
    x = torch.randn(3, 4, 5, dtype=dtype)
    expected = ours(x)
    torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-6)
    assert not theirs.training and [p.requires_grad for p in theirs.parameters()] == [
        p.requires_grad for p in ours.parameters()
    ]
    with torch.no_grad():
        ours.weight_ih_l0.zero_()
    torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-6)
    again = type(ours).from_torch(theirs)
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (GRU(5, 7), r"reset_after must be True for a torch\.nn\.GRU, got False"),
        (LSTM(5, 7, layer_norm=True), r"layer_norm must be False for a torch\.nn\.LSTM, got True"),
        (LSTM(5, 7, 2, residual=True), "residual must be False"),
        (LSTM(5, 7, reverse=True), "reverse must be False"),
        (LSTM(5, [7, 4]), "hidden_size must be one size"),
        (WeightDrop(LSTM(5, 7), 0.5), "plain weights"),
    ],
)
def test_to_torch_refuses_what_torch_does_not_have(layer: LSTM | GRU, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer.to_torch()


@pytest.mark.parametrize("name", ["variational", "recurrent_dropout"])
def test_an_argument_that_would_change_nothing_cannot_be_set(name: str) -> None:
    for module in (LSTM(5, 7, 2, variational=0.2), GRU(5, 7), LSTMCell(5, 7)):
        before = module.dropout
        with pytest.raises(AttributeError, match=rf"^{name} is an argument of .* set dropout = Dropout"):
            setattr(module, name, 0.5)
        assert module.dropout == before
    with pytest.raises(TypeError, match=rf"^{name} must be one probability, got \[0\.1, 0\.2\]; dropout="):
        LSTM(5, 7, 2, **{name: [0.1, 0.2]})


@pytest.mark.parametrize("cell", [LSTM, GRU])
def test_masks_that_need_a_gradient_get_it_by_the_reference(cell: type[LSTM | GRU]) -> None:
    """As for learned dropout probabilities: the derivative by a mask is that of finite differences."""
    layer = cell(5, 7, 2, dtype=torch.float64)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    h, out = torch.rand(1, 1, 3, 7, dtype=torch.float64), torch.rand(1, 3, 7, dtype=torch.float64)
    weight = torch.rand_like(layer.weight_hh_l0)

    def loss(h: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        masks = ModelMasks([Masks(), Masks(h=h)], out=out, weights=[weight, None])
        y: Tensor = layer(x, masks=masks)[0]
        return y.sin().sum()

    inputs = tuple(tensor.requires_grad_() for tensor in (h, out, weight))
    assert torch.autograd.gradcheck(loss, inputs)
    for backend in ("native", "fused"):
        layer.backend = backend
        with pytest.raises(
            ValueError, match=f"backend={backend} does not support masks that need a gradient"
        ):
            loss(*inputs)
        with torch.no_grad():
            assert torch.isfinite(loss(*inputs))
    assert torch.isfinite(loss(h.detach(), out, weight)), (
        "masks of output and weights are outside the kernels"
    )


def test_masks_that_are_saved_are_read_without_running_code(tmp_path: Path) -> None:
    layer, x = (
        LSTM(5, 7, 2, dropout=Dropout("variational", p_x=0.3, p_h=0.3, p_weight=0.2)),
        torch.randn(4, 3, 5),
    )
    masks = layer.masks(4, 3)
    torch.save({"masks": masks, "words": WordDropout(0.3).masks(4, 3)}, tmp_path / "masks")
    read = torch.load(tmp_path / "masks", weights_only=True)
    assert torch.equal(layer(x, masks=read["masks"])[0], layer(x, masks=masks)[0])
    ids = torch.randint(9, (4, 3))
    assert read["words"].keep(ids).shape == (4, 3)
    cell = LSTMCell(5, 7, variational=0.3)
    masks = cell.masks(3)
    expected = cell(x[0], masks=masks)
    torch.save(masks, tmp_path / "masks")  # after a step, when the cell has a cache in them
    read = torch.load(tmp_path / "masks", weights_only=True)
    torch.testing.assert_close(cell(x[0], masks=read), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("ours", "theirs"), [(LSTM, nn.LSTM), (GRU, nn.GRU)])
def test_from_torch_keeps_the_dropout_between_layers_unless_another_is_chosen(
    ours: type[LSTM | GRU], theirs: type[nn.LSTM | nn.GRU]
) -> None:
    module = theirs(5, 7, 2, dropout=0.25)
    assert ours.from_torch(module).dropout == Dropout("zaremba", p_x=(0.0, 0.25))
    assert ours.from_torch(module, dropout=0.5).dropout == Dropout("zaremba", p_x=(0.0, 0.5))
    fixed = Dropout("variational", p_x=0.3, p_h=0.3, p_out=0.3)
    assert ours.from_torch(module, variational=0.3).dropout == fixed
    recurrent = ours.from_torch(
        module, recurrent_dropout=0.3, backend="fused", compute_dtype=torch.bfloat16, recompute=True
    )
    assert recurrent.dropout == Dropout("variational", p_h=0.3)
    assert recurrent.options == {"backend": "fused", "compute_dtype": torch.bfloat16, "recompute": True}


@pytest.mark.parametrize(("ours", "theirs", "options"), BOTH)
def test_a_layer_on_the_device_meta_has_the_shapes_of_torchs(
    ours: type[LSTM | GRU], theirs: type[nn.LSTM | nn.GRU], options: dict[str, Any]
) -> None:
    x = torch.empty(4, 3, 5, device="meta")
    made = ours(5, 7, 2, variational=0.3, device="meta", **options), theirs(5, 7, 2, device="meta")
    (y, state), (expected, _) = made[0](x), made[1](x)
    assert y.shape == expected.shape and y.device.type == "meta"
    assert next(iter(state if isinstance(state, tuple) else (state,))).shape == (2, 3, 7)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in made[0].parameters())


def test_a_gru_with_the_weights_of_torchs_computes_something_else_unless_it_resets_after() -> None:
    theirs, x = nn.GRU(5, 7), torch.randn(4, 3, 5)
    loaded = GRU(5, 7)
    with pytest.warns(UserWarning, match="which computes something else"):
        loaded.load_state_dict(theirs.state_dict())
    assert (loaded(x)[0] - theirs(x)[0]).abs().max() > 1e-3
    assert "reset_after=False" in repr(loaded) and "reset_after=True" in repr(GRU.from_torch(theirs))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("change", [weight_norm, prune.identity, parametrizations.weight_norm])
def test_from_torch_refuses_weights_that_are_computed_from_others(change: Any) -> None:
    """Those of the older kind are out of date until the module's next call."""
    module = change(nn.LSTM(5, 7), "weight_hh_l0")
    with pytest.raises(ValueError, match="module must have plain weights"):
        LSTM.from_torch(module)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
def test_a_weight_of_several_parts_is_that_of_the_layer(name: str) -> None:
    layer, x = LSTM(5, 7, variational=0.3), torch.randn(4, 3, 5)
    expected = layer.eval()(x)[0]
    changed = parametrizations.weight_norm(layer, name)
    same(changed(x)[0], expected)
    masks = changed.train().masks(4, 3)
    changed(x, masks=masks)[0].sum().backward()
    assert getattr(changed.parametrizations, name).original0.grad.isfinite().all()


def test_another_module_than_torchs_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.LSTM, got GRU"):
        LSTM.from_torch(nn.GRU(5, 7))


def test_repr_names_what_is_computed() -> None:
    said = repr(LSTM(5, 7, 2, batch_first=True, dropout=VARIATIONAL))
    assert all(
        part in said
        for part in ("num_layers=2", "batch_first=True", "variational(p_x=0.3, p_h=0.3, p_out=0.3)")
    )
    assert "dropout=none, reset_after=False" in repr(GRU(5, 7)) and "moon(p_c=0.25)" in repr(
        LSTM(5, 7, dropout=MOON)
    )


def test_a_tool_that_replaces_the_switch_gets_an_error_in_either_mode() -> None:
    """Or else the dropout on the recurrence would be off without a word."""
    layer, cell = LSTM(5, 7, variational=0.5), GRUCell(5, 7, dropout=Dropout("variational", p_h=0.5))
    for module in (layer, cell):
        module.sampling = nn.Dropout(0.5)
        for training in (True, False):
            module.train(training)
            with pytest.raises(TypeError, match=r"sampling was replaced .* use mc_dropout\(model\)"):
                module(torch.ones(2, 5) if module is cell else torch.ones(4, 2, 5))


@pytest.mark.parametrize("wrong", [torch.int8, torch.bool, torch.complex64, "bf16"])
def test_products_in_a_type_without_fractions_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="compute_dtype must be a floating-point type"):
        LSTM(5, 7, compute_dtype=wrong)
    layer = LSTM(5, 7)
    layer.compute_dtype = wrong
    with pytest.raises(ValueError, match="compute_dtype must be a floating-point type"):
        layer(torch.ones(2, 3, 5))


def test_a_change_of_the_output_in_place_leaves_the_states() -> None:
    y, _, states = LSTM(5, 7, 2)(torch.randn(4, 3, 5), return_states=True)
    before = states[-1][0].clone()
    assert torch.equal(y, before)
    y.data.mul_(2)
    assert torch.equal(states[-1][0], before)


def test_vmap_over_sequences_and_their_lengths() -> None:
    torch.manual_seed(0)
    layer = LSTM(5, 7, 2, bidirectional=True, backend="reference").eval()
    x, lengths = torch.randn(6, 4, 5), torch.tensor([6, 1, 3, 0])

    def run(sequence: Tensor, length: Tensor) -> Tensor:
        return cast(Tensor, layer(sequence[:, None], lengths=length[None])[0][:, 0])

    together = torch.func.vmap(run, (1, 0), 1)(x, lengths)
    for n, length in enumerate(lengths):
        torch.testing.assert_close(together[:, n], run(x[:, n], length))
    torch.testing.assert_close(together, layer(x, lengths=lengths)[0])
    with pytest.raises(ValueError, match="lengths must be at least 0, got -1"):
        torch.func.vmap(run, (1, 0), 1)(x, lengths - 1)
    with pytest.raises(ValueError, match="lengths must be at least 0, got -1"):
        torch.func.grad(lambda x: layer(x, lengths=lengths - 1)[0].sum())(x)


def test_tied_weights_stay_tied_when_a_module_is_copied() -> None:
    theirs = nn.LSTM(7, 7, 2)
    theirs.weight_hh_l1 = theirs.weight_hh_l0
    ours = LSTM.from_torch(theirs)
    assert ours.weight_hh_l1 is ours.weight_hh_l0
    assert len(list(ours.parameters())) == len(list(theirs.parameters())) == 7
    x = torch.randn(3, 2, 7)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masks_have_the_digits_of_their_layer_whatever_the_default_type_is(dtype: torch.dtype) -> None:
    layer, words = LSTM(5, 7, variational=0.25), WordDropout(0.3)
    ids, x = torch.randint(0, 9, (4, 3)), torch.ones(4, 3, 2)

    def drawn() -> list[Tensor]:
        torch.manual_seed(1)
        masks = layer.masks(4, 3)
        return [*(mask for mask in masks.layers[0] if mask is not None), words(x, ids)]

    usual = drawn()
    torch.set_default_dtype(dtype)
    try:
        others = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    for mask, other in zip(usual, others, strict=True):
        assert mask.dtype == other.dtype == torch.float32 and torch.equal(mask, other)
        assert mask.unique().numel() == 2


def test_masks_with_too_few_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"masks\.layers\[0\]\.h must have 4 dimensions, got \[3, 7\]"):
        ModelMasks([Masks(h=torch.ones(3, 7))])
    with pytest.raises(ValueError, match=r"masks\.out must have 3 dimensions, got \[3, 7\]"):
        ModelMasks([Masks()], out=torch.ones(3, 7))


def test_public_names_are_imported_from_the_package_when_they_are_used() -> None:
    program = (
        "import sys, vdrop_cli; assert 'torch' not in sys.modules\n"
        "assert set(vdrop_cli.__all__) == {n for names in vdrop_cli.PUBLIC.values() for n in names}\n"
        "assert set(vdrop_cli.__all__) <= set(dir(vdrop_cli))\n"
        "from vdrop_cli import *; from vdrop_cli.layers import LSTM as same; assert LSTM is same\n"
        "import vdrop_cli.cells; assert vdrop_cli.cells.GRUCell is GRUCell and not hasattr(vdrop_cli, 'RNN')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
