"""Columns, chunks and the loss, by hand on small streams."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, settings
from vdrop_cli import tasks
from vdrop_cli.corpora import Corpus
from vdrop_cli.errors import ConfigError
from vdrop_cli.generation import sample_words
from vdrop_cli.mc_passes import PassOptions
from vdrop_cli.model import LanguageModel
from vdrop_cli.monte_carlo import MonteCarlo
from vdrop_cli.next_word import NextWordPasses
from vdrop_cli.optimizer import Optimizer
from vdrop_cli.perplexity import batched_loss, ppl, stream_perplexity
from vdrop_cli.random_streams import Stream
from vdrop_cli.scaled_passes import ScaledPasses
from vdrop_cli.tasks.language_model import LanguageModelling, chunks, columns, random_bounds
from vdrop_cli.temperature import tempered_perplexity

ORDER = Stream((1, "order", 1))


def corpus(length: int, words: int = 7) -> Corpus:
    stream = torch.arange(length) % words
    return Corpus([str(w) for w in range(words)], stream, stream.clone(), stream.clone(), "here", "f")


def test_columns_start_at_i_n_over_b_rounded() -> None:
    """14 tokens in 4 columns: length 3, starts 0, 3.5 → 4, 7, 10.5 → 11."""
    assert columns(torch.arange(14), 4).T.tolist() == [[0, 1, 2], [4, 5, 6], [7, 8, 9], [11, 12, 13]]


def test_the_published_batches_of_penn_treebank() -> None:
    """929,589 tokens in 20 columns of 46,479; 1,327 chunks of 35 an epoch, as the authors' log counts."""
    cut = columns(torch.arange(929_589), 20)
    assert cut.shape == (46_479, 20)
    assert cut[0].tolist()[:3] == [0, 46_479, 92_959] and cut[0, 10] == 464_795
    assert len(list(chunks(cut, 35))) == 1_327


def test_chunks_follow_each_other_and_the_target_is_the_next_word() -> None:
    """Nine words a column: two chunks of four steps with a successor for each word."""
    every_chunk = list(chunks(torch.arange(9)[:, None], 4))
    assert [(c.number, c.ids_TB[:, 0].tolist(), c.targets_TB[:, 0].tolist()) for c in every_chunk] == [
        (0, [0, 1, 2, 3], [1, 2, 3, 4]),
        (1, [4, 5, 6, 7], [5, 6, 7, 8]),
    ]


def test_the_loss_is_summed_over_time_and_averaged_over_the_batch() -> None:
    """With all weights zero every word costs ln 7: the loss of five steps is 5 ln 7 whatever the batch."""
    config = settings("model=lstm_small", "model.hidden_size=3", "task.batch_size=4", "task.bptt=5")
    task = LanguageModelling(config.task, corpus(100), torch.device("cpu"))
    model = LanguageModel(config.model, config.dropout.to_policy(), 7)
    model.initialise(1e-30, Stream((0,)))
    loss = task.loss(model, next(task.batches(ORDER)), model.zero_state(4), model.mean_masks()).reported
    assert loss.item() == pytest.approx(5 * torch.tensor(7.0).log().item(), rel=1e-6)


def test_one_training_step_by_hand() -> None:
    """All weights zero but the head's bias: its gradient is the sum over steps of mean(softmax - one-hot)."""
    config = settings(
        "model=lstm_small",
        "dropout=none",
        "model.hidden_size=3",
        "task.batch_size=2",
        "task.bptt=4",
        "schedule.lr=0.5",
    )
    task = LanguageModelling(config.task, corpus(40), torch.device("cpu"))
    model = LanguageModel(config.model, config.dropout.to_policy(), 7)
    model.initialise(1e-30, Stream((0,)))
    with torch.no_grad():
        model.head_bias.copy_(torch.arange(7) / 10)
    chunk = next(task.batches(ORDER))
    before = model.head_bias.detach().clone()
    loss = task.loss(model, chunk, model.zero_state(2), model.mean_masks()).descended
    Optimizer(model, config.schedule).step(loss, lr=config.schedule.lr)
    counts = torch.zeros(7).index_add_(0, chunk.targets_TB.flatten(), torch.ones(8))
    expected = before - 0.5 * (4 * before.softmax(0) - counts / 2)
    torch.testing.assert_close(model.head_bias.detach(), expected)


def task_and_model(*overrides: str, length: int = 700) -> tuple[LanguageModelling, LanguageModel]:
    config = settings("model=lstm_small", "model.hidden_size=6", "task.batch_size=3", *overrides)
    task = LanguageModelling(config.task, corpus(length), torch.device("cpu"))
    model = LanguageModel(config.model, config.dropout.to_policy(), 7)
    model.initialise(1.0, Stream((0,)))
    return task, model


def test_random_chunks_are_the_whole_text_in_as_many_chunks_others_in_each_epoch() -> None:
    task, model = task_and_model("task.bptt=12", "task.random_length=true")
    epochs = [list(task.batches(Stream((1, "order", epoch)))) for epoch in (1, 2, 1)]
    lengths = [[len(chunk.ids_TB) for chunk in epoch] for epoch in epochs]
    assert lengths[0] == lengths[2] != lengths[1]
    text = task.train_columns
    for epoch in epochs:
        assert len(epoch) == task.batches_an_epoch == (len(text) - 1) // 12
        assert torch.equal(torch.cat([chunk.ids_TB for chunk in epoch]), text[:-1])
        assert torch.equal(torch.cat([chunk.targets_TB for chunk in epoch]), text[1:])
        assert [chunk.number for chunk in epoch] == list(range(len(epoch)))
    first = epochs[0][0]
    masks = task.masks(model, first, Stream((2,)))
    loss = task.loss(model, first, task.zero_state(model), masks).reported.item()
    nll_TB, _ = model.nll(first.ids_TB, first.targets_TB, task.zero_state(model), masks)
    assert task.reported_loss(loss, task.words(first)) == pytest.approx(nll_TB.mean().item(), rel=1e-6)


def test_lengths_of_random_chunks_are_about_those_of_merity_et_al() -> None:
    """35 with a standard deviation of 5; in one of twenty 17.5; none shorter than 5 but for rounding."""
    bounds = torch.tensor(random_bounds(35 * 40_000, 35, Stream((1,))))
    lengths = 0.975 * (bounds[1:] - bounds[:-1])  # before they were scaled to a mean of 35
    middle, above = lengths.quantile(torch.tensor([0.475, 0.475 + 0.95 * 0.3413]) + 0.05).tolist()
    assert lengths.min() > 4 and 0.045 < (lengths < 24).float().mean() < 0.065
    assert middle == pytest.approx(35, abs=1) and above - middle == pytest.approx(5, abs=1)


@pytest.mark.parametrize("bptt", [10, 11, 35])
def test_no_random_chunk_is_empty(bptt: int) -> None:
    for steps in (bptt, 2 * bptt - 1, 50 * bptt):
        bounds = random_bounds(steps, bptt, Stream((bptt, steps)))
        assert bounds[0] == 0 and bounds[-1] == steps and len(bounds) == steps // bptt + 1
        assert all(a < b for a, b in pairwise(bounds))


def test_states_are_reset_with_their_probability_each_column_by_itself() -> None:
    task, model = task_and_model("task.bptt=5", "task.reset=0.25", length=9000)
    keep = torch.stack([chunk.keep_B for chunk in task.batches(ORDER) if chunk.keep_B is not None])
    assert len(keep) == task.batches_an_epoch and set(keep.unique().tolist()) == {0, 1}
    assert keep.mean() == pytest.approx(0.75, abs=0.04) and not torch.equal(keep[:, 0], keep[:, 1])
    chunk = next(iter(task.batches(ORDER)))._replace(keep_B=torch.tensor([1.0, 0, 1]))
    state = tuple(torch.randn(2, 3, 6) for _ in range(2))
    expected = tuple(part.clone() for part in state)
    for part in expected:
        part[:, 1] = 0
    masks = model.mean_masks()
    whole = task.loss(model, chunk._replace(keep_B=None), expected, masks)
    reset = task.loss(model, chunk, state, masks)
    assert reset.reported == whole.reported and torch.equal(reset.state[0], whole.state[0])
    assert all(chunk.keep_B is None for chunk in task_and_model("task.bptt=5")[0].batches(ORDER))


@pytest.mark.parametrize(("ar", "tar"), [(2.0, 0.0), (0.0, 3.0), (0.5, 1.5)])
def test_penalties_on_the_output_are_descended_and_not_reported(ar: float, tar: float) -> None:
    """Merity et al. 2017: α·mean (m·h)² and β·mean (h' - h)², on the scale of the loss of a step."""
    task, model = task_and_model("task.bptt=5", f"task.ar={ar}", f"task.tar={tar}")
    chunk, state = next(task.batches(ORDER)), task.zero_state(model)
    masks = task.masks(model, chunk, Stream((2,)))
    descended, reported, after = task.loss(model, chunk, state, masks)
    plain, *_ = task_and_model("task.bptt=5")
    without = plain.loss(model, chunk, state, masks)
    torch.testing.assert_close(reported, without.reported)
    torch.testing.assert_close(after[0], without.state[0])
    raw_TBH, _ = model(chunk.ids_TB, state, replace(masks, out=None))
    masked_TBH, _ = model(chunk.ids_TB, state, masks)
    penalty = ar * masked_TBH.square().mean() + tar * (raw_TBH[1:] - raw_TBH[:-1]).square().mean()
    torch.testing.assert_close(descended, reported + 5 * penalty)
    single = chunk._replace(ids_TB=chunk.ids_TB[:1], targets_TB=chunk.targets_TB[:1])
    assert task.loss(model, single, state, masks).descended.isfinite()


@pytest.mark.parametrize("penalty", [[], ["task.ar=2"]])
def test_the_augmented_loss_is_descended_and_not_reported(penalty: list[str]) -> None:
    """On the scale of the loss, summed over steps and averaged over the batch, beside other penalties."""
    options = ["task.bptt=5", *penalty]
    plain, model = task_and_model(*options)
    task, _ = task_and_model(*options, "task.augmented_loss=13", "task.augmented_temperature=20")
    chunk, state = next(task.batches(ORDER)), task.zero_state(model)
    masks = task.masks(model, chunk, Stream((2,)))
    without, augmented = (one.loss(model, chunk, state, masks) for one in (plain, task))
    torch.testing.assert_close(augmented.reported, without.reported)
    torch.testing.assert_close(augmented.state[0], without.state[0])
    x_TBE, _ = model(chunk.ids_TB, state, masks)
    with_augmented, nll = model.augmented_nll(x_TBE, chunk.targets_TB, 13.0, 20.0)
    expected = (with_augmented - nll) / task.batch_size
    torch.testing.assert_close(augmented.descended - without.descended, expected)


def test_unknown_words_that_training_does_not_have_are_warned_of() -> None:
    """Where <unk> is among the words of training it is trained, and no warning is due."""
    config = settings("task.batch_size=4", "task.bptt=5")
    (train_N, valid_N) = (torch.arange(100) % 3, torch.arange(100) % 4)

    def warnings(train_N: torch.Tensor, valid_N: torch.Tensor) -> list[str]:
        words = ["a", "b", "<eos>", "<unk>"]
        corpus = Corpus(words, train_N, valid_N, train_N[:-1], "here", "f")
        task = LanguageModelling(config.task, corpus, torch.device("cpu"))
        return task.warnings_of_unknown_words

    (warning,) = warnings(train_N, valid_N)
    assert warning.startswith(
        "25 % of the valid part and 0 % of the test part of here are words that the training part does not "
        "have"
    )
    assert "data.min_count" in warning
    assert warnings(train_N, train_N + 0) == warnings(valid_N, valid_N + 0) == []


def test_parts_with_the_same_text_are_warned_of() -> None:
    config = settings("task.batch_size=4", "task.bptt=5")
    one_N, other_N = torch.arange(100) % 3, torch.arange(100) % 2

    def warnings(*parts: torch.Tensor) -> list[str]:
        corpus = Corpus(["a", "b", "<eos>"], *parts, "here", "f")
        return LanguageModelling(config.task, corpus, torch.device("cpu")).warnings

    assert warnings(one_N, other_N, one_N[:50]) == []
    (warning,) = warnings(one_N, other_N, one_N)
    assert warning.startswith("the train part and the test part of here are the same text")
    (warning,) = warnings(one_N, one_N, other_N)
    assert warning.startswith("the train part and the valid part of here are the same text")
    assert len(warnings(one_N, one_N, one_N)) == 3


@pytest.mark.parametrize(("batch", "bptt"), [(20, 5), (4, 25), (200, 1)])
def test_a_text_shorter_than_one_chunk_of_the_batch_is_an_error(batch: int, bptt: int) -> None:
    config = settings(f"task.batch_size={batch}", f"task.bptt={bptt}")
    with pytest.raises(
        ConfigError,
        match=rf"task\.batch_size={batch} × task\.bptt={bptt} does not fit the train part of here, 100 "
        r"tokens",
    ):
        LanguageModelling(config.task, corpus(100), torch.device("cpu"))


def test_both_validation_perplexities_by_hand() -> None:
    """203 tokens in 4 columns of 50: 9 chunks of 5, by the authors' count (50 - 1) / 5 = 9.8."""
    config = settings("model=lstm_small", "model.hidden_size=12", "task.batch_size=4", "task.bptt=5")
    model = LanguageModel(config.model, config.dropout.to_policy(), 7)
    task = LanguageModelling(config.task, corpus(203, 7), torch.device("cpu"), as_published=True)
    model.initialise(1.0, Stream((3,)))
    total = 0.0
    state = model.zero_state(4)
    for start in range(0, 45, 5):
        here = task.valid_columns[start : start + 5], task.valid_columns[start + 1 : start + 6]
        nll, state = model.nll(*here, state, model.mean_masks())
        total += nll.double().mean().item()
    metrics = task.validate(model)
    assert metrics["valid_ppl_batched"] == pytest.approx(math.exp(total / 9))
    assert metrics["valid_ppl_as_published"] == pytest.approx(math.exp(total / 9.8))


def test_every_number_is_of_the_part_that_it_names() -> None:
    """The model draws each part with a temperature of its own. Temperature and factor are chosen on the
    validation part, never on the test part.
    """
    config = settings("model=lstm_small", "model.hidden_size=6", "task.batch_size=3", "task.bptt=5")
    model = LanguageModel(config.model, config.dropout.to_policy(), 7)
    model.initialise(1.0, Stream((0,)))
    draws, start_N = torch.Generator().manual_seed(1), torch.tensor([0])
    train_N, valid_N, test_N = (
        torch.tensor([*sample_words(model, start_N, words, draws, temperature)])
        for words, temperature in ((500, 1.0), (1_000, 0.5), (300, 2.0))
    )
    vocabulary = [str(word) for word in range(7)]
    task = LanguageModelling(
        config.task, Corpus(vocabulary, train_N, valid_N, test_N, "here", "f"), torch.device("cpu")
    )
    parts = {"valid": valid_N, "test": test_N}
    metrics = task.result(model, 1, 1.0)
    expected = {f"{name}_ppl": stream_perplexity(model, part_N) for name, part_N in parts.items()}
    assert expected == {name: metrics[name] for name in expected} and len({*expected.values()}) == 2
    assert task.ensemble([model]).metrics == pytest.approx(expected, rel=1e-9)
    for name, part_N in (("train_ppl", train_N), ("valid_ppl_batched", valid_N)):
        total, number = batched_loss(model, chunks(columns(part_N, 3), 5), 3)
        assert metrics[name] == ppl(total / number)
    tempered = task.tempered(model).metrics
    assert tempered["temperature"] == pytest.approx(0.5, rel=0.2)
    for name, part_N in parts.items():
        at_best = tempered_perplexity(model, part_N, tempered["temperature"])
        assert tempered[f"{name}_ppl_tempered"] == at_best
    options = PassOptions(2, 2, 1, word_dropout=False)
    scaled = task.passes([model], replace(options, factors=[0.5, 1]))
    assert isinstance(scaled, ScaledPasses)
    assert torch.equal(scaled.texts["valid"], valid_N) and torch.equal(scaled.texts["test"], test_N)
    for passes in (task.passes([model], options), task.passes([model], replace(options, calibration=True))):
        assert isinstance(passes, MonteCarlo | NextWordPasses) and torch.equal(passes.stream_N, test_N)
    assert task.test_groups.frequency_N is not None
    assert torch.equal(task.test_groups.frequency_N, train_N.bincount(minlength=7)[test_N[1:]])


def test_the_fraction_of_penn_treebank_is_the_published_one(real_data: object) -> None:
    """3,688 words a column: 105 chunks, divided by 105.34."""
    from vdrop_cli import corpora

    config = settings("data.cache=null")
    task = LanguageModelling(config.task, corpora.load_text(config.data), torch.device("cpu"))
    assert len(task.valid_columns) == 3_688 and sum(1 for _ in task.valid_chunks()) == 105
    assert len(task.streams["test"]) - 1 == 82_429


def test_the_validation_that_compares_with_the_paper_is_of_penn_treebank_alone(real_data: Path) -> None:
    """And of the columns and chunks that it was published for."""
    ptb = ["data=ptb", f"data.dir={real_data}/ptb"]
    for overrides, as_published in (
        (["data=pydoc", "task.batch_size=20", "task.bptt=20"], False),
        ([*ptb, "task.batch_size=20", "task.bptt=20"], True),
        ([*ptb, "task.batch_size=20", "task.bptt=35"], True),
        ([*ptb, "task.batch_size=32", "task.bptt=35"], False),
        ([*ptb, "task.batch_size=20", "task.bptt=70"], False),
    ):
        task = tasks.load(settings(*TINY, *overrides), torch.device("cpu"))
        assert isinstance(task, LanguageModelling) and task.as_published is as_published


def test_an_epoch_shows_first_what_selects_it_and_names_training_with_dropout() -> None:
    config = settings(*TINY, "data=pydoc")
    task = LanguageModelling(config.task, corpus(203, 7), torch.device("cpu"))
    model = task.model(config.model, config.dropout.to_policy(), "fused", None)
    model.initialise(0.1, Stream((3,)))
    measured = task.validate(model)
    assert list(measured) == ["valid_ppl_batched"]
    metrics = task.epoch_metrics(1.0, measured)
    assert list(metrics) == [task.selection_metric, "train_ppl_dropout"] and metrics[
        "train_ppl_dropout"
    ] == pytest.approx(math.e)
    result = set(task.result(model, 1, 1.0))
    assert {"train_ppl", "test_ppl", "valid_ppl"} <= result and "train_ppl_dropout" not in result


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["picture=a.png"], "picture of a language model needs mc_samples=…, calibration=true or both"),
        (["members=[b]", "mc_samples=2"], "members must be empty with mc_samples, a is a language model"),
    ],
)
def test_what_a_language_model_does_not_give_is_refused(overrides: list[str], message: str) -> None:
    task, _ = task_and_model()
    with pytest.raises(ConfigError, match=f"^{message}"):
        task.require_evaluable(settings("checkpoint=a", *overrides, command="eval"), Path("a"))
    for good in (["picture=a.png", "mc_samples=2"], ["picture=a.png", "calibration=true"], ["members=[b]"]):
        task.require_evaluable(settings("checkpoint=a", *good, command="eval"), Path("a"))


def test_factors_that_are_too_large_are_refused() -> None:
    task, model = task_and_model("dropout=variational")
    options = PassOptions(2, 2, 1, word_dropout=False, factors=[1, 9])
    with pytest.raises(ConfigError, match=r"^dropout_factors: .*; leave out the larger ones"):
        task.passes([model], options)
