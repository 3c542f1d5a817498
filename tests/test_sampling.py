"""MC dropout for any model: what is turned on, what is left alone, and the mean and standard deviation of
passes.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vdrop_cli import sampling
from vdrop_cli.cells import GRUCell
from vdrop_cli.layers import GRU, LSTM, Dropout
from vdrop_cli.modules import LockedDropout, WeightDrop
from vdrop_cli.sampling import mc_dropout, predict_mc


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Classifier(nn.Module):
    """Reads a text, batch first, by a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.layer(x)[0][:, -1]))
        return y


DROPPING = {
    "variational": lambda: LSTM(5, 6, batch_first=True, variational=0.5),
    "naive": lambda: GRU(5, 6, batch_first=True, dropout=Dropout("naive", p_h=0.5)),
    "torch": lambda: nn.LSTM(5, 6, 2, batch_first=True, dropout=0.5),
    "weights": lambda: WeightDrop(nn.LSTM(5, 6, batch_first=True), 0.5),
}


@pytest.mark.parametrize("kind", DROPPING)
def test_what_drops_is_turned_on_and_everything_is_as_before_afterwards(kind: str) -> None:
    model, x = Classifier(DROPPING[kind]()).eval(), torch.randn(4, 3, 5)
    model.head.train()
    flags = [module.training for module in model.modules()]
    plain, statistics = model(x), model.norm.running_mean.clone()
    with pytest.raises(RuntimeError, match="stop"), mc_dropout(model) as same:
        assert same is model and not torch.allclose(model(x), model(x)) and not model.norm.training
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(model(x), plain) and torch.equal(model.norm.running_mean, statistics)


@pytest.mark.parametrize("stacked", [False, True])
def test_transformers_drop_in_spite_of_their_fast_path(stacked: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    model: nn.Module = nn.TransformerEncoder(layer, 2) if stacked else layer
    model.eval()
    x = torch.randn(4, 3, 8)
    with torch.no_grad():
        plain = model(x)
        with mc_dropout(model):
            assert not torch.allclose(model(x), model(x))
        assert torch.equal(model(x), plain)
    assert predict_mc(model, x, 5).std.min() > 0


def test_dropout_of_attention_alone_is_found() -> None:
    attention, x = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).eval(), torch.randn(4, 6, 8)
    assert predict_mc(lambda_of(attention), x, 5).std.max() > 0


def lambda_of(attention: nn.MultiheadAttention) -> nn.Module:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x)[0]
            return y

    return Alone().eval()


@pytest.mark.parametrize(
    "model", [nn.Linear(3, 4), nn.Sequential(nn.Dropout(0.0)), LSTM(3, 4), nn.LSTM(3, 4)]
)
def test_a_model_that_drops_nothing_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="model must drop something"), mc_dropout(model):
        pass


def test_mean_and_standard_deviation_are_those_of_the_samples() -> None:
    model = nn.Sequential(LockedDropout(0.5, batch_first=True), nn.Linear(5, 2)).eval()
    x = torch.randn(4, 3, 5)
    prediction = predict_mc(model, x, 7, return_samples=True)
    assert prediction.samples is not None and prediction.samples.shape == (7, 4, 3, 2)
    torch.testing.assert_close(prediction.mean, prediction.samples.mean(0))
    torch.testing.assert_close(prediction.std, prediction.samples.std(0))
    assert predict_mc(model, x, 1).std.max() == 0 and predict_mc(model, x, 3).samples is None
    with pytest.raises(ValueError, match="samples and batch must be at least 1, got 0"):
        predict_mc(model, x, 0)


def test_the_standard_deviation_is_exact_where_the_mean_is_large() -> None:
    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.drop(x) + 1e9
            return y

    prediction = predict_mc(Far(), torch.ones(50, dtype=torch.float64), 40, return_samples=True)
    assert prediction.samples is not None
    torch.testing.assert_close(prediction.std, prediction.samples.std(0))
    torch.testing.assert_close(prediction.mean, prediction.samples.mean(0), rtol=1e-15, atol=0)


def test_passes_at_once_are_alike_in_distribution() -> None:
    """A dropped input of one: the output is 0 or 2, its mean 1 and standard deviation 1, with another mask
    for each row.
    """
    model, x = nn.Sequential(LockedDropout(0.5, batch_first=True)).eval(), torch.ones(3, 1, 200)
    for batch in (1, 7, 100):
        prediction = predict_mc(model, x, 100, batch=batch, dim=0, return_samples=True)
        assert prediction.samples is not None and prediction.samples.shape == (100, 3, 1, 200)
        assert prediction.mean.mean().item() == pytest.approx(
            1, abs=0.03
        ) and prediction.std.mean().item() == pytest.approx(1, abs=0.03)
    time_first, x = nn.Sequential(LockedDropout(0.5)).eval(), torch.ones(2, 3, 200)
    samples = predict_mc(time_first, x, 6, batch=4, dim=1, return_samples=True).samples
    assert (
        samples is not None
        and torch.equal(samples[:, 0], samples[:, 1])
        and not torch.equal(samples[0], samples[1])
    )
    with pytest.raises(TypeError, match="model must return one tensor, got tuple; forward=lambda"):
        predict_mc(LSTM(5, 7, variational=0.3), torch.ones(6, 2, 5), 1)


class LastStep(nn.Module):
    """A model of [T, B, D] with one output [B, classes] for each sequence."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer, self.head = LSTM(5, 7, variational=0.5), nn.Linear(7, classes)

    def forward(self, x_TBD: Tensor) -> Tensor:
        output: Tensor = self.head(self.layer(x_TBD)[0][-1])
        return output


def test_passes_of_a_time_first_model_with_an_output_for_each_sequence() -> None:
    torch.manual_seed(0)
    prediction = predict_mc(LastStep(3), torch.randn(4, 2, 5), 50, return_samples=True)
    assert prediction.samples is not None and prediction.samples.shape == (50, 2, 3)
    assert prediction.mean.shape == (2, 3) and (prediction.std > 0).all()
    scalar = predict_mc(nn.Sequential(LastStep(3), nn.Flatten(0), nn.Flatten(0)), torch.randn(4, 1, 5), 5)
    assert scalar.mean.shape == (3,), "the output has no dimension of the sequences"


def test_an_output_that_looks_like_passes_by_chance_is_refused() -> None:
    """Ten classes of one sequence, and ten passes in a batch: to split dimension 1 would split classes."""
    with pytest.raises(ValueError, match=r"with 1 rows in dimension 1, .* got \[1, 10\]; use batch=1"):
        predict_mc(LastStep(10), torch.randn(4, 1, 5), 10, batch=10, dim=1)


def test_passes_at_once_need_the_dimension_of_sequences_and_masks_of_their_own() -> None:
    """Time-first layers would read one long text; dropped weights are the same for a whole batch."""
    layer, x = First(LSTM(5, 7, variational=0.5)), torch.randn(4, 3, 5)
    with pytest.raises(ValueError, match="dim is required with batch > 1"):
        predict_mc(layer, x, 20, batch=10)
    alone, together = (predict_mc(layer, x, 400, batch=batch, dim=1).std.mean().item() for batch in (1, 50))
    assert together == pytest.approx(alone, rel=0.1)
    for dropped in (WeightDrop(nn.LSTM(5, 7), 0.5), LSTM(5, 7, dropout=Dropout("variational", p_weight=0.5))):
        assert predict_mc(First(dropped), x, 20).std.mean() > 0.01
        with pytest.raises(ValueError, match="batch must be 1 for a model with dropped weights"):
            predict_mc(First(dropped), x, 20, batch=10, dim=1)


class First(nn.Module):
    """The output of a layer without its state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y


def test_batch_norm_of_a_model_in_training_is_left_alone() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5))
    before = [module.training for module in model.modules()]
    predict_mc(model, torch.randn(6, 5) + 3, 5)
    assert (
        model[1].running_mean.abs().max() == 0 and [module.training for module in model.modules()] == before
    )


def test_whole_numbers_have_fractions_for_their_mean() -> None:
    class Positive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x) > 0

    prediction = predict_mc(Positive(), torch.ones(200), 50)
    assert prediction.mean.dtype is torch.float32 and prediction.mean.mean().item() == pytest.approx(
        0.5, abs=0.03
    )


class Steps(nn.Module):
    """A loop over a cell, with masks for the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = GRUCell(5, 7, variational=0.5)

    def forward(self, x: Tensor) -> Tensor:
        masks, h = self.cell.masks(x.shape[1]), None
        for x_BD in x:
            h = self.cell(x_BD, h, masks=masks)
        assert h is not None
        return h


OTHERS = [nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5), nn.Dropout1d(0.5), LockedDropout(0.5), Steps()]


@pytest.mark.parametrize("model", OTHERS, ids=lambda model: type(model).__name__)
def test_relatives_of_dropout_and_cells_are_turned_on_and_off_again(model: nn.Module) -> None:
    model, x = model.eval(), torch.randn(8, 6, 5)
    before = model(x)
    with mc_dropout(model):
        assert not torch.equal(model(x), model(x))
    assert torch.equal(model(x), before)


def test_a_second_thread_is_refused_while_dropout_is_on() -> None:
    """A mode holds for all threads: the first to end would turn off the dropout of the other."""
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5)).eval(), torch.ones(3, 5)

    def in_a_thread(model: nn.Module) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(predict_mc, model, x, 4).result().std

    with mc_dropout(model), mc_dropout(model[1]):
        for shared in (model, nn.Sequential(model[0], model[1])):
            with pytest.raises(RuntimeError, match=r"^the dropout of the Sequential is on in another thread"):
                in_a_thread(shared)
        assert model[1].training and in_a_thread(nn.Dropout(0.5)).max() > 0
    assert not any(module.training for module in model.modules())
    assert in_a_thread(model).max() > 0 and not sampling.SWITCHING


class Tagger(nn.Module):
    """A model with a second argument and more than one output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LSTM(5, 7, variational=0.4)

    def forward(self, x: Any, lengths: list[int] | None = None) -> dict[str, Any]:
        y, (h, _) = self.layer(x, lengths=lengths)
        return {"output": y, "last": h[-1]}


def test_a_model_of_several_arguments_and_outputs_is_called_by_a_function() -> None:
    model, x = Tagger().eval(), torch.randn(6, 2, 5)

    def last(x: Any) -> Tensor:
        y: Tensor = model(x, lengths=[6, 3])["last"]
        return y

    torch.manual_seed(1)
    prediction = predict_mc(model, x, 8, forward=last, return_samples=True)
    torch.manual_seed(1)
    with mc_dropout(model), torch.no_grad():
        by_hand = torch.stack([last(x) for _ in range(8)])
    assert prediction.samples is not None and torch.equal(prediction.samples, by_hand)
    together = predict_mc(model, x, 400, forward=lambda x: model(x)["last"][None], batch=50, dim=1)
    alone = predict_mc(model, x, 400, forward=lambda x: model(x)["last"][None])
    torch.testing.assert_close(together.std, alone.std, atol=0.01, rtol=0.3)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 3]))
    torch.manual_seed(1)
    same = predict_mc(model, packed, 8, forward=lambda x: model(x)["last"], return_samples=True)
    torch.testing.assert_close(same.samples, prediction.samples)


def test_what_is_no_model_or_cannot_be_repeated_is_a_type_error() -> None:
    model, x = Tagger(), torch.randn(6, 2, 5)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function; give a function"):
        predict_mc(lambda x: x, x, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x must be a tensor with batch > 1, got tuple; use batch=1"):
        predict_mc(model, (x, x), 4, batch=2, dim=1)
    with pytest.raises(TypeError, match="must return one tensor, got dict; forward=lambda"):
        predict_mc(model, x, 2)
