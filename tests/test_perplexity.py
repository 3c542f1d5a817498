"""Perplexity without masks, by hand and by law."""

import pytest
import torch
from torch import Tensor

from tests.conftest import settings
from tests.tasks.test_language_model import corpus
from vdrop_cli import perplexity
from vdrop_cli.model import LanguageModel
from vdrop_cli.perplexity import ensemble_perplexities, stream_nll, stream_perplexity
from vdrop_cli.random_streams import Stream
from vdrop_cli.tasks import LanguageModelling


def trained(*overrides: str, words: int = 7) -> tuple[LanguageModel, LanguageModelling]:
    """Not trained, but with weights large enough for dropout to matter."""
    config = settings(
        "model=lstm_small", "model.hidden_size=12", "task.batch_size=4", "task.bptt=5", *overrides
    )
    model = LanguageModel(config.model, config.dropout.to_policy(), words)
    model.initialise(1.0, Stream((3,)))
    return model, LanguageModelling(config.task, corpus(203, words), torch.device("cpu"))


def nll_of_each_word(model: LanguageModel, stream: Tensor) -> Tensor:
    return model.nll(stream[:-1, None], stream[1:, None], model.zero_state(1), model.mean_masks())[0][
        :, 0
    ].detach()


def test_the_whole_stream_is_predicted_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token but the first counts, however the stream is cut on the way."""
    model, task = trained()
    stream = task.streams["test"]
    expected = nll_of_each_word(model, stream).double().mean().exp().item()
    for steps in (1, 50, 101, 202, 1000):
        monkeypatch.setattr(perplexity, "STREAM_STEPS", steps)
        assert stream_perplexity(model, stream) == pytest.approx(expected, rel=1e-6)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity() -> None:
    model, task = trained()
    model.initialise(1e-30, Stream((0,)))
    assert stream_perplexity(model, task.streams["test"]) == pytest.approx(7, rel=1e-6)
    assert task.train_perplexity(model) == pytest.approx(7, rel=1e-6)


def test_an_ensemble_averages_probabilities_of_its_members() -> None:
    models = [trained("dropout=none")[0] for _ in range(2)]
    models[1].initialise(1.0, Stream((4,)))
    stream_N = trained("dropout=none")[1].streams["test"]
    p_N = sum((-stream_nll(model, stream_N)).double().exp() for model in models) / 2
    assert isinstance(p_N, torch.Tensor)
    both = ensemble_perplexities(models, {"whole": stream_N, "part": stream_N[:9]})
    assert both["whole"] == pytest.approx(p_N.log().neg().mean().exp().item(), rel=1e-9)
    assert both["part"] == pytest.approx(p_N[:8].log().neg().mean().exp().item(), rel=1e-6)
    alone, other = (stream_perplexity(model, stream_N) for model in models)
    assert both["whole"] < (alone * other) ** 0.5, "the mean of probabilities, not of their logs (Jensen)"
    for members in (models[:1], [models[0]] * 3):
        assert ensemble_perplexities(members, {"whole": stream_N}) == {
            "whole": pytest.approx(alone, rel=1e-9)
        }


def test_an_overflow_is_infinity() -> None:
    assert perplexity.ppl(1000) == float("inf") and perplexity.ppl(0) == 1
