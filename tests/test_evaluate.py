"""Perplexities, by hand and by law."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.conftest import settings
from tests.tasks.test_language_model import corpus
from vdrop_cli import evaluate
from vdrop_cli.model import LanguageModel
from vdrop_cli.random_streams import Stream
from vdrop_cli.tasks import LanguageModelling


def trained(*overrides: str, words: int = 7) -> tuple[LanguageModel, LanguageModelling]:
    """Not trained, but with weights large enough for dropout to matter."""
    config = settings(
        "model=lstm_small", "model.hidden_size=12", "task.batch_size=4", "task.bptt=5", *overrides
    )
    model = LanguageModel(config.model, config.dropout.for_layers(), words)
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
        monkeypatch.setattr(evaluate, "STEPS_AT_ONCE", steps)
        assert evaluate.stream_perplexity(model, stream) == pytest.approx(expected, rel=1e-6)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity() -> None:
    model, task = trained()
    model.initialise(1e-30, Stream((0,)))
    assert evaluate.stream_perplexity(model, task.streams["test"]) == pytest.approx(7, rel=1e-6)
    assert task.train_perplexity(model) == pytest.approx(7, rel=1e-6)


def mc(
    model: LanguageModel,
    task: LanguageModelling,
    samples: int,
    together: int = 50,
    word: bool = False,
    seed: int = 1,
) -> float:
    return evaluate.mc_perplexity(model, task.streams["test"], samples, together, seed, word)[-1].ppl


def test_without_dropout_mc_is_the_standard_perplexity() -> None:
    for dropout in ("none", "variational"):
        model, task = trained(
            f"dropout={dropout}",
            *[f"dropout.{p}=0" for p in ("p_word", "p_x", "p_h", "p_out") if dropout == "variational"],
        )
        expected = evaluate.stream_perplexity(model, task.streams["test"])
        assert mc(model, task, 3) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "policy", ["zaremba", "naive", "moon", "moon_word", "variational", "variational_untied"]
)
@pytest.mark.parametrize("word", [False, True])
def test_mc_does_not_depend_on_how_passes_are_batched(policy: str, word: bool) -> None:
    model, task = trained(f"dropout={policy}")
    results = [mc(model, task, 6, together, word) for together in (1, 4, 6, 50)]
    assert results == pytest.approx([results[0]] * 4, rel=1e-5)


def test_one_pass_is_one_set_of_masks_held_for_the_whole_text() -> None:
    """The first pass by hand: the masks of a single draw, the state carried from end to end."""
    from vdrop_cli.dropout import draw

    model, task = trained("dropout=variational_untied")
    stream = task.streams["test"]
    dropout = settings(
        "model=lstm_small", "dropout=variational_untied", "dropout.p_word=0"
    ).dropout.for_layers()
    masks = draw(dropout, model.layers.mask_shape(35, 1), Stream((1, "mc", 0, 0)))
    nll, _ = model.nll(stream[:-1, None], stream[1:, None], model.zero_state(1), masks)
    assert mc(model, task, 1) == pytest.approx(nll.double().mean().exp().item(), rel=1e-6)


def test_mc_averages_probabilities_not_their_logs() -> None:
    """Two passes: the perplexity of the mean probability, which is below that of the mean log (Jensen)."""
    averages = evaluate.RunningAverages(2)
    averages.add(torch.tensor([0.1, 0.5]).log())
    averages.add(torch.tensor([0.3, 0.1]).log())
    single, pair = averages.results()
    assert pair.ppl == pytest.approx((0.2 * 0.3) ** -0.5, rel=1e-6)
    assert pair.ppl < (0.1 * 0.3 * 0.5 * 0.1) ** -0.25
    assert (pair.groups, pair.deviation) == (1, None)
    ones = [(0.1 * 0.5) ** -0.5, (0.3 * 0.1) ** -0.5]
    assert single.ppl == pytest.approx(sum(ones) / 2, rel=1e-6)
    assert single.deviation == pytest.approx(abs(ones[0] - ones[1]) / 2**0.5, rel=1e-6)


def test_an_ensemble_averages_probabilities_of_its_members() -> None:
    models = [trained("dropout=none", f"seed={seed}")[0] for seed in (1, 2)]
    stream_N = trained("dropout=none")[1].streams["test"]
    p_N = sum((-evaluate.stream_nll(model, stream_N)).double().exp() for model in models) / 2
    assert isinstance(p_N, torch.Tensor)
    both = evaluate.ensemble_perplexities(models, {"whole": stream_N, "part": stream_N[:9]})
    assert both["whole"] == pytest.approx(p_N.log().neg().mean().exp().item(), rel=1e-9)
    assert both["part"] == pytest.approx(p_N[:8].log().neg().mean().exp().item(), rel=1e-6)
    alone = evaluate.stream_perplexity(models[0], stream_N)
    for members in (models[:1], [models[0]] * 3):
        assert evaluate.ensemble_perplexities(members, {"whole": stream_N}) == {
            "whole": pytest.approx(alone, rel=1e-9)
        }


def test_perplexity_falls_with_the_number_of_passes() -> None:
    model, task = trained("dropout=variational")
    averages = evaluate.mc_perplexity(model, task.streams["test"], 20, 50, 1, False)
    assert [a.samples for a in averages] == [1, 2, 5, 10, 20]
    assert all(later.ppl < earlier.ppl for earlier, later in itertools.pairwise(averages))
    assert [a.groups for a in averages] == [20, 10, 4, 2, 1]


def test_the_ladder_ends_with_the_whole() -> None:
    assert evaluate.ladder(1) == [1]
    assert evaluate.ladder(7) == [1, 2, 5, 7]
    assert evaluate.ladder(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def test_word_dropout_is_off_in_mc_unless_asked_for_and_seeds_differ() -> None:
    model, task = trained("dropout=variational")
    assert mc(model, task, 2, word=True) != pytest.approx(mc(model, task, 2), rel=1e-4)
    assert mc(model, task, 2, seed=2) != pytest.approx(mc(model, task, 2), rel=1e-4)
    only_words, task = trained("dropout=variational", "dropout.p_x=0", "dropout.p_h=0", "dropout.p_out=0")
    assert mc(only_words, task, 2) == pytest.approx(
        evaluate.stream_perplexity(only_words, task.streams["test"]), rel=1e-6
    )
