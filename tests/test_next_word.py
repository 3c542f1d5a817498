"""How sure a language model is of the next word: by brute force, by hand and by law."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import examples, settings
from tests.test_perplexity import trained
from vdrop_cli import next_word
from vdrop_cli.dropout import ModelMasks
from vdrop_cli.mc_passes import PassOptions
from vdrop_cli.model import LanguageModel
from vdrop_cli.monte_carlo import MonteCarlo, PassMasks
from vdrop_cli.next_word import (
    Groups,
    NextWordPasses,
    Tokens,
    calibration_error,
    positions,
    ranges,
    reliability,
    standard_tokens,
)
from vdrop_cli.perplexity import stream_perplexity
from vdrop_cli.random_streams import Stream
from vdrop_cli.tasks import LanguageModelling

POLICIES = ["zaremba", "naive", "moon", "moon_word", "variational", "variational_untied"]


def passes_of(
    model: LanguageModel, task: LanguageModelling, samples: int, batch: int = 50, word: bool = False
) -> NextWordPasses:
    options = PassOptions(samples, batch, 1, word)
    return NextWordPasses(model, task.streams["test"], task.test_groups, options)


TIED = "model.tie_embeddings=true model.embedding_size=9 dropout.p_head=0.5"
PROJECTED = [f"variational {TIED}", f"variational {TIED} dropout.new_each_step=[p_head]"]


def finished(passes: NextWordPasses) -> NextWordPasses:
    for _ in passes.run():
        pass
    return passes


def projected(model: LanguageModel, y_TBH: Tensor, masks: ModelMasks) -> Tensor:
    """What enters the head, by hand."""
    if not hasattr(model, "head_projection"):
        return y_TBH
    x_TBE = y_TBH @ model.head_projection.T
    return x_TBE if masks.head is None else x_TBE * masks.head


@torch.no_grad()
def every_probability(model: LanguageModel, stream_N: Tensor, samples: int, word: bool) -> Tensor:
    """By full softmax, a pass at a time and 35 steps after 35: [S, N, V]."""
    masks, p_SNV = PassMasks(model, 1, word), []
    for number in range(samples):
        state, parts = model.zero_state(1), []
        for segment, start in enumerate(range(0, len(stream_N) - 1, 35)):
            ids_T = stream_N[start : min(start + 35, len(stream_N) - 1)]
            drawn = masks.draw(range(number, number + 1), segment, len(ids_T))
            y_TBH, state = model.read(ids_T[:, None], state, drawn)
            logits_TV = (projected(model, y_TBH, drawn) @ model.word_weights.T + model.head_bias)[:, 0]
            parts.append(logits_TV.double().softmax(-1))
        p_SNV.append(torch.cat(parts))
    return torch.stack(p_SNV)


@pytest.mark.parametrize("policy", [*POLICIES, *PROJECTED])
@pytest.mark.parametrize("word", [False, True])
def test_the_averaged_distribution_by_brute_force(policy: str, word: bool) -> None:
    """All passes stacked, in batches of other sizes, and with a few logits at a time."""
    model, task = trained(*f"dropout={policy}".split())
    stream_N = task.streams["test"]
    p_SNV = every_probability(model, stream_N, 5, word)
    p_NV = p_SNV.mean(0)
    targets_N = stream_N[1:]
    expected = Tokens(
        -p_NV[torch.arange(len(targets_N)), targets_N].log(),
        -(p_NV * p_NV.log()).sum(-1),
        -(p_SNV * p_SNV.log()).sum(-1).mean(0),
        p_NV.max(-1).values,
        (p_NV.argmax(-1) == targets_N).double(),
    )
    assert 0 < expected.is_right_N.mean() < 1
    for batch in (1, 3, 50):
        for name, values_N in finished(passes_of(model, task, 5, batch, word)).tokens._asdict().items():
            torch.testing.assert_close(values_N, getattr(expected, name), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("new_each_step", ["", "p_x"])
def test_masks_on_weights_are_those_of_each_pass(new_each_step: str) -> None:
    """Drawn again for each segment, or at its beginning alone: the same ones."""
    options = ["dropout=variational", "dropout.p_weight=0.5", f"dropout.new_each_step=[{new_each_step}]"]
    model, task = trained(*options)
    stream_N = task.streams["test"]
    p_NV = every_probability(model, stream_N, 3, word=False).mean(0)
    expected_N = -p_NV[torch.arange(len(stream_N) - 1), stream_N[1:]].log()
    tokens = finished(passes_of(model, task, 3, batch=1)).tokens
    torch.testing.assert_close(tokens.nll_N, expected_N, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["variational", PROJECTED[0]])
@pytest.mark.parametrize("steps", [30, 10_000])
def test_the_standard_approximation_by_brute_force(
    steps: int, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several segments or in one: the state is carried."""
    monkeypatch.setitem(next_word.LOGITS, "cpu", 7 * steps)
    model, task = trained(*f"dropout={policy}".split())
    stream_N = task.streams["test"]
    with torch.no_grad():
        masks = model.mean_masks()
        y_TBH, _ = model.read(stream_N[:-1, None], model.zero_state(1), masks)
        logits_NV = (projected(model, y_TBH, masks) @ model.word_weights.T + model.head_bias)[:, 0]
        p_NV = logits_NV.double().softmax(-1)
    tokens = standard_tokens(model, stream_N)
    torch.testing.assert_close(tokens.entropy_N, -(p_NV * p_NV.log()).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens.confidence_N, p_NV.max(-1).values, rtol=1e-4, atol=1e-5)
    assert tokens.is_right_N.tolist() == (p_NV.argmax(-1) == stream_N[1:]).double().tolist()
    assert tokens.measures(False)["ppl"] == pytest.approx(stream_perplexity(model, stream_N), rel=1e-6)
    measured = task.measure_calibration(model, settings("checkpoint=x", "calibration=true", command="eval"))
    assert set(measured.metrics) == {"test_entropy", "test_accuracy", "test_ece"}


@pytest.mark.parametrize("policy", [*POLICIES, *PROJECTED])
def test_perplexities_are_those_of_mc_dropout(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all passes and of every group of them, though the softmax is of few logits at a time."""
    model, task = trained(*f"dropout={policy}".split())
    reference = MonteCarlo(model, task.streams["test"], PassOptions(12, 5, 1, False))
    expected = reference.finish()
    monkeypatch.setitem(next_word.LOGITS, "cpu", 7 * 35 * 2)
    measured = finished(passes_of(model, task, 12, 5)).results()
    assert measured.metrics["test_ppl_mc12"] == pytest.approx(expected.metrics["test_ppl_mc12"], rel=1e-5)
    for row, other in zip(measured.tables["mc"], expected.tables["mc"], strict=True):
        assert row == {
            name: value if value is None else pytest.approx(value, rel=1e-4) for name, value in other.items()
        }


def test_without_dropout_there_is_no_mutual_information() -> None:
    """All passes are equal, so that the mean has the entropy of each."""
    model, task = trained(
        "dropout=variational", *(f"dropout.{p}=0" for p in ("p_word", "p_x", "p_h", "p_out"))
    )
    metrics = finished(passes_of(model, task, 4)).results().metrics
    assert metrics["test_mutual_information_mc4"] == pytest.approx(0, abs=1e-6)
    standard = standard_tokens(model, task.streams["test"]).measures(False)
    assert {name: metrics[f"test_{name}_mc4"] for name in standard} == pytest.approx(standard, rel=1e-5)
    dropped, _ = trained("dropout=variational")
    assert finished(passes_of(dropped, task, 4)).results().metrics["test_mutual_information_mc4"] > 0.01


def test_a_uniform_model_has_the_largest_entropy_and_is_calibrated() -> None:
    """log V nats; its most probable word has probability 1/V and is right in a V-th of the text."""
    model, task = trained()
    model.initialise(1e-30, Stream((0,)))
    measured = standard_tokens(model, task.streams["test"]).measures(False)
    assert measured["entropy"] == pytest.approx(math.log(7), rel=1e-6)
    assert measured["accuracy"] == pytest.approx(1 / 7, abs=0.01)
    assert measured["ece"] == pytest.approx(abs(measured["accuracy"] - 1 / 7), abs=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_laws_of_entropy(policy: str) -> None:
    """Passes have at most the entropy of their mean, which has at most log V; and that of a single pass."""
    model, task = trained(f"dropout={policy}")
    tokens = finished(passes_of(model, task, 6)).tokens
    assert bool((tokens.entropy_N <= math.log(7) + 1e-9).all())
    assert bool((tokens.pass_entropy_N <= tokens.entropy_N + 1e-5).all())
    assert bool((tokens.mutual_information_N >= 0).all())
    assert bool((tokens.mutual_information_N <= math.log(6) + 1e-5).all()), "the masks are one of six"
    assert bool((tokens.confidence_N >= 1 / 7 - 1e-9).all()) and bool((tokens.confidence_N <= 1).all())


def test_the_calibration_error_by_hand() -> None:
    """Bins of 1/15. In ]0.4, 0.4667] two tokens, mean 0.44, one right: |0.88 - 1|; in ]0.5333, 0.6] two, both
    right: |1.16 - 2|; in ]0.9333, 1] one, wrong: |1 - 0|. All over five.
    """
    confidence_N = torch.tensor([0.42, 0.46, 0.56, 0.6, 1.0], dtype=torch.float64)
    is_right_N = torch.tensor([1.0, 0, 1, 1, 0], dtype=torch.float64)
    assert calibration_error(confidence_N, is_right_N) == pytest.approx((0.12 + 0.84 + 1) / 5)
    assert reliability(confidence_N, is_right_N) == [
        {"probability": "0.40 to 0.47", "tokens": 2, "confidence": pytest.approx(0.44), "accuracy": 0.5},
        {"probability": "0.53 to 0.60", "tokens": 2, "confidence": pytest.approx(0.58), "accuracy": 1.0},
        {"probability": "0.93 to 1.00", "tokens": 1, "confidence": 1.0, "accuracy": 0.0},
    ]


@given(st.lists(st.tuples(st.floats(1e-6, 1), st.booleans()), min_size=1, max_size=40))
@examples(50)
def test_the_calibration_error_lies_between_that_of_one_bin_and_that_of_each_token(
    tokens: list[tuple[float, bool]],
) -> None:
    confidence_N = torch.tensor([confidence for confidence, _ in tokens], dtype=torch.float64)
    is_right_N = torch.tensor([float(right) for _, right in tokens], dtype=torch.float64)
    error = calibration_error(confidence_N, is_right_N)
    assert abs((confidence_N - is_right_N).mean().item()) - 1e-9 <= error
    assert error <= (confidence_N - is_right_N).abs().mean().item() + 1e-9
    rows = reliability(confidence_N, is_right_N)
    assert sum(row["tokens"] for row in rows) == len(tokens)
    gaps = sum(row["tokens"] * abs(row["confidence"] - row["accuracy"]) for row in rows)
    assert gaps / len(tokens) == pytest.approx(error, abs=1e-9)


def test_positions_start_after_each_end_of_a_line() -> None:
    """The end itself is the last word of its line; an empty line has that alone."""
    stream_N = torch.tensor([5, 5, 0, 5, 0, 0, 5, 5, 5])
    assert positions(stream_N, 0).tolist() == [1, 2, 3, 1, 2, 1, 1, 2, 3]


def test_ranges_are_named_and_empty_ones_left_out() -> None:
    named = {
        name: inside_N.nonzero()[:, 0].tolist()
        for name, inside_N in ranges(torch.tensor([1, 3, 1500, 2]), (1, 2, 10, 1000))
    }
    assert named == {"1": [0], "2 to 9": [1, 3], "1,000 or more": [2]}


def test_a_breakdown_is_of_the_words_that_are_predicted() -> None:
    """The text is a a . b a . ; its first word is not predicted, b is new and the only word below ten."""
    a, b, end = 0, 1, 2
    stream_N = torch.tensor([a, a, end, b, a, end])
    train_N = torch.tensor([a] * 10 + [end] * 12)
    groups = Groups.from_text(stream_N, train_N, end)
    assert groups.position_N is not None
    assert groups.position_N.tolist() == [2, 3, 1, 2, 3]
    assert groups.frequency_N.tolist() == [10, 12, 0, 10, 12]
    values_N = torch.tensor([1.0, 2, 3, 1, 2], dtype=torch.float64)
    tokens = Tokens(values_N.log(), values_N, values_N / 2, torch.full((5,), 0.5).double(), values_N - 1)
    tables = groups.tables(tokens, "_mc", is_averaged=True)
    assert list(tables) == ["reliability_mc", "positions_mc", "frequencies_mc"]
    first, others = tables["positions_mc"]
    assert (first["position"], first["tokens"], others["position"], others["tokens"]) == ("1", 1, "2 to 5", 4)
    assert (first["ppl"], first["entropy"], first["mutual_information"]) == pytest.approx((3, 3, 1.5))
    assert (others["ppl"], others["entropy"]) == pytest.approx((2**0.5, 1.5))
    rare, common = tables["frequencies_mc"]
    assert (rare["frequency"], rare["tokens"], common["frequency"]) == ("0 to 9", 1, "10 to 99")
    assert "mutual_information" not in groups.tables(tokens, "", is_averaged=False)["positions"][0]
    assert "positions" not in Groups.from_text(stream_N, train_N, None).tables(tokens, "", False)


def test_groups_together_are_the_whole_text() -> None:
    model, task = trained()
    measured = finished(passes_of(model, task, 3)).results()
    rows = measured.tables["frequencies_mc"]
    tokens = sum(row["tokens"] for row in rows)
    assert tokens == len(task.streams["test"]) - 1
    for measure in ("entropy", "accuracy", "mutual_information"):
        mean = sum(row["tokens"] * row[measure] for row in rows) / tokens
        assert mean == pytest.approx(measured.metrics[f"test_{measure}_mc3"])
    assert "positions_mc" not in measured.tables, "the text has no line ends"


@pytest.mark.parametrize("policy", ["variational", "naive"])
def test_passes_that_stop_resume_bit_for_bit(policy: str) -> None:
    model, task = trained(f"dropout={policy}")
    whole = finished(passes_of(model, task, 5, 2)).results()
    for segments in (1, 3, 6):
        first = passes_of(model, task, 5, 2)
        for _ in zip(range(segments), first.run(), strict=False):
            pass
        second = passes_of(model, task, 5, 2)
        second.load_state_dict(first.state_dict())
        assert second.words == first.words > 0
        assert finished(second).results() == whole and second.words == second.total


def test_a_state_of_other_passes_is_refused_and_changes_nothing() -> None:
    model, task = trained()
    passes = passes_of(model, task, 5, 2)
    next(passes.run())
    good = passes.state_dict()
    wrong: list[dict[str, Any]] = [
        {},
        {"number": -1},
        {"number": 10**9},
        {"number": True},
        {"number": 2},
        {"states": []},
        {"states": good["states"][:2]},
        {"states": [*good["states"][:2], []]},
        {"states": [[part * float("nan") for part in state] for state in good["states"]]},
        {"tokens": good["tokens"][:, 1:]},
        {"tokens": good["tokens"].float()},
        {"nll": {}},
        {"nll": good["nll"] | {1: torch.zeros(4).double()}},
        {"nll": good["nll"] | {1: None}},
    ]
    fresh = passes_of(model, task, 5, 2)
    for change in wrong:
        with pytest.raises(ValueError, match=r"^its "):
            fresh.load_state_dict(good | change if change else {})
        assert fresh.words == 0 and not fresh.tokens.nll_N.any()
    for other in (passes_of(model, task, 5, 5), passes_of(model, task, 6, 2)):
        with pytest.raises(ValueError, match=r"^its "):
            other.load_state_dict(good)
    fresh.load_state_dict(good)
    assert fresh.words == passes.words
