"""Perplexity of texts by the standard approximation (no masks), of one model or of several averaged.

T time  B batch  N predicted tokens
"""

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from vdrop_cli import interruption
from vdrop_cli.model import LanguageModel

STREAM_STEPS = 1000  # time steps of a call; apart from rounding, it does not change results


class Chunk(Protocol):
    """Successive words of a text in columns, and the word after each."""

    @property
    def ids_TB(self) -> Tensor: ...

    @property
    def targets_TB(self) -> Tensor: ...


def segments(stream_N: Tensor, steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields number, words and next words of successive segments of a text; the last one may be shorter."""
    for number, start in enumerate(range(0, len(stream_N) - 1, steps)):
        stop = min(start + steps, len(stream_N) - 1)
        yield number, stream_N[start:stop], stream_N[start + 1 : stop + 1]


def ppl(loss: float) -> float:
    """Perplexity of a loss in nats per token; infinity instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def perplexity(nll_N: Tensor) -> float:
    return ppl(nll_N.double().mean().item())


@torch.no_grad()
def stream_nll(model: LanguageModel, stream_N: Tensor) -> Tensor:
    """Returns the negative log-likelihood, in nats, of each token but the first: batch 1, state carried."""
    state, parts = model.zero_state(1), []
    for _, ids_T, targets_T in segments(stream_N, STREAM_STEPS):
        interruption.check()
        nll_TB, state = model.nll(ids_T[:, None], targets_T[:, None], state, model.mean_masks())
        parts.append(nll_TB[:, 0])
    return torch.cat(parts)


def stream_perplexity(model: LanguageModel, stream_N: Tensor) -> float:
    return perplexity(stream_nll(model, stream_N))


def ensemble_perplexities(models: Iterable[LanguageModel], streams: dict[str, Tensor]) -> dict[str, float]:
    """Returns, by text, the perplexity of the models' mean probability of each token.

    `models` is consumed one at a time, so one model at a time is in memory.
    """
    sums: dict[str, Tensor] = {}
    for members, model in enumerate(models, 1):
        for name, stream_N in streams.items():
            log_p_N = -stream_nll(model, stream_N).double()
            sums[name] = torch.logaddexp(sums[name], log_p_N) if members > 1 else log_p_N
    return {name: perplexity(math.log(members) - total_N) for name, total_N in sums.items()}


@torch.no_grad()
def batched_loss(model: LanguageModel, chunks: Iterable[Chunk], batch: int) -> tuple[float, int]:
    """Returns nats per token, summed over the chunks of a text in columns, and the number of chunks."""
    state = model.zero_state(batch)
    total = 0.0
    number = 0
    for chunk in chunks:
        interruption.check()
        nll_TB, state = model.nll(chunk.ids_TB, chunk.targets_TB, state, model.mean_masks())
        total, number = total + nll_TB.double().mean().item(), number + 1
    return total, number
