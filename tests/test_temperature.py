"""The temperature of the softmax, by law."""

import pytest
import torch
from torch import Tensor

from tests.test_perplexity import trained
from vdrop_cli.generation import sample_words
from vdrop_cli.model import LanguageModel
from vdrop_cli.perplexity import stream_perplexity
from vdrop_cli.temperature import best_temperature, tempered_perplexity


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return trained("model.tie_embeddings=true", "model.embedding_size=5")[0]


@pytest.fixture(scope="module")
def text(model: LanguageModel) -> Tensor:
    """Words that the model itself has drawn."""
    words = sample_words(model, torch.tensor([0]), 4000, torch.Generator().manual_seed(1))
    return torch.tensor([0, *words])


def scale_logits(model: LanguageModel, factor: float) -> None:
    with torch.no_grad():
        for parameter in (model.head_projection, model.head_bias):
            parameter.mul_(factor)


def test_at_temperature_1_the_perplexity_is_the_plain_one(model: LanguageModel, text: Tensor) -> None:
    assert tempered_perplexity(model, text, 1.0) == pytest.approx(stream_perplexity(model, text), rel=1e-6)


def test_no_other_temperature_is_better(model: LanguageModel, text: Tensor) -> None:
    """Of its own words it is about 1."""
    best = best_temperature(model, text)
    at_best = tempered_perplexity(model, text, best)
    assert best == pytest.approx(1, abs=0.1) and at_best < stream_perplexity(model, text)
    for factor in (0.2, 0.9, 0.97, 1.03, 1.1, 5):
        assert tempered_perplexity(model, text, factor * best) > at_best


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_larger_logits_have_a_temperature_larger_by_as_much(
    factor: float, model: LanguageModel, text: Tensor
) -> None:
    """And the same perplexity at it."""
    best = best_temperature(model, text)
    expected = tempered_perplexity(model, text, best)
    scale_logits(model, factor)
    try:
        assert best_temperature(model, text) == pytest.approx(factor * best, rel=1e-3)
        assert tempered_perplexity(model, text, factor * best) == pytest.approx(expected, rel=1e-4)
    finally:
        scale_logits(model, 1 / factor)


def test_a_temperature_far_from_1_is_refused(model: LanguageModel, text: Tensor) -> None:
    """Where the next word is always the most probable one, the colder is the better; where it is none of the
    probable ones, the hotter; where all are alike, any is as good.
    """
    weights = [parameter.detach().clone() for parameter in (model.head_projection, model.head_bias)]
    with torch.no_grad():
        try:
            model.head_projection.zero_()
            for word, bias in ((6, torch.arange(7.0)), (0, torch.arange(7.0)), (0, torch.zeros(7))):
                model.head_bias.copy_(bias)
                with pytest.raises(ValueError, match=r"the best temperature is not between 0\.25 and 4\.0"):
                    best_temperature(model, torch.full((50,), word))
        finally:
            for parameter, weight in zip((model.head_projection, model.head_bias), weights, strict=True):
                parameter.copy_(weight)
