"""The other implementations compute what their names say."""

import pytest
import torch

from tests.conftest import require_torch_lstm, settings
from vdrop_cli.bench.alternatives import (
    CellLoop,
    TorchLayers,
    layer_step,
    rating_step,
    training_step,
    zero_state,
)
from vdrop_cli.policies import Dropout, Policy
from vdrop_cli.settings.choices import Precision

NONE = Dropout(Policy.none)


def test_the_loop_without_dropout_is_torch_lstm() -> None:
    lstm, loop = TorchLayers(5, 2), CellLoop(5, 2)
    weights = dict(lstm.lstm.named_parameters())
    with torch.no_grad():
        for layer, cell in enumerate(loop.cells):
            for name, parameter in cell.named_parameters():
                parameter.copy_(weights[f"{name}_l{layer}"])
    x, state = torch.randn(4, 3, 5), zero_state(2, 3, 5)
    for actual, expected in zip(loop(x, state, NONE)[1], lstm(x, state, NONE)[1], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("p", "weight"), [({"p_x": 1 - 1e-9}, "weight_ih"), ({"p_h": 1 - 1e-9}, "weight_hh")]
)
def test_dropped_inputs_do_not_reach_the_cell(p: dict[str, float], weight: str) -> None:
    """As if its weights were zero."""
    loop = CellLoop(5, 1)
    x = torch.randn(4, 3, 5)
    state = zero_state(1, 3, 5)
    dropped = loop(x, state, Dropout(Policy.variational, **p))[0]
    whole = loop(x, state, NONE)[0]
    with torch.no_grad():
        loop.cells[0].get_parameter(weight).zero_()
    torch.testing.assert_close(dropped, loop(x, state, NONE)[0])
    assert not torch.allclose(dropped, whole)


def test_the_loop_draws_a_mask_a_sequence() -> None:
    """Inputs that are equal at every step, and a cell that remembers nothing, give equal outputs at every
    step.
    """
    loop = CellLoop(50, 1)
    x = torch.ones(4, 3, 50)
    state = zero_state(1, 3, 50)
    with torch.no_grad():
        loop.cells[0].weight_hh.zero_()
        loop.cells[0].bias_ih[50:100] = -100  # the forget gate is shut
    first, second = (loop(x, state, Dropout(Policy.variational, p_x=0.5))[0] for _ in range(2))
    torch.testing.assert_close(first, first[:1].expand(4, -1, -1))
    assert not torch.equal(first[0, 0], first[0, 1]), "a mask for each sequence"
    assert not torch.equal(first, second), "drawn at every call"


@pytest.mark.parametrize("name", ["torch_lstm", "cell_loop"])
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_a_training_step_learns(name: str, precision: Precision) -> None:
    require_torch_lstm(name, precision)
    train = settings("model=lstm_small", "model.hidden_size=16", "dropout=variational", "schedule.lr=0.5")
    torch.manual_seed(0)
    ids = torch.randint(50, (9, 4))
    ids[0, 0] = 49
    step = training_step(name, train.model, train.dropout, train.schedule, precision, ids[:-1], ids[1:])
    losses = [step() for _ in range(40)]
    assert losses[0] == pytest.approx(8 * torch.tensor(50.0).log().item(), rel=0.05), (
        "summed over eight steps"
    )
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["torch_lstm", "cell_loop"])
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_a_step_of_ratings_learns_from_the_output_at_each_last_word(name: str, precision: Precision) -> None:
    require_torch_lstm(name, precision)
    train = settings("task=sentiment", "model.hidden_size=16", "dropout=variational", "schedule.lr=0.01")
    torch.manual_seed(0)
    ids_TB, lengths_B = torch.randint(20, (9, 4)), torch.tensor([9, 2, 5, 1])
    targets_B = torch.tensor([-1.0, 0.5, 1.0, 0.0])
    losses = []
    for padding in (0, 7):
        for b, length in enumerate(lengths_B.tolist()):
            ids_TB[length:, b] = padding
        ids_TB[0, 0] = 19
        torch.manual_seed(0)
        step = rating_step(
            name, train.model, train.dropout, train.schedule, precision, ids_TB, lengths_B, targets_B
        )
        losses.append([step() for _ in range(40)])
    assert losses[0][-1] < 0.5 * losses[0][0] and losses[0][0] == losses[1][0], (
        "padding comes after the last word"
    )


@pytest.mark.parametrize("name", ["torch_lstm", "cell_loop"])
def test_a_layer_alone_gives_all_gradients(name: str) -> None:
    train = settings("model=lstm_small", "model.hidden_size=16", "dropout=none")
    gradients = layer_step(name, train.model, train.dropout, Precision.fp32, torch.randn(6, 4, 16))()
    assert [tuple(g.shape) for g in gradients] == [(6, 4, 16), (64, 16), (64, 16), (64,), (64,)]
    assert all(g.abs().sum() > 0 for g in gradients)
