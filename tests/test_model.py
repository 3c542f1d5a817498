"""The language model: what enters it, where its masks act, how it starts."""

import pytest
import torch

from tests.conftest import settings
from vdrop_cli.dropout import Stream, WordMasks
from vdrop_cli.kernels import Masks
from vdrop_cli.model import LanguageModel


def small(*overrides: str, cell: str = "lstm") -> LanguageModel:
    config = settings(f"model={cell}_small", "model.hidden_size=6", *overrides)
    model = LanguageModel(config.model, config.dropout, 11)
    model.initialise(0.5, Stream((0,)))
    return model


def test_the_medium_model_has_the_published_number_of_parameters() -> None:
    """Embedding 6.5 M, two layers of 4·(2·650²) + 8·650, head 6.51 M: 19.8 M (Zaremba et al. 2014: «20M»)."""
    config = settings()
    model = LanguageModel(config.model, config.dropout, 10_000)
    assert sum(p.numel() for p in model.parameters()) == 10_000 * 650 + 2 * (4 * 2 * 650**2 + 8 * 650) + 10_000 * 651


def test_parameters_start_uniform_biases_too_and_as_a_function_of_the_stream() -> None:
    model, same, other = small(), small(), small()
    other.initialise(0.5, Stream((1,)))
    for name, parameter in model.named_parameters():
        assert -0.5 <= parameter.min() < -0.1 and 0.1 < parameter.max() <= 0.5
        assert torch.equal(parameter, same.get_parameter(name)) and not torch.equal(parameter, other.get_parameter(name))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_state_goes_on_where_it_was_left(cell: str) -> None:
    model = small(cell=cell)
    ids, targets = torch.randint(11, (9, 2)), torch.randint(11, (9, 2))
    whole, _ = model.nll(ids, targets, model.zero_state(2), model.no_masks())
    first, state = model.nll(ids[:4], targets[:4], model.zero_state(2), model.no_masks())
    second, _ = model.nll(ids[4:], targets[4:], state, model.no_masks())
    torch.testing.assert_close(torch.cat([first, second]), whole)


def test_the_future_is_not_seen() -> None:
    model = small()
    ids = torch.randint(11, (6, 1))
    changed = ids.clone()
    changed[4] = (ids[4] + 1) % 11
    before, after = (model(text, model.zero_state(1), model.no_masks())[0] for text in (ids, changed))
    assert torch.equal(before[:4], after[:4]) and not torch.equal(before[4], after[4])


def test_a_dropped_word_has_no_embedding_and_gets_no_gradient() -> None:
    model = small()
    ids = torch.arange(11)[:, None].expand(-1, 2)
    word = WordMasks(0.5, by_type_B=torch.tensor([5, 6]))
    masks = model.no_masks()._replace(word=word)
    loss = model.nll(ids, ids, model.zero_state(2), masks)[0].sum()
    touched = torch.autograd.grad(loss, model.embedding)[0].abs().sum(1) > 0
    kept = (word.keep(ids) > 0).any(1)
    assert torch.equal(touched, kept) and 0 < kept.sum() < 11


def test_the_output_mask_acts_before_the_head() -> None:
    model = small()
    ids = torch.randint(11, (3, 2))
    masks = model.no_masks()._replace(out=torch.zeros(1, 2, 6))
    nll, _ = model.nll(ids, ids, model.zero_state(2), masks)
    torch.testing.assert_close(nll, -model.head_bias.log_softmax(0)[ids])
    assert masks.layers == [Masks()] * 2
