"""A factor on dropout probabilities, chosen on the validation text."""

from itertools import islice

import pytest
import torch

from tests.test_perplexity import trained
from vdrop_cli.mc_passes import PassOptions
from vdrop_cli.monte_carlo import mc_perplexity
from vdrop_cli.policies import Dropout
from vdrop_cli.scaled_passes import ScaledPasses

FACTORS = [0.25, 1.0, 1.5]


def passes(
    samples: int = 4, factors: list[float] = FACTORS, batch: int = 3, policy: str = "variational"
) -> ScaledPasses:
    model, task = trained(f"dropout={policy}")
    texts = (task.streams["valid"][:90], task.streams["test"][:120])
    return ScaledPasses(model, *texts, PassOptions(samples, batch, 1, False, factors))


@pytest.mark.parametrize("policy", ["variational", "moon"])
def test_the_test_text_is_read_with_the_factor_that_is_the_best_on_validation(policy: str) -> None:
    """The numbers are those of MC dropout of a model with other probabilities, in its layers, too."""
    scaled = passes(policy=policy)
    assert sum(scaled.run()) == scaled.total
    measured = scaled.results()
    model = scaled.model
    dropout = model.dropout

    def ppl(factor: float, part: str) -> float:
        layers = {name: p for name, p in vars(dropout.scaled(factor)).items() if name != "p_word"}
        model.dropout, model.layers.dropout = dropout.scaled(factor), Dropout(**layers)
        return mc_perplexity(model, scaled.texts[part], PassOptions(4, 3, 1, False))[-1]["ppl"]

    by_factor = {factor: ppl(factor, "valid") for factor in FACTORS}
    best = min(FACTORS, key=by_factor.__getitem__)
    expected = ppl(best, "test")
    assert measured.metrics == pytest.approx(
        {"dropout_factor": best, "valid_ppl_mc4_scaled": by_factor[best], "test_ppl_mc4_scaled": expected}
    )
    rows = [(row["factor"], row["valid_ppl"]) for row in measured.tables["factors"]]
    assert rows == [(factor, pytest.approx(value)) for factor, value in by_factor.items()]
    assert len(set(by_factor.values())) == 3 and measured.tables["mc"][-1]["ppl"] == pytest.approx(expected)


@pytest.mark.parametrize("stop", [1, 3, 8, 14, 20])
def test_passes_that_stop_resume_to_the_same_numbers(stop: int) -> None:
    whole = passes()
    steps = list(whole.run())
    first = passes()
    list(islice(first.run(), stop))
    assert stop < len(steps) and first.words == sum(steps[:stop])
    again = passes()
    again.load_state_dict(first.state_dict())
    assert sum(steps[:stop]) + sum(again.run()) == whole.total
    assert again.results().metrics == whole.results().metrics


def test_a_state_of_other_passes_is_refused_and_changes_nothing() -> None:
    first = passes()
    list(islice(first.run(), 8))
    state = first.state_dict()
    for wrong in (
        state | {"factors": [0.5]},
        state | {"valid_ppls": [1.0] * 4},
        state | {"valid_ppls": [torch.tensor(1.0)]},
        state | {"valid_ppls": None},
        state | {"passes": {}},
        {},
    ):
        other = passes()
        with pytest.raises(ValueError, match="its "):
            other.load_state_dict(wrong)
        assert other.words == 0 and other.valid_ppls == []


def test_every_probability_is_multiplied() -> None:
    dropout = Dropout(
        "variational",
        p_word=0.1,
        p_x=0.2,
        p_between=0.4,
        p_h=[0.1, 0.3],
        p_out=0.5,
        p_head=0.6,
        p_weight=0.7,
        new_each_step=["p_x"],
    )
    scaled = dropout.scaled(0.5)
    assert (scaled.p_word, scaled.p_x, scaled.p_between, scaled.p_out) == (0.05, 0.1, 0.2, 0.25)
    assert (scaled.p_head, scaled.p_weight) == (0.3, 0.35)
    assert Dropout("moon", p_c=0.4).scaled(2).p_c == 0.8
    assert scaled.p_h == (0.05, 0.15) and scaled.new_each_step == ("p_x",) and scaled.tie is dropout.tie
    assert Dropout("naive", p_h=0.4).scaled(2).p_h == 0.8
    one = Dropout("variational", p_x=0.2, p_h=0.4, one_state_mask=True).scaled(0.5)
    assert one.one_state_mask and (one.p_x, one.p_h) == (0.1, 0.2)
    with pytest.raises(ValueError, match=r"p_out must be in \[0, 1\), got 1\.0"):
        dropout.scaled(2)


def test_a_factor_too_large_for_words_is_used_where_passes_leave_words_out() -> None:
    model, task = trained("dropout=variational", "dropout.p_word=0.6", "dropout.p_h=0.2")
    texts = (task.streams["valid"][:30], task.streams["test"][:30])
    (scaled,) = ScaledPasses(model, *texts, PassOptions(2, 2, 1, False, [2.0])).dropouts
    assert (scaled.p_word, scaled.p_h) == (0, 0.4)
    with pytest.raises(ValueError, match="p_word must be in"):
        ScaledPasses(model, *texts, PassOptions(2, 2, 1, True, [2.0]))
