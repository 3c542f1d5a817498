"""MC dropout, by hand and by law."""

import copy
import itertools
import math

import pytest
import torch

from tests.conftest import settings
from tests.test_perplexity import trained
from vdrop_cli.dropout import draw
from vdrop_cli.mc_passes import PassOptions
from vdrop_cli.model import LanguageModel
from vdrop_cli.monte_carlo import MonteCarlo, PassMasks, RunningAverages, mc_perplexity
from vdrop_cli.perplexity import stream_perplexity
from vdrop_cli.random_streams import Stream
from vdrop_cli.tasks import LanguageModelling

NO_OTHER = [f"dropout.{name}=0" for name in ("p_word", "p_x", "p_h", "p_out")]


def mc(
    model: LanguageModel,
    task: LanguageModelling,
    samples: int,
    batch: int = 50,
    word: bool = False,
    seed: int = 1,
) -> float:
    options = PassOptions(samples, batch, seed, word)
    return float(mc_perplexity(model, task.streams["test"], options)[-1]["ppl"])


def test_without_dropout_mc_is_the_standard_perplexity() -> None:
    for dropout in ("none", "variational"):
        model, task = trained(
            f"dropout={dropout}",
            *[f"dropout.{p}=0" for p in ("p_word", "p_x", "p_h", "p_out") if dropout == "variational"],
        )
        expected = stream_perplexity(model, task.streams["test"])
        assert mc(model, task, 3) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "policy",
    [
        *("zaremba", "naive", "moon", "moon_word", "variational", "variational_untied"),
        "variational dropout.new_each_step=[p_x,p_out]",
    ],
)
@pytest.mark.parametrize("word", [False, True])
def test_mc_does_not_depend_on_how_passes_are_batched(policy: str, word: bool) -> None:
    model, task = trained(*f"dropout={policy}".split())
    results = [mc(model, task, 6, batch, word) for batch in (1, 4, 6, 50)]
    assert results == pytest.approx([results[0]] * 4, rel=1e-5)


def test_one_pass_is_one_set_of_masks_held_for_the_whole_text() -> None:
    """The first pass by hand: the masks of a single draw, the state carried from end to end."""
    model, task = trained("dropout=variational_untied")
    stream = task.streams["test"]
    dropout = settings(
        "model=lstm_small", "dropout=variational_untied", "dropout.p_word=0"
    ).dropout.to_policy()
    masks = draw(dropout, model.layers.mask_shape(35, 1), Stream((1, "mc", 0, 0)))
    nll, _ = model.nll(stream[:-1, None], stream[1:, None], model.zero_state(1), masks)
    assert mc(model, task, 1) == pytest.approx(nll.double().mean().exp().item(), rel=1e-6)


@pytest.mark.parametrize("place", ["p_x", "p_between", "p_h", "p_out", "p_head"])
def test_held_masks_stay_for_the_whole_text_where_others_are_new_at_every_step(place: str) -> None:
    """In the last segment, too, which is shorter; whichever place is new."""
    options = [f"dropout.{name}=0.5" for name in ("p_x", "p_h", "p_out", "p_head")]
    tied = ["model.tie_embeddings=true", "model.embedding_size=9"]
    model, _ = trained("dropout=variational", *tied, *options, f"dropout.new_each_step=[{place}]")
    masks = PassMasks(model, 1, word_dropout=True)
    first = masks.draw(range(2), 0, 35)
    for number, time in ((1, 35), (2, 9)):
        later = masks.draw(range(2), number, time)
        by_place = {
            "p_x": (first.layers[0].x, later.layers[0].x),
            "p_between": (first.layers[1].x, later.layers[1].x),
            "p_h": (first.layers[1].h, later.layers[1].h),
            "p_out": (first.out, later.out),
            "p_head": (first.head, later.head),
        }
        for name, (before, after) in by_place.items():
            assert before is not None and after is not None
            if name == place:
                assert len(after) == time and not torch.equal(before[:time], after), number
            else:
                assert len(after) == 1 and torch.equal(before, after), (number, name)
        words = [one.word.by_type_B for one in (first, later) if one.word is not None]
        assert words[0] is not None and words[1] is not None and torch.equal(words[0], words[1])


@pytest.mark.parametrize("policy", ["naive", "variational", "moon"])
@pytest.mark.parametrize("word_mask", ["type", "token"])
def test_word_masks_by_type_are_held_and_those_by_token_change_no_other_mask(
    policy: str, word_mask: str
) -> None:
    """Whether the other masks are held or new at every step."""
    options = ["dropout.p_word=0.5", f"dropout.word_mask={word_mask}"]
    model, _ = trained(f"dropout={policy}", *options)
    masks = PassMasks(model, 1, word_dropout=True)
    first, later = masks.draw(range(2), 0, 35), masks.draw(range(2), 1, 35)
    assert first.word is not None and later.word is not None
    if word_mask == "type":
        assert first.word.by_type_B is not None and later.word.by_type_B is not None
        assert torch.equal(first.word.by_type_B, later.word.by_type_B)
    else:
        assert first.word.by_token_TB is not None and later.word.by_token_TB is not None
        assert not torch.equal(first.word.by_token_TB, later.word.by_token_TB)
    pairs = [
        (before, after)
        for one, other in zip(first.layers, later.layers, strict=True)
        for before, after in zip(one, other, strict=True)
        if before is not None
    ]
    assert pairs
    for before, after in pairs:
        assert torch.equal(before, after) == (len(before) == 1) == (policy in ("variational", "moon"))


def test_one_mask_on_a_state_is_held_for_the_whole_text_where_inputs_have_new_ones() -> None:
    """On the recurrence, on the next layer's input and on the output, and for each pass another."""
    options = ["dropout.p_out=0", "dropout.p_h=0.5", "dropout.one_state_mask=true", "dropout.p_x=0.5"]
    model, _ = trained("dropout=variational", *options, "dropout.new_each_step=[p_x]")
    masks = PassMasks(model, 1, word_dropout=True)
    first = masks.draw(range(2), 0, 35)
    for segment in (first, masks.draw(range(2), 1, 35), masks.draw(range(2), 2, 9)):
        below, above = segment.layers
        assert below.h is not None and above.h is not None
        assert above.x is not None and torch.equal(above.x, below.h)
        assert segment.out is not None and torch.equal(segment.out, above.h[:, 0])
        assert first.layers[0].h is not None and torch.equal(below.h, first.layers[0].h)
        assert not torch.equal(below.h[:, :, 0], below.h[:, :, 1])


def test_a_pass_has_one_mask_on_weights_for_the_whole_text_and_no_other_pass_shares_it() -> None:
    """By hand: the model with the recurrent weights of a pass masked. Passes cannot share a batch."""
    model, task = trained("dropout=variational", "dropout.p_weight=0.5", "dropout.new_each_step=[p_x]")
    stream_N, passes = task.streams["test"], PassMasks(model, 1, word_dropout=False)
    first = passes.draw(range(1), 0, 35).weights
    later, other = passes.draw(range(1), 1, 9).weights, passes.draw(range(1, 2), 0, 35).weights
    assert first is not None and later is not None and other is not None
    for one, same, another in zip(first, later, other, strict=True):
        assert one is not None and same is not None and another is not None
        assert torch.equal(one, same) and not torch.equal(one, another)
    with pytest.raises(ValueError, match="masks on weights cannot be joined"):
        mc(model, task, 2, batch=2)
    model, task = trained("dropout=variational", "dropout.p_weight=0.5", *NO_OTHER)
    expected = []
    for number in range(2):
        weights = PassMasks(model, 1, word_dropout=False).draw(range(number, number + 1), 0, 35).weights
        masked = copy.deepcopy(model)
        assert weights is not None
        with torch.no_grad():
            for layer, mask in enumerate(weights):
                masked.layers.get_parameter(f"weight_hh_l{layer}").mul_(mask)
            nll, _ = masked.nll(
                stream_N[:-1, None], stream_N[1:, None], model.zero_state(1), model.mean_masks()
            )
        expected.append(-nll[:, 0].double())
    by_hand = (math.log(2) - torch.logaddexp(*expected)).mean().exp().item()
    assert mc(model, task, 2, batch=1) == pytest.approx(by_hand, rel=1e-6)


def test_mc_averages_probabilities_not_their_logs() -> None:
    """Two passes: the perplexity of the mean probability, which is below that of the mean log (Jensen)."""
    averages = RunningAverages(2)
    averages.add(torch.tensor([0.1, 0.5]).log())
    averages.add(torch.tensor([0.3, 0.1]).log())
    single, pair = averages.rows()
    assert averages.ppl == pair["ppl"] == pytest.approx((0.2 * 0.3) ** -0.5, rel=1e-6)
    assert pair["ppl"] < (0.1 * 0.3 * 0.5 * 0.1) ** -0.25
    assert (pair["groups"], pair["deviation"]) == (1, None)
    ones = [(0.1 * 0.5) ** -0.5, (0.3 * 0.1) ** -0.5]
    assert single["ppl"] == pytest.approx(sum(ones) / 2, rel=1e-6)
    assert single["deviation"] == pytest.approx(abs(ones[0] - ones[1]) / 2**0.5, rel=1e-6)


def test_words_are_counted_to_the_total_and_a_second_call_of_run_reads_nothing() -> None:
    model, task = trained("dropout=variational")
    passes = MonteCarlo(model, task.streams["test"], PassOptions(5, 2, 1, False))
    counts = []
    for more in passes.run():
        counts.append(more)
        assert passes.words == sum(counts)
    assert passes.words == passes.total == 5 * (len(task.streams["test"]) - 1)
    before = passes.results()
    assert not list(passes.run()) and passes.results() == before


def test_perplexity_falls_with_the_number_of_passes() -> None:
    model, task = trained("dropout=variational")
    rows = mc_perplexity(model, task.streams["test"], PassOptions(20, 50, 1, False))
    assert [row["samples"] for row in rows] == [1, 2, 5, 10, 20]
    assert all(later["ppl"] < earlier["ppl"] for earlier, later in itertools.pairwise(rows))
    assert [row["groups"] for row in rows] == [20, 10, 4, 2, 1]


def test_word_dropout_is_off_in_mc_unless_asked_for_and_seeds_differ() -> None:
    model, task = trained("dropout=variational")
    assert mc(model, task, 2, word=True) != pytest.approx(mc(model, task, 2), rel=1e-4)
    assert mc(model, task, 2, seed=2) != pytest.approx(mc(model, task, 2), rel=1e-4)
    only_words, task = trained("dropout=variational", "dropout.p_x=0", "dropout.p_h=0", "dropout.p_out=0")
    assert mc(only_words, task, 2) == pytest.approx(
        stream_perplexity(only_words, task.streams["test"]), rel=1e-6
    )
