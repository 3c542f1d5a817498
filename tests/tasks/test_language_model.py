"""Columns, chunks and the loss, by hand on small streams."""

import math
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, settings
from vdrop_cli import tasks
from vdrop_cli.corpora import Corpus
from vdrop_cli.errors import ConfigError
from vdrop_cli.model import LanguageModel
from vdrop_cli.optimizer import Optimizer
from vdrop_cli.random_streams import Stream
from vdrop_cli.tasks.language_model import LanguageModelling, chunks, columns


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
    model = LanguageModel(config.model, config.dropout.for_layers(), 7)
    model.initialise(1e-30, Stream((0,)))
    loss, _ = task.loss(model, next(task.batches()), model.zero_state(4), model.mean_masks())
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
    model = LanguageModel(config.model, config.dropout.for_layers(), 7)
    model.initialise(1e-30, Stream((0,)))
    with torch.no_grad():
        model.head_bias.copy_(torch.arange(7) / 10)
    chunk = next(task.batches())
    before = model.head_bias.detach().clone()
    loss, _ = task.loss(model, chunk, model.zero_state(2), model.mean_masks())
    Optimizer(model, config.schedule).step(loss, lr=config.schedule.lr)
    counts = torch.zeros(7).index_add_(0, chunk.targets_TB.flatten(), torch.ones(8))
    expected = before - 0.5 * (4 * before.softmax(0) - counts / 2)
    torch.testing.assert_close(model.head_bias.detach(), expected)


def test_unknown_words_that_training_does_not_have_are_warned_of() -> None:
    """Where <unk> is among the words of training it is trained, and no warning is due."""
    config = settings("task.batch_size=4", "task.bptt=5")
    (train_N, valid_N) = (torch.arange(100) % 3, torch.arange(100) % 4)

    def warnings(train_N: torch.Tensor, valid_N: torch.Tensor) -> list[str]:
        made = Corpus(["a", "b", "<eos>", "<unk>"], train_N, valid_N, train_N, "here", "f")
        return LanguageModelling(config.task, made, torch.device("cpu")).warnings

    (warning,) = warnings(train_N, valid_N)
    assert warning.startswith(
        "25 % of the valid part and 0 % of the test part of here are words that the training part does not "
        "have"
    )
    assert "data.min_count" in warning
    assert warnings(train_N, train_N) == warnings(valid_N, valid_N) == []


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
    model = LanguageModel(config.model, config.dropout.for_layers(), 7)
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


def test_the_fraction_of_penn_treebank_is_the_published_one(real_data: object) -> None:
    """3,688 words a column: 105 chunks, divided by 105.34."""
    from vdrop_cli import corpora

    config = settings("data.cache=null")
    task = LanguageModelling(config.task, corpora.load(config.data), torch.device("cpu"))
    assert len(task.valid_columns) == 3_688 and sum(1 for _ in task.valid_chunks()) == 105
    assert len(task.streams["test"]) - 1 == 82_429


def test_the_validation_that_compares_with_the_paper_is_of_penn_treebank_alone(
    text: list[str], real_data: Path
) -> None:
    for overrides, as_published in ((text, False), (["data=ptb", f"data.dir={real_data}/ptb"], True)):
        task = tasks.load(settings(*TINY, *overrides), torch.device("cpu"))
        assert isinstance(task, LanguageModelling) and task.as_published is as_published


def test_an_epoch_shows_first_what_selects_it_and_names_training_with_dropout() -> None:
    config = settings(*TINY, "data=pydoc")
    task = LanguageModelling(config.task, corpus(203, 7), torch.device("cpu"))
    model = task.model(config.model, config.dropout.for_layers(), "fused", None)
    model.initialise(0.1, Stream((3,)))
    measured = task.validate(model)
    assert list(measured) == ["valid_ppl_batched"]
    metrics = task.epoch_metrics(1.0, measured)
    assert list(metrics) == [task.selection_metric, "train_ppl_dropout"] and metrics[
        "train_ppl_dropout"
    ] == pytest.approx(math.e)
    result = set(task.result(model, 1, 1.0))
    assert {"train_ppl", "test_ppl", "valid_ppl"} <= result and "train_ppl_dropout" not in result
