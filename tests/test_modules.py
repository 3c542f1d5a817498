"""Dropout on words, on vectors held over time, and on weights: what shares a mask, and what it costs on
average.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from vdrop_cli.cells import LSTMCell
from vdrop_cli.layers import GRU, LSTM, Dropout
from vdrop_cli.modules import DropoutOnWeights, LockedDropout, WeightDrop, WordDropout


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_locked_mask_is_held_over_time_and_new_for_each_sequence(batch_first: bool) -> None:
    dropout = LockedDropout(0.3, batch_first)
    y = dropout(torch.ones(60, 50, 40))
    y_TBD = y.transpose(0, 1) if batch_first else y
    assert (y_TBD == y_TBD[0]).all() and not torch.equal(y_TBD[0, 0], y_TBD[0, 1])
    assert sorted(y.unique().tolist()) == pytest.approx([0, 1 / 0.7], rel=1e-4)
    assert (y_TBD[0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.06)
    assert not torch.equal(dropout(torch.ones(60, 50, 40)), y)
    x = torch.randn(6, 5, 4)
    masks = dropout.masks(6 if batch_first else 5, 4)
    assert torch.equal(dropout(x, masks), x * masks) and torch.equal(dropout.eval()(x, masks), x * masks)
    assert torch.equal(dropout.masks(5, 4), torch.ones_like(dropout.masks(5, 4))), (
        "masks of evaluation are means"
    )
    assert dropout(x) is x and isinstance(dropout, nn.Dropout)
    with pytest.raises(ValueError, match="masks must be"):
        dropout(x, masks[:, :, :2])
    step = x[:, 2] if batch_first else x[2]
    assert torch.equal(dropout(step), step)
    with pytest.raises(ValueError, match=r"masks are required for a step \[B, D\] in training mode"):
        dropout.train()(step)
    assert torch.equal(dropout(step, masks), step * masks[:, 0] if batch_first else step * masks[0]), (
        "a step of a loop"
    )
    with pytest.raises(ValueError, match=r"x must be \[.*, or \[B, D\], got \[4\]"):
        dropout(x[0, 0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("by", ["type", "token"])
def test_words_are_dropped_by_type_or_by_token(by: str, batch_first: bool) -> None:
    dropout = WordDropout(0.4, by, batch_first)
    ids_TB = torch.tensor([0, 1, 2, 0, 3, 0, 1])[:, None].expand(-1, 300)
    ids = ids_TB.T if batch_first else ids_TB
    y = dropout(torch.ones(*ids.shape, 2), ids)
    factors_TB = (y.transpose(0, 1) if batch_first else y)[..., 0]
    assert torch.equal(y[..., 0], y[..., 1]), "whole words"
    assert (
        torch.equal(factors_TB[0], factors_TB[3])
        == torch.equal(factors_TB[1], factors_TB[6])
        == (by == "type")
    )
    assert (factors_TB[0] == 0).float().mean().item() == pytest.approx(0.4, abs=0.12)
    assert sorted(y.unique().tolist()) == pytest.approx([0, 1 / 0.6], rel=1e-4)
    masks = dropout.masks(7, 300)
    assert masks is not None
    x = torch.randn(*ids.shape, 2)
    assert torch.equal(dropout(x, ids, masks), dropout.eval()(x, ids, masks)) and dropout(x, ids) is x
    dim = 0 if batch_first else 1
    beam = masks.repeat(2).keep(ids.repeat_interleave(2, dim))
    assert torch.equal(beam, masks.keep(ids).repeat_interleave(2, dim))
    assert torch.equal(
        masks.rows([5, 3]).keep(ids.narrow(dim, 0, 2)),
        masks.keep(ids).index_select(dim, torch.tensor([5, 3])),
    )


@pytest.mark.parametrize("by", ["type", "token"])
def test_batch_first_masks_are_those_of_the_transposed_text(by: str) -> None:
    """Where there are as many words as sequences, too."""
    first, second = WordDropout(0.4, by), WordDropout(0.4, by, batch_first=True)
    ids_TB = torch.randint(9, (30, 30))
    factors = []
    for dropout, ids in ((first, ids_TB), (second, ids_TB.T)):
        torch.manual_seed(3)
        masks = dropout.masks(30, 30)
        assert masks is not None
        factors.append(masks.keep(ids))
    assert torch.equal(factors[0], factors[1].T)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("by", ["type", "token"])
def test_a_loop_over_steps_drops_the_words_of_the_whole_text(by: str, batch_first: bool) -> None:
    dropout, ids = WordDropout(0.4, by, batch_first), torch.randint(0, 5, (6, 3))
    ids = ids.T if batch_first else ids
    x, time_dim = torch.randn(*ids.shape, 2), 1 if batch_first else 0
    steps = list(zip(x.unbind(time_dim), ids.unbind(time_dim), strict=True))
    if by == "type":
        masks = dropout.masks(6, 3)
        y = torch.stack([dropout(x_BD, ids_B, masks) for x_BD, ids_B in steps], time_dim)
        assert torch.equal(y, dropout(x, ids, masks))
        with pytest.raises(ValueError, match=r"masks are required for a step \[B, D\] in training mode"):
            dropout(*steps[0])
    else:
        for x_BD, ids_B in steps:
            y_BD = dropout(x_BD, ids_B, dropout.masks(1, 3))
            dropped_B = (y_BD == 0).all(1)
            torch.testing.assert_close(y_BD, x_BD * (~dropped_B)[:, None] / 0.6, rtol=1e-4, atol=0)
            assert dropout(x_BD, ids_B).shape == x_BD.shape
    assert torch.equal(dropout.eval()(*steps[0]), steps[0][0])
    with pytest.raises(ValueError, match=r"x must be \[\*ids\.shape, D\]"):
        dropout(steps[0][0], ids)


def test_masks_on_another_device_are_refused() -> None:
    dropout, x = LockedDropout(0.3), torch.zeros(4, 3, 2, device="meta")
    with pytest.raises(ValueError, match=r"on meta like x, got torch.float32 \[1, 3, 2\] on cpu; draw them"):
        dropout(x, dropout.masks(3, 2))
    assert dropout(x, dropout.masks(3, 2, x.device)).shape == x.shape
    words, ids = WordDropout(0.3), torch.zeros(4, 3, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match=r"masks must be on meta like ids, got cpu; draw them by masks"):
        words(x, ids, words.masks(4, 3))


def test_words_of_another_batch_are_refused() -> None:
    masks = WordDropout(0.4).masks(4, 3)
    assert masks is not None
    with pytest.raises(ValueError, match=r"ids must have 3 sequences .*, got 4"):
        masks.keep(torch.zeros(3, 4, dtype=torch.long))
    by_token = WordDropout(0.4, by="token").masks(1, 3)
    assert by_token is not None
    with pytest.raises(ValueError, match=r"ids must be \[T, B\] = \[1, 3\] like the masks, got \[5, 3\]"):
        by_token.keep(torch.zeros(5, 3, dtype=torch.long))
    for module in (LockedDropout, WordDropout, DropoutOnWeights):
        with pytest.raises(ValueError):
            module(1.5)
    with pytest.raises(ValueError, match="by must be a WordMask: type, token; got 'words'"):
        WordDropout(0.3, by="words")


@pytest.mark.parametrize(
    "build",
    [lambda: nn.LSTM(5, 40), lambda: nn.GRU(5, 40), lambda: LSTM(5, 40), lambda: GRU(5, 40)],
    ids=["nn.LSTM", "nn.GRU", "LSTM", "GRU"],
)
def test_weights_are_dropped_once_a_pass(build: Any) -> None:
    """The pass of training is that of a module whose recurrent weights have those elements at zero; one of
    evaluation has them all.
    """
    plain = build()
    dropped = build()
    dropped.load_state_dict(plain.state_dict())
    assert WeightDrop(dropped, 0.4) is dropped
    x = torch.randn(6, 3, 5)
    raw = dropped.parametrizations.weight_hh_l0.original
    with parametrize.cached():
        y, _ = dropped(x)
        used = dropped.weight_hh_l0.detach()
    assert (used == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)
    present = used != 0
    torch.testing.assert_close(used[present], raw.detach()[present] / 0.6, rtol=1e-4, atol=0)
    with torch.no_grad():
        plain.weight_hh_l0.copy_(used)
    torch.testing.assert_close(y, plain(x)[0])
    (gradient,) = torch.autograd.grad(y.square().sum(), raw)
    assert torch.equal(gradient != 0, present)
    assert not torch.equal(dropped(x)[0], dropped(x)[0]), "new ones every pass"
    with torch.no_grad():
        plain.weight_hh_l0.copy_(raw)
    torch.testing.assert_close(dropped.eval()(x)[0], plain(x)[0])


def test_weights_of_cells_and_wrong_names_are_refused() -> None:
    for cell in (LSTMCell(5, 7), nn.GRUCell(5, 7)):
        with pytest.raises(ValueError, match="its weights would be dropped anew at every step; use a layer"):
            WeightDrop(cell, 0.5)
    with pytest.raises(ValueError, match=r"names are required: a Linear has no parameters weight_hh"):
        WeightDrop(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="which has no weight_xx"):
        WeightDrop(nn.LSTM(3, 4), 0.5, ["weight_xx"])


def test_recurrent_weights_are_not_dropped_twice() -> None:
    twice = Dropout("variational", p_h=0.2, p_weight=0.5)
    with pytest.raises(ValueError, match=r"p_weight of the LSTM must be 0, got 0\.5: .* dropped twice"):
        WeightDrop(LSTM(3, 4, dropout=twice), 0.5)
    layer = WeightDrop(LSTM(3, 4), 0.5)
    with pytest.raises(ValueError, match=r"p_weight must be 0 in a layer with WeightDrop, got 0\.5"):
        layer.dropout = twice
    layer.dropout = Dropout("variational", p_h=0.2)
    assert layer.dropout.p_h == 0.2
    other = WeightDrop(LSTM(3, 4, dropout=twice), 0.5, ["weight_ih_l0"])
    other.dropout = twice
    assert other.dropout.p_weight == 0.5, "these weights are not recurrent"


def test_a_weight_is_dropped_once_a_pass_however_often_its_type_is_asked_for() -> None:
    layer = WeightDrop(LSTM(5, 7, variational=0.3), 0.5, ["weight_ih_l0", "weight_hh_l0"])
    calls = []
    for name in ("weight_ih_l0", "weight_hh_l0"):
        layer.parametrizations[name][0].register_forward_hook(lambda *_, name=name: calls.append(name))
    layer(torch.randn(4, 3, 5))
    assert sorted(calls) == ["weight_hh_l0", "weight_ih_l0"]


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_masks_are_not_drawn_under_a_trace() -> None:
    """They would be constants of the trace."""
    x, ids = torch.randn(4, 3, 5), torch.zeros(4, 3, dtype=torch.int64)
    dropped = WeightDrop(nn.LSTM(5, 7), 0.5)
    for module, inputs in (
        (LockedDropout(0.5), (x,)),
        (WordDropout(0.5, "token"), (x, ids)),
        (WordDropout(0.5, "type"), (x, ids)),
        (dropped, (x,)),
    ):
        with pytest.raises(
            ValueError, match=r"masks are required under torch\.jit\.trace, or evaluation mode"
        ):
            torch.jit.trace(module, inputs, check_trace=False)
        torch.jit.trace(module.eval(), inputs, check_trace=False)


def test_masks_are_not_drawn_in_the_capture_of_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replay would have the same."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cuda, refusal = torch.device("cuda"), "masks are required in the capture of a CUDA graph"
    for draw in (
        lambda: LockedDropout(0.5).masks(2, 3, cuda),
        lambda: WordDropout(0.5).masks(4, 2, cuda),
        lambda: LSTM(3, 4, variational=0.5).masks(5, 2, cuda),
        lambda: LSTMCell(3, 4, variational=0.5).masks(2, cuda),
    ):
        with pytest.raises(ValueError, match=refusal):
            draw()
    LockedDropout(0.5).masks(2, 3)


def test_dropped_weights_are_restored() -> None:
    """As the page on layers says. With torch's default they stay as one draw dropped them."""
    layer = nn.LSTM(5, 7)
    whole = layer.weight_hh_l0.detach().clone()
    WeightDrop(layer, 0.5)
    nn.utils.parametrize.remove_parametrizations(layer, "weight_hh_l0", leave_parametrized=False)
    assert torch.equal(layer.weight_hh_l0, whole) and "weight_hh_l0" in dict(layer.named_parameters())


def test_words_are_the_same_whatever_the_type_of_their_ids() -> None:
    masks, ids = WordDropout(0.3).masks(4, 3), torch.randint(0, 1000, (4, 3))
    assert masks is not None and torch.equal(masks.keep(ids), masks.keep(ids.int()))


@pytest.mark.parametrize("by", ["type", "token"])
def test_a_model_with_all_of_them_compiles_whole(by: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 5)
            self.words = WordDropout(0.3, by)
            self.locked = LockedDropout(0.3)
            self.layer = WeightDrop(LSTM(5, 7, variational=0.3), 0.3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.locked(self.layer(self.words(self.embedding(ids), ids))[0])
            return y

    model, ids = Model(), torch.randint(9, (4, 3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(ids), compiled(ids))


@pytest.mark.parametrize("training", [True, False])
def test_whole_numbers_are_refused(training: bool) -> None:
    """They would lose the factor 1 / (1 - p), or round it to 1."""
    ones = torch.ones(4, 3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"x must be of a floating-point type, got torch\.int64"):
        LockedDropout(0.25).train(training)(ones)
    with pytest.raises(ValueError, match=r"x must be of a floating-point type, got torch\.int64"):
        WordDropout(0.25).train(training)(ones, ones[..., 0])


def test_word_masks_of_the_other_layout_belong_to_the_same_sequences() -> None:
    torch.manual_seed(0)
    ids, x = torch.randint(0, 9, (4, 4)), torch.randn(4, 4, 6)
    first, batch_first = WordDropout(0.5), WordDropout(0.5, batch_first=True)
    masks = first.masks(4, 4)
    turned = batch_first(x.transpose(0, 1), ids.T, masks=masks)
    assert torch.equal(turned.transpose(0, 1), first(x, ids, masks=masks))
    with pytest.raises(TypeError, match=r"masks must be WordMasks, .* got Tensor"):
        first(x, ids, masks=torch.ones(4, 4))


def test_arguments_of_other_libraries_are_refused_by_name() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 5), torch.ones(2, 5)])
    embedding, ids, x = nn.Embedding(9, 5), torch.randint(9, (4, 3)), torch.ones(4, 3, 5)
    with pytest.raises(TypeError, match=r"x must be a tensor, got PackedSequence; pad it first"):
        LockedDropout(0.3)(packed)
    with pytest.raises(TypeError, match=r"masks must be a tensor, got float; p is set by"):
        LockedDropout()(x, 0.4)
    with pytest.raises(TypeError, match=r"x must be a tensor, got Embedding"):
        WordDropout(0.1)(embedding, ids)
    with pytest.raises(TypeError, match=r"ids must be a tensor, got list"):
        WordDropout(0.1)(x, [[1]])
    with pytest.raises(
        TypeError, match=r"names must be a list of names, got 'weight_hh_l0'; write \['weight"
    ):
        WeightDrop(nn.LSTM(5, 7), 0.5, "weight_hh_l0")
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\), got \['weight_hh_l0'\]"):
        WeightDrop(nn.LSTM(5, 7), ["weight_hh_l0"], 0.5)  # type: ignore[arg-type]
