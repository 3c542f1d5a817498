"""Perplexity: the standard approximation (no masks), and MC dropout.

T time  B batch  N predicted tokens  S passes that run together
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vdrop_cli import interruption
from vdrop_cli.dropout import ModelMasks, concat_batch, draw
from vdrop_cli.layers import State
from vdrop_cli.model import LanguageModel
from vdrop_cli.policies import WordMask
from vdrop_cli.random_streams import Stream
from vdrop_cli.sinks import ppl

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
def stream_nll(model: LanguageModel, stream_N: Tensor) -> Tensor:
    """Nats of every token but the first, in one pass over the whole stream, batch 1, state carried."""
    state, parts = model.zero_state(1), []
    for _, ids_T, targets_T in stretches(stream_N, STEPS_AT_ONCE):
        interruption.check()
        nll_TB, state = model.nll(ids_T[:, None], targets_T[:, None], state, model.mean_masks())
        parts.append(nll_TB[:, 0])
    return torch.cat(parts)


def stream_perplexity(model: LanguageModel, stream_N: Tensor) -> float:
    return perplexity(stream_nll(model, stream_N))


def ensemble_perplexities(models: Iterable[LanguageModel], streams: dict[str, Tensor]) -> dict[str, float]:
    """Of the mean of the probabilities that all models give to each token, by text; one model is held at a
    time.
    """
    sums: dict[str, Tensor] = {}
    for members, model in enumerate(models, 1):
        for name, stream_N in streams.items():
            log_p_N = -stream_nll(model, stream_N).double()
            sums[name] = torch.logaddexp(sums[name], log_p_N) if members > 1 else log_p_N
    return {name: perplexity(math.log(members) - total_N) for name, total_N in sums.items()}


@torch.no_grad()
def written(model: LanguageModel, begin_N: Tensor, count: int, generator: torch.Generator) -> Iterator[int]:
    """So many words after `begin_N`, each drawn from what the model expects after those before it; after
    none, from its zero state.

    Raises ValueError where the probabilities are not finite.
    """
    state, ids_TB = model.zero_state(1), begin_N[:, None]
    for _ in range(count):
        logits_V = model.head_bias
        if len(ids_TB):
            y_TBH, state = model(ids_TB, state, model.mean_masks())
            logits_V = y_TBH[-1, 0] @ model.head_weight.T + logits_V
        p_V = torch.softmax(logits_V, 0)
        if not bool(p_V.isfinite().all()):
            raise ValueError("the probabilities of the next word are not finite")
        ids_TB = torch.multinomial(p_V, 1, generator=generator)[None]
        yield int(ids_TB)


@torch.no_grad()
def batched_loss(
    model: LanguageModel, chunks: Iterable[tuple[int, Tensor, Tensor]], batch: int
) -> tuple[float, int]:
    """Nats a token, summed over the chunks (number, words, targets) of a text in columns, and how many
    chunks.
    """
    state, total, number = model.zero_state(batch), 0.0, 0
    for _, ids_TB, targets_TB in chunks:
        interruption.check()
        nll_TB, state = model.nll(ids_TB, targets_TB, state, model.mean_masks())
        total, number = total + nll_TB.double().mean().item(), number + 1
    return total, number


class Averages(NamedTuple):
    """Perplexity of `samples` averaged passes: mean and deviation over the disjoint groups of so many
    passes.
    """

    samples: int
    ppl: float
    deviation: float | None  # None where there is but one group
    groups: int


def ladder(samples: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … and the whole."""
    steps = [factor * 10**power for power in range(len(str(samples))) for factor in (1, 2, 5)]
    return sorted({*(step for step in steps if step < samples), samples})


def spread(values: list[float]) -> float | None:
    """Their deviation; None of a single one."""
    return torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else None


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
            total = (
                log_p_N.double()
                if held is None
                else torch.logaddexp(held.to(log_p_N.device), log_p_N.double())
            )
            if self.seen % step == 0:
                self.perplexities[step].append(perplexity(math.log(step) - total))
                self.sums[step] = None
            else:
                self.sums[step] = total

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "sums": self.sums, "perplexities": self.perplexities}

    def load_state_dict(self, held: dict[str, Any]) -> None:
        self.seen, self.sums, self.perplexities = held["seen"], held["sums"], held["perplexities"]

    def require_fitting(self, held: Any, tokens: int) -> None:
        """Raises ValueError unless `held` is a state of these averages, over so many tokens."""
        if (
            not isinstance(held, dict)
            or type(held.get("seen")) is not int
            or not 0 <= held["seen"] < self.steps[-1]
        ):
            raise ValueError("its passes are not counted")
        sums, perplexities = held.get("sums"), held.get("perplexities")
        if (
            not isinstance(sums, dict)
            or not isinstance(perplexities, dict)
            or not set(sums) == set(perplexities) == set(self.steps)
        ):
            raise ValueError("its averages are of other numbers of passes")
        for step in self.steps:
            groups, rest = divmod(held["seen"], step)
            found = perplexities[step]
            if (
                not isinstance(found, list)
                or len(found) != groups
                or not all(type(value) is float and value > 0 for value in found)
            ):
                raise ValueError("its perplexities are not as many as its passes give, or not numbers")
            if (sums[step] is None) != (rest == 0) or not (
                sums[step] is None or is_number(sums[step], (tokens,), torch.float64)
            ):
                raise ValueError("its averages are not those of the text")

    def results(self) -> list[Averages]:
        return [Averages(step, sum(v) / len(v), spread(v), len(v)) for step, v in self.perplexities.items()]


class MonteCarlo:
    """MC dropout (Gal & Ghahramani 2016, section 4): the mean of each token's probability over `samples`
    passes, then its log.

    `together` passes share a batch; the result does not depend on it but for rounding. Without `word_dropout`
    the word mask is left out, as in the authors' evaluation. It can be stopped after any stretch of text and
    resumes to the same result bit for bit, from what `state_dict` gives.
    """

    def __init__(
        self,
        model: LanguageModel,
        stream_N: Tensor,
        samples: int,
        together: int,
        seed: int,
        word_dropout: bool,
    ) -> None:
        dropout = model.dropout
        self.dropout = dropout if word_dropout else replace(dropout, p_word=0.0, word_mask=WordMask.type)
        # one set of masks for the whole text, or new ones at every step
        self.held = not dropout.new_every_step and self.dropout.word_mask is WordMask.type
        self.model, self.stream_N, self.samples, self.together, self.masks_stream = (
            model,
            stream_N,
            samples,
            together,
            Stream((seed, "mc")),
        )
        self.averages = RunningAverages(samples)
        self.start_batch()

    def start_batch(self) -> None:
        """Of the passes that come next, at the beginning of the text."""
        self.passes = range(self.averages.seen, min(self.averages.seen + self.together, self.samples))
        self.number = 0  # of the next stretch
        self.masks: ModelMasks | None = None
        self.state: State = self.model.zero_state(len(self.passes))
        self.log_p_SN = torch.empty(len(self.passes), len(self.stream_N) - 1, device=self.stream_N.device)

    @property
    def words(self) -> int:
        """How many were read, over all passes."""
        return self.averages.seen * self.log_p_SN.shape[1] + len(self.passes) * min(
            self.number * MC_STEPS_AT_ONCE, self.log_p_SN.shape[1]
        )

    @property
    def total(self) -> int:
        """How many there are to read."""
        return self.samples * self.log_p_SN.shape[1]

    def results(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The metrics, and the perplexity by number of passes."""
        averages = self.averages.results()
        return {f"test_ppl_mc{self.samples}": averages[-1].ppl}, [a._asdict() for a in averages]

    def state_dict(self) -> dict[str, Any]:
        done = self.number * MC_STEPS_AT_ONCE
        here = {
            "number": self.number,
            "state": [part.cpu() for part in self.state],
            "log_p": self.log_p_SN[:, :done].cpu(),
        }
        return {"averages": self.averages.state_dict(), **here}

    def load_state_dict(self, held: dict[str, Any]) -> None:
        """Raises ValueError, and changes nothing, where it is not a state of such passes."""
        self.require_fitting(held)
        device = self.stream_N.device
        self.averages.load_state_dict(held["averages"])
        self.start_batch()
        self.number, self.state = held["number"], tuple(part.to(device) for part in held["state"])
        self.log_p_SN[:, : held["log_p"].shape[1]] = held["log_p"].to(device)

    def require_fitting(self, held: dict[str, Any]) -> None:
        tokens = len(self.stream_N) - 1
        averages, number, state, log_p = (held.get(name) for name in ("averages", "number", "state", "log_p"))
        self.averages.require_fitting(averages, tokens)
        assert isinstance(averages, dict)
        passes = min(self.together, self.samples - averages["seen"])
        if type(number) is not int or not 0 <= number <= -(-tokens // MC_STEPS_AT_ONCE):
            raise ValueError("its place in the text is none")
        if not is_number(log_p, (passes, min(number * MC_STEPS_AT_ONCE, tokens)), self.log_p_SN.dtype):
            raise ValueError("its probabilities are not those of the text")
        wanted = self.model.zero_state(passes)
        if not isinstance(state, list) or len(state) != len(wanted):
            raise ValueError("its state is of another model")
        if not all(is_number(part, zero.shape, zero.dtype) for part, zero in zip(state, wanted, strict=True)):
            raise ValueError("its state is of another model")

    def draw_masks(self, time: int) -> ModelMasks:
        shape, number = self.model.layers.mask_shape(time, 1), 0 if self.held else self.number
        return concat_batch(
            [draw(self.dropout, shape, self.masks_stream.at(s, number)) for s in self.passes]
        ).to(self.stream_N.device)

    @torch.no_grad()
    def run(self) -> Iterator[int]:
        """Reads on to the end, a stretch at a time; yields how many words that was, over all passes that run
        together.
        """
        while True:
            for number, ids_T, targets_T in islice(
                stretches(self.stream_N, MC_STEPS_AT_ONCE), self.number, None
            ):
                if self.masks is None or not self.held:
                    self.masks = self.draw_masks(len(ids_T))
                ids_TS, targets_TS = (t[:, None].expand(-1, len(self.passes)) for t in (ids_T, targets_T))
                nll_TS, self.state = self.model.nll(ids_TS, targets_TS, self.state, self.masks)
                self.log_p_SN[:, number * MC_STEPS_AT_ONCE :][:, : len(ids_T)] = -nll_TS.T
                self.number += 1
                yield ids_TS.numel()
            for log_p_N in self.log_p_SN:
                self.averages.add(log_p_N)
            if self.averages.seen == self.samples:
                return
            self.start_batch()


def is_number(value: Any, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether it is a tensor of that shape and type, without NaN."""
    return (
        isinstance(value, Tensor)
        and value.shape == torch.Size(shape)
        and value.dtype == dtype
        and not bool(value.isnan().any())
    )


def mc_perplexity(
    model: LanguageModel, stream_N: Tensor, samples: int, together: int, seed: int, word_dropout: bool
) -> list[Averages]:
    """All of `MonteCarlo` at once."""
    passes = MonteCarlo(model, stream_N, samples, together, seed, word_dropout)
    for _ in passes.run():
        pass
    return passes.averages.results()
