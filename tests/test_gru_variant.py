"""Weights of one variant of a GRU in another."""

import inspect
import io
import re
import warnings

import pytest
import torch
from torch import nn

from vdrop_cli.cells import GRUCell, LSTMCell
from vdrop_cli.layers import GRU, LSTM

PAIRS = [(GRU, nn.GRU), (GRUCell, nn.GRUCell)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_weights_of_torchs_gru_need_a_reset_after_the_product(
    ours: type[GRU | GRUCell], theirs: type[nn.Module]
) -> None:
    state = theirs(5, 7).state_dict()  # type: ignore[call-arg]
    with pytest.warns(UserWarning, match="with reset_after=True, and this one has reset_after=False"):
        ours(5, 7).load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(5, 7, reset_after=True).load_state_dict(state)


@pytest.mark.parametrize("reset_after", [False, True])
@pytest.mark.parametrize("is_saved", [False, True])
def test_a_state_dict_says_of_which_variant_it_is(reset_after: bool, is_saved: bool) -> None:
    """Inside a model, too, and after torch.save; its names and tensors are those of torch's module."""
    model = nn.Sequential(nn.Linear(5, 5), GRU(5, 7, reset_after=reset_after), LSTM(7, 7))
    state = model.state_dict()
    assert list(model[1].state_dict()) == list(nn.GRU(5, 7).state_dict())
    if is_saved:
        content = io.BytesIO()
        torch.save(state, content)
        content.seek(0)
        state = torch.load(content, weights_only=True)
    nn.Sequential(nn.Linear(5, 5), GRU(5, 7, reset_after=reset_after), LSTM(7, 7)).load_state_dict(state)
    other = nn.Sequential(nn.Linear(5, 5), GRU(5, 7, reset_after=not reset_after), LSTM(7, 7))
    with pytest.warns(
        UserWarning, match=re.escape(f"1: these weights are of a GRU with {reset_after=}, and")
    ):
        other.load_state_dict(state)


def test_weights_without_metadata_are_loaded_without_a_word() -> None:
    layer = GRU(5, 7)
    layer.load_state_dict(dict(GRU(5, 7, reset_after=True).state_dict()))
    layer.load_state_dict({"weight_ih_l0": torch.zeros(21, 5)}, strict=False)
    assert not layer.weight_ih_l0.any()


@pytest.mark.parametrize(("ours", "lstm"), [(GRU, LSTM), (GRUCell, LSTMCell)])
def test_a_gru_shows_the_arguments_of_an_lstm_and_its_own(
    ours: type[GRU | GRUCell], lstm: type[LSTM | LSTMCell]
) -> None:
    """In help(), notebooks and the page of the API; and classes that people derive show theirs."""

    class Derived(ours):  # type: ignore[misc, valid-type]
        pass

    class WithOwnArguments(ours):  # type: ignore[misc, valid-type]
        def __init__(self, size: int) -> None:
            super().__init__(size, size)

    expected = [*inspect.signature(lstm).parameters, "reset_after"]
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(Derived).parameters) == expected
    assert list(inspect.signature(WithOwnArguments).parameters) == ["size"]
