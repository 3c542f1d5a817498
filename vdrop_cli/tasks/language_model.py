"""Language modelling: predicts the next word of one long text.

T time steps of a chunk  B columns of the batch  N tokens of the stream  H hidden size
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise, starmap
from typing import NamedTuple

import torch
from torch import Tensor

from vdrop_cli.corpora import Corpus, unknown_share
from vdrop_cli.corpora.text import UNK
from vdrop_cli.dropout import ModelMasks, to_device
from vdrop_cli.errors import ConfigError
from vdrop_cli.layers import State
from vdrop_cli.learned import Words
from vdrop_cli.measured import Measured
from vdrop_cli.model import LanguageModel
from vdrop_cli.next_word import Groups
from vdrop_cli.perplexity import batched_loss, ppl, stream_perplexity
from vdrop_cli.policies import Dropout
from vdrop_cli.random_streams import Stream
from vdrop_cli.settings.task import LanguageModelTask
from vdrop_cli.settings.train import Model
from vdrop_cli.tasks.objective import Objective
from vdrop_cli.tasks.predictors import WordPredictor
from vdrop_cli.tasks.text_evaluation import TextEvaluation


class Chunk(NamedTuple):
    """`number` counts the chunks of an epoch from 0."""

    number: int
    ids_TB: Tensor
    targets_TB: Tensor
    keep_B: Tensor | None = None  # factor on the carried state of each column, 0 or 1; None: all 1


def columns(stream_N: Tensor, batch: int) -> Tensor:
    """Returns the stream as `batch` columns, [N // batch, batch]; column i starts at i·N/batch, halves
    rounded up (Zaremba et al. 2014, code).
    """
    total, length = len(stream_N), len(stream_N) // batch
    starts = [(2 * i * total + batch) // (2 * batch) for i in range(batch)]
    return torch.stack([stream_N[start : start + length] for start in starts], 1)


def random_bounds(steps: int, bptt: int, order: Stream) -> list[int]:
    """Returns the bounds of `steps // bptt` chunks of random lengths, which together have all steps.

    Lengths are drawn from a normal distribution. Its mean is bptt, or half of it for about one chunk in
    twenty. Its standard deviation is bptt/7 (5 for 35: Merity et al. 2018). A length is at least bptt/7.
    Finally all lengths are multiplied by the same factor near 1, so that their sum is `steps`.
    """
    generator, count = order.generator(), steps // bptt
    centre_K = torch.where(torch.rand(count, generator=generator) < 0.95, 1.0, 0.5)
    length_K = (centre_K + torch.randn(count, generator=generator) / 7).clamp(min=1 / 7).double()
    ends_K = (length_K.cumsum(0) / length_K.sum() * steps).round().long()
    return [0, *ends_K.tolist()]


def random_chunks(columns_NB: Tensor, bptt: int, order: Stream) -> Iterator[Chunk]:
    """Yields successive chunks of random lengths, each word with the next one as its target."""
    bounds = random_bounds(len(columns_NB) - 1, bptt, order)
    for number, here in enumerate(starmap(slice, pairwise(bounds))):
        yield Chunk(number, columns_NB[:-1][here], columns_NB[1:][here])


def chunks(columns_NB: Tensor, bptt: int) -> Iterator[Chunk]:
    """Yields successive chunks of `bptt` steps, each word with the next one as its target; what does not
    fill a chunk is left out.
    """
    for number in range((len(columns_NB) - 1) // bptt):
        here = slice(number * bptt, (number + 1) * bptt)
        yield Chunk(number, columns_NB[here], columns_NB[1:][here])


class LanguageModelling(TextEvaluation):
    """The next word of one long text, read in columns; the state is carried from chunk to chunk."""

    selection_metric = "valid_ppl_batched"

    def __init__(
        self, task: LanguageModelTask, corpus: Corpus, device: torch.device, as_published: bool = False
    ) -> None:
        """`as_published`: whether a published validation column exists with which the validation perplexity
        of this text can be compared.
        """
        self.as_published = as_published
        self.batch_size = task.batch_size
        self.bptt = task.bptt
        self.random_length, self.reset = task.random_length, task.reset
        self.ar, self.tar = task.ar, task.tar
        self.augmented_loss, self.augmented_temperature = task.augmented_loss, task.augmented_temperature
        self.corpus = corpus
        self.device = device
        self.streams = {part: stream_N.to(device) for part, stream_N in corpus.parts.items()}
        for part in ("train", "valid"):
            length = len(self.streams[part]) // task.batch_size
            if (length - 1) // self.bptt < 1:
                raise ConfigError(
                    f"task.batch_size={task.batch_size} × task.bptt={self.bptt} does not fit the {part} "
                    f"part of {corpus.origin}, "
                    f"{len(self.streams[part])} tokens; make them smaller or take a longer text"
                )
        if len(self.streams["test"]) < 2:
            raise ConfigError(
                f"data.test: the test part of {corpus.origin} has no second word to predict; take a longer "
                "text"
            )
        self.predictor = WordPredictor(Words.from_vocabulary(corpus.vocabulary), device)
        self.train_columns, self.valid_columns = (
            columns(self.streams[part], task.batch_size) for part in ("train", "valid")
        )

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    @property
    def origin(self) -> str:
        return self.corpus.origin

    @property
    def can_be_captured(self) -> bool:
        """Whether `loss` can be a CUDA graph: its shapes stay the same, and it never waits for the GPU."""
        return not self.random_length and self.augmented_temperature is None

    @property
    def part_sizes(self) -> dict[str, str]:
        return {part: f"{len(stream_N):,} tokens" for part, stream_N in self.streams.items()}

    @cached_property
    def warnings(self) -> list[str]:
        """Returns warnings about parts with the same text, and about unknown words that are not trained."""
        return [*self.warnings_of_equal_parts, *self.warnings_of_unknown_words]

    @property
    def warnings_of_equal_parts(self) -> list[str]:
        """Returns a warning for each two parts that are the same text."""
        return [
            f"the {one} part and the {other} part of {self.origin} are the same text, so the perplexity of "
            f"the {other} part is not that of an unseen text"
            for one, other in (("train", "valid"), ("train", "test"), ("valid", "test"))
            if torch.equal(self.corpus.parts[one], self.corpus.parts[other])
        ]

    @property
    def warnings_of_unknown_words(self) -> list[str]:
        """Returns a warning about unknown words where training has none, so that <unk> is not trained."""
        unknown = {part: unknown_share(stream_N, self.corpus) for part, stream_N in self.corpus.parts.items()}
        if unknown["train"] > 0 or not (unknown["valid"] or unknown["test"]):
            return []
        shares = " and ".join(f"{100 * unknown[part]:.3g} % of the {part} part" for part in ("valid", "test"))
        return [
            f"{shares} of {self.origin} are words that the training part does not have; they are read as "
            f"{UNK}, which is not trained: "
            f"no word of training is {UNK}; data.min_count=2 or more makes it of those that are rare there"
        ]

    @property
    def batches_an_epoch(self) -> int:
        return (len(self.train_columns) - 1) // self.bptt

    def batches(self, order: Stream) -> Iterator[Chunk]:
        """Yields the chunks of an epoch in the order of the text; `order` decides on random lengths and
        resets.
        """
        if self.random_length:
            cut = random_chunks(self.train_columns, self.bptt, order.at("lengths"))
        else:
            cut = chunks(self.train_columns, self.bptt)
        for chunk in cut:
            keep_B = self.keep(order.at("reset", chunk.number)) if self.reset > 0 else None
            yield chunk._replace(keep_B=keep_B)

    def keep(self, stream: Stream) -> Tensor:
        """Draws the factors on the carried state: 0 with the probability `reset`."""
        keep_B = torch.rand(self.batch_size, generator=stream.generator()) >= self.reset
        return to_device(keep_B, self.device, torch.float32)

    def valid_chunks(self) -> Iterator[Chunk]:
        return chunks(self.valid_columns, self.bptt)

    def words(self, chunk: Chunk) -> int:
        return chunk.ids_TB.numel()

    def model(
        self, model: Model, dropout: Dropout, backend: str, compute_dtype: torch.dtype | None
    ) -> LanguageModel:
        return self.predictor.model(model, dropout, backend, compute_dtype)

    def learned(self, measured: dict[str, float] | None) -> Words:
        return self.predictor.learned

    def zero_state(self, model: LanguageModel) -> State:
        return model.zero_state(self.batch_size)

    def masks(self, model: LanguageModel, chunk: Chunk, stream: Stream) -> ModelMasks:
        return model.host_masks(len(chunk.ids_TB), self.batch_size, stream)

    def loss(self, model: LanguageModel, chunk: Chunk, state: State, masks: ModelMasks) -> Objective:
        """Returns the loss in nats, averaged over the batch and summed over the time steps.

        So the published learning rate, 1, and the published clipping norms fit its scale. Penalties and the
        augmented loss are only in the part that is minimised.
        """
        if chunk.keep_B is not None:
            state = tuple(part * chunk.keep_B[:, None] for part in state)
        if self.ar or self.tar:
            x_TBE, state, squares = model.head_input_and_squares(chunk.ids_TB, state, masks)
            penalties = [len(x_TBE) * (self.ar * squares.output + self.tar * squares.change)]
        else:
            x_TBE, state = model(chunk.ids_TB, state, masks)
            penalties = []
        if self.augmented_temperature is None:
            descended = loss = model.nll_of_input(x_TBE, chunk.targets_TB).sum() / self.batch_size
        else:
            augmented = self.augmented_loss, self.augmented_temperature
            sums = model.augmented_nll(x_TBE, chunk.targets_TB, *augmented)
            descended, loss = (one / self.batch_size for one in sums)
        return Objective(sum(penalties, descended), loss, tuple(part.detach() for part in state))

    def reported_loss(self, loss: float, words: int) -> float:
        """Returns nats a token."""
        return loss * self.batch_size / words

    def train_metrics(self, loss: float) -> dict[str, float]:
        return {"train_ppl_dropout": ppl(loss)}

    def epoch_metrics(self, loss: float, measured: dict[str, float]) -> dict[str, float]:
        return {self.selection_metric: measured[self.selection_metric]} | self.train_metrics(loss) | measured

    def validate(self, model: LanguageModel) -> dict[str, float]:
        """Returns perplexities of the validation text.

        The text is read in columns and chunks, as in training, because that is fast. `valid_ppl_batched`
        divides the loss by the number of chunks. `valid_ppl_as_published` divides it by a fractional number
        of chunks, as the authors' code does, so it is too low. The published validation column was computed
        in this way. Only perplexities of Penn Treebank can be compared with it.
        """
        total, number = batched_loss(model, self.valid_chunks(), self.batch_size)
        metrics = {"valid_ppl_batched": ppl(total / number)}
        if self.as_published:
            their_number = (len(self.valid_columns) - 1) / self.bptt
            metrics = {"valid_ppl_as_published": ppl(total / their_number)} | metrics
        return metrics

    def evaluate(self, model: LanguageModel) -> Measured:
        """Returns the perplexities of the validation and the test text by the standard approximation."""
        metrics = {
            "valid_ppl": stream_perplexity(model, self.streams["valid"]),
            **self.validate(model),
            "test_ppl": stream_perplexity(model, self.streams["test"]),
        }
        return Measured(metrics, {})

    def train_perplexity(self, model: LanguageModel) -> float:
        """Returns the perplexity of the training text, read in columns and chunks, without masks: set beside
        validation, it shows over-fitting.
        """
        total, number = batched_loss(model, chunks(self.train_columns, self.bptt), self.batch_size)
        return ppl(total / number)

    @cached_property
    def test_groups(self) -> Groups:
        return Groups.from_text(self.corpus.test_N, self.corpus.train_N, self.predictor.line_end_id)

    def result(self, model: LanguageModel, best_epoch: int, best: float) -> dict[str, float]:
        return {"train_ppl": self.train_perplexity(model), **self.evaluate(model).metrics}
