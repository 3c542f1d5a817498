"""Perplexity: the standard approximation (no masks), and MC dropout.

T time  B batch  N predicted tokens  S passes that run together
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vdrop_cli.config import WordMask
from vdrop_cli.dropout import NEW_EVERY_STEP, Stream, draw, side_by_side
from vdrop_cli.model import LanguageModel
from vdrop_cli.sinks import ppl
from vdrop_cli.tasks import Chunk, LanguageModelling

STEPS_AT_ONCE = 1000  # of a text that is read word by word, without masks
MC_STEPS_AT_ONCE = 35  # the masks of policies with new ones at every step are drawn for so many


def stretches(stream_N: Tensor, steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The whole stream in order: number, words and their successors, the last stretch shorter."""
    for number, start in enumerate(range(0, len(stream_N) - 1, steps)):
        stop = min(start + steps, len(stream_N) - 1)
        yield number, stream_N[start:stop], stream_N[start + 1 : stop + 1]


def perplexity(nll_N: Tensor) -> float:
    return ppl(nll_N.double().mean().item())


@torch.no_grad()
def stream_perplexity(model: LanguageModel, stream_N: Tensor) -> float:
    """One pass over the whole stream, batch 1, state carried, every token but the first predicted."""
    state, parts = model.zero_state(1), []
    for _, ids_T, targets_T in stretches(stream_N, STEPS_AT_ONCE):
        nll_TB, state = model.nll(ids_T[:, None], targets_T[:, None], state, model.no_masks())
        parts.append(nll_TB[:, 0])
    return perplexity(torch.cat(parts))


@torch.no_grad()
def batched_loss(model: LanguageModel, chunks: Iterable[Chunk], batch: int) -> tuple[float, int]:
    """Nats a token, summed over the chunks of a text in columns, and the number of chunks."""
    state, total, number = model.zero_state(batch), 0.0, 0
    for chunk in chunks:
        nll_TB, state = model.nll(chunk.ids_TB, chunk.targets_TB, state, model.no_masks())
        total, number = total + nll_TB.double().mean().item(), number + 1
    return total, number


def validate(model: LanguageModel, task: LanguageModelling) -> dict[str, float]:
    """Validation in columns and chunks as in training: quick, and what the published column was made from.

    `valid_ppl_as_published` divides the loss by a fractional number of chunks, as the authors' code does, which comes out low;
    `valid_ppl_batched` divides by their number.
    """
    total, number = batched_loss(model, task.valid_chunks(), task.task.batch_size)
    their_number = (len(task.valid_columns) - 1) / task.task.bptt
    return {"valid_ppl_as_published": ppl(total / their_number), "valid_ppl_batched": ppl(total / number)}


def standard(model: LanguageModel, task: LanguageModelling) -> dict[str, float]:
    """Everything the standard approximation gives on the validation and test text."""
    return {
        "valid_ppl": stream_perplexity(model, task.streams["valid"]),
        **validate(model, task),
        "test_ppl": stream_perplexity(model, task.streams["test"]),
    }


def train_perplexity(model: LanguageModel, task: LanguageModelling) -> float:
    """On the training text in columns and chunks, without masks: set beside validation, it shows over-fitting."""
    total, number = batched_loss(model, task.train_chunks(), task.task.batch_size)
    return ppl(total / number)


class Averages(NamedTuple):
    """Perplexity of `samples` averaged passes: mean and deviation over the disjoint groups of so many passes."""

    samples: int
    ppl: float
    deviation: float | None  # None where there is but one group
    groups: int


def ladder(samples: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … and the whole."""
    steps = [factor * 10**power for power in range(len(str(samples))) for factor in (1, 2, 5)]
    return sorted({*(step for step in steps if step < samples), samples})


class RunningAverages:
    """Averages probabilities over passes as they come; memory does not grow with their number."""

    def __init__(self, samples: int) -> None:
        self.steps = ladder(samples)
        self.sums: dict[int, Tensor | None] = dict.fromkeys(self.steps)
        self.seen = 0
        self.perplexities: dict[int, list[float]] = {step: [] for step in self.steps}

    def add(self, log_p_N: Tensor) -> None:
        """The log-probability of every token in one more pass."""
        self.seen += 1
        for step in self.steps:
            held = self.sums[step]
            total = log_p_N.double() if held is None else torch.logaddexp(held, log_p_N.double())
            if self.seen % step == 0:
                self.perplexities[step].append(perplexity(math.log(step) - total))
                self.sums[step] = None
            else:
                self.sums[step] = total

    def results(self) -> list[Averages]:
        def spread(values: list[float]) -> float | None:
            return torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else None

        return [Averages(step, sum(v) / len(v), spread(v), len(v)) for step, v in self.perplexities.items()]


@torch.no_grad()
def mc_perplexity(
    model: LanguageModel,
    stream_N: Tensor,
    samples: int,
    together: int,
    seed: int,
    word_dropout: bool,
    listener: Callable[[int], object] = lambda words: None,
) -> list[Averages]:
    """MC dropout (Gal & Ghahramani 2016, section 4): the mean of each token's probability over `samples` passes, then its log.

    `together` passes share a batch; the result does not depend on it but for rounding. Without `word_dropout` the word mask is
    left out, as in the authors' evaluation. `listener` is told how many words were read, over all passes.
    """
    dropout = model.layers.dropout
    if not word_dropout:
        dropout = replace(dropout, p_word=0.0, word_mask=WordMask.type)
    held = dropout.policy not in NEW_EVERY_STEP and dropout.word_mask is WordMask.type  # one set of masks for the whole text
    stream, averages = Stream((seed, "mc")), RunningAverages(samples)
    for first in range(0, samples, together):
        passes = range(first, min(first + together, samples))
        state, masks = model.zero_state(len(passes)), None
        log_p_SN = torch.empty(len(passes), len(stream_N) - 1, device=stream_N.device)
        for number, ids_T, targets_T in stretches(stream_N, MC_STEPS_AT_ONCE):
            if masks is None or not held:
                shape = model.layers.mask_shape(len(ids_T), 1)
                masks = side_by_side([draw(dropout, shape, stream.at(s, number), stream_N.device) for s in passes])
            ids_TS, targets_TS = (t[:, None].expand(-1, len(passes)) for t in (ids_T, targets_T))
            nll_TS, state = model.nll(ids_TS, targets_TS, state, masks)
            log_p_SN[:, number * MC_STEPS_AT_ONCE :][:, : len(ids_T)] = -nll_TS.T
            listener(ids_TS.numel())
        for log_p_N in log_p_SN:
            averages.add(log_p_N)
    return averages.results()
