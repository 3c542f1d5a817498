"""How sure a language model is of the next word: entropy, accuracy, calibration, mutual information.

T time steps of a segment  N predicted tokens  S passes in a batch  E size of the head's input
V vocabulary
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vdrop_cli import interruption
from vdrop_cli.assessment import Row
from vdrop_cli.dropout import ModelMasks
from vdrop_cli.layers import State
from vdrop_cli.mc_passes import (
    McPasses,
    PassOptions,
    is_numeric,
    is_state_of,
    mc_row,
    place_in_text,
    sample_counts,
)
from vdrop_cli.measured import Measured
from vdrop_cli.model import LanguageModel
from vdrop_cli.monte_carlo import PASS_STEPS, PassMasks
from vdrop_cli.perplexity import perplexity, ppl, segments

BINS = 15  # of the most probable word's probability, equally wide (Guo et al. 2017)
POSITIONS = (1, 2, 6, 11, 21)  # lowest position of each group, in words of a sentence
FREQUENCIES = (0, 10, 100, 1_000, 10_000)  # lowest count of each group, in the training text
LOGITS = {"cpu": 2**22, "cuda": 2**26}  # number in memory at once, by device; at least that of one pass


class Tokens(NamedTuple):
    """What the predicted distribution says of each token of a text."""

    nll_N: Tensor  # nats
    entropy_N: Tensor  # of the distribution, nats
    pass_entropy_N: Tensor  # mean entropy of the passes that the distribution averages, nats
    confidence_N: Tensor  # probability of the most probable word
    is_right_N: Tensor  # 1 where that word is the token, 0 elsewhere

    @classmethod
    def empty(cls, length: int, device: torch.device) -> "Tokens":
        """Returns zeros for so many tokens, float64."""
        return cls(*torch.zeros(len(cls._fields), length, dtype=torch.float64, device=device))

    @property
    def mutual_information_N(self) -> Tensor:
        """Mutual information between the token and the masks, nats; values below 0, by rounding, become 0."""
        return (self.entropy_N - self.pass_entropy_N).clamp(min=0)

    def cpu(self) -> "Tokens":
        """Returns the same on the CPU."""
        return Tokens(*(values_N.cpu() for values_N in self))

    def select(self, inside_N: Tensor) -> "Tokens":
        """Returns the tokens where `inside_N` is true."""
        return Tokens(*(values_N[inside_N] for values_N in self))

    def measures(self, is_averaged: bool) -> dict[str, float]:
        """Returns means over the tokens; `is_averaged`: of several passes, with a mutual information."""
        measured = {
            "ppl": perplexity(self.nll_N),
            "entropy": self.entropy_N.mean().item(),
            "accuracy": self.is_right_N.mean().item(),
            "ece": calibration_error(self.confidence_N, self.is_right_N),
        }
        if is_averaged:
            measured["mutual_information"] = self.mutual_information_N.mean().item()
        return measured


class Groups(NamedTuple):
    """Properties of each token by which the measures are broken down."""

    position_N: Tensor | None  # in its sentence, from 1; None: the text has no line ends
    frequency_N: Tensor | None  # of the word in the training text; None: that text is not there

    @classmethod
    def from_text(cls, stream_N: Tensor, train_N: Tensor | None, line_end: int | None) -> "Groups":
        """Returns the groups of a text's tokens, except its first token, which is not predicted."""
        position_N = None if line_end is None else positions(stream_N, line_end)[1:]
        if train_N is None:
            return cls(position_N, None)
        size = int(torch.maximum(stream_N.max(), train_N.max())) + 1
        return cls(position_N, train_N.bincount(minlength=size)[stream_N[1:]])

    def tables(self, tokens: Tokens, suffix: str, is_averaged: bool) -> dict[str, list[Row]]:
        """Returns reliability by bins of confidence, and measures by position and by frequency."""
        tables = {"reliability": reliability(tokens.confidence_N, tokens.is_right_N)}
        for name, column, values_N, lowest in (
            ("positions", "position", self.position_N, POSITIONS),
            ("frequencies", "frequency", self.frequency_N, FREQUENCIES),
        ):
            if values_N is not None:
                tables[name] = [
                    {column: label, "tokens": int(inside_N.sum())}
                    | tokens.select(inside_N).measures(is_averaged)
                    for label, inside_N in ranges(values_N, lowest)
                ]
        return {f"{name}{suffix}": rows for name, rows in tables.items()}


def positions(stream_N: Tensor, line_end: int) -> Tensor:
    """Returns the position of every token in its line, from 1; a line's end counts as its last token."""
    index_N = torch.arange(len(stream_N), device=stream_N.device)
    last_end_N = torch.where(stream_N == line_end, index_N, -1).cummax(0).values
    before_N = torch.cat([last_end_N.new_tensor([-1]), last_end_N[:-1]])
    return index_N - before_N


def ranges(values_N: Tensor, lowest: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and the tokens of each range of whole numbers that has tokens."""
    for low, after in zip(lowest, [*lowest[1:], None], strict=True):
        if after is None:
            label, inside_N = f"{low:,} or more", values_N >= low
        else:
            label = f"{low:,}" if after == low + 1 else f"{low:,} to {after - 1:,}"
            inside_N = (values_N >= low) & (values_N < after)
        if inside_N.any():
            yield label, inside_N


def bin_sums(confidence_N: Tensor, is_right_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens, summed confidence and right tokens of each bin; bin k is (k/15, (k + 1)/15]."""
    bin_N = ((confidence_N * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    ones_N = torch.ones_like(confidence_N)
    tokens, confidence, right = (
        torch.zeros(BINS, dtype=torch.float64, device=bin_N.device).index_add(0, bin_N, values_N)
        for values_N in (ones_N, confidence_N, is_right_N)
    )
    return tokens, confidence, right


def calibration_error(confidence_N: Tensor, is_right_N: Tensor) -> float:
    """Returns the mean of |confidence - accuracy| over bins, weighted by tokens (Guo et al. 2017, eq. 3)."""
    _, confidence, right = bin_sums(confidence_N, is_right_N)
    return (confidence - right).abs().sum().item() / len(confidence_N)


def reliability(confidence_N: Tensor, is_right_N: Tensor) -> list[Row]:
    """Returns mean confidence and accuracy of each bin that has tokens."""
    sums = (values.tolist() for values in bin_sums(confidence_N, is_right_N))
    return [
        {
            "probability": f"{k / BINS:.2f} to {(k + 1) / BINS:.2f}",
            "tokens": int(tokens),
            "confidence": confidence / tokens,
            "accuracy": right / tokens,
        }
        for k, (tokens, confidence, right) in enumerate(zip(*sums, strict=True))
        if tokens
    ]


class Predictions(NamedTuple):
    """What some passes predict of a segment."""

    p_TV: Tensor  # summed over the passes, float64
    log_p_TS: Tensor  # of the targets
    entropy_T: Tensor  # summed over the passes, float64


def predictions(model: LanguageModel, x_TSE: Tensor, targets_T: Tensor) -> Predictions:
    """Returns the predictions of all passes for a segment.

    The softmax is computed for a few passes at a time, since all logits, [T, S, V], do not fit in memory.
    """
    steps, passes, _ = x_TSE.shape
    vocabulary = len(model.head_bias)
    p_TV = torch.zeros(steps, vocabulary, dtype=torch.float64, device=x_TSE.device)
    entropy_T = torch.zeros(steps, dtype=torch.float64, device=x_TSE.device)
    log_p_TS = torch.empty(steps, passes, device=x_TSE.device)
    at_once = max(1, LOGITS[x_TSE.device.type] // (steps * vocabulary))
    for first in range(0, passes, at_once):
        some = slice(first, first + at_once)
        x_TsE = x_TSE[:, some].contiguous()  # otherwise the logits are one small product per step
        log_p_TsV = model.logits(x_TsE).log_softmax(-1)
        index_Ts1 = targets_T[:, None, None].expand(*log_p_TsV.shape[:2], 1)
        log_p_TS[:, some] = log_p_TsV.gather(-1, index_Ts1)[..., 0]
        p_TsV = log_p_TsV.exp()
        p_TV += p_TsV.sum(1)
        entropy_T -= p_TsV.mul_(log_p_TsV).sum((1, 2), dtype=torch.float64)
    return Predictions(p_TV, log_p_TS, entropy_T)


def tokens_of(parts: list[Predictions], targets_T: Tensor) -> Tokens:
    """Returns what the mean distribution of all passes says of the tokens of a segment."""
    log_p_TS = torch.cat([part.log_p_TS for part in parts], 1).double()
    passes = log_p_TS.shape[1]
    p_TV = sum((part.p_TV for part in parts[1:]), parts[0].p_TV) / passes
    confidence_T, words_T = p_TV.max(-1)
    return Tokens(
        math.log(passes) - log_p_TS.logsumexp(1),  # by logarithms: probabilities would underflow sooner
        torch.special.entr(p_TV).sum(-1),
        sum((part.entropy_T for part in parts[1:]), parts[0].entropy_T) / passes,
        confidence_T,
        (words_T == targets_T).double(),
    )


@torch.no_grad()
def standard_tokens(model: LanguageModel, stream_N: Tensor) -> Tokens:
    """Reads the text once by the standard approximation: batch 1, state carried."""
    state, parts = model.zero_state(1), []
    steps = max(1, LOGITS[stream_N.device.type] // len(model.head_bias))
    for _, ids_T, targets_T in segments(stream_N, steps):
        interruption.check()
        x_TSE, state = model(ids_T[:, None], state, model.mean_masks())
        parts.append(tokens_of([predictions(model, x_TSE, targets_T)], targets_T))
    return Tokens(*map(torch.cat, zip(*parts, strict=True)))


def measure_calibration(model: LanguageModel, stream_N: Tensor, groups: Groups) -> Measured:
    """Returns metrics and tables of the standard approximation, without the perplexity."""
    tokens = standard_tokens(model, stream_N).cpu()
    measured = tokens.measures(is_averaged=False)
    del measured["ppl"]
    metrics = {f"test_{name}": value for name, value in measured.items()}
    return Measured(metrics, groups.tables(tokens, "", is_averaged=False))


class NextWordPasses(McPasses):
    """MC dropout with the passes of `MonteCarlo`; the whole distribution of each next word is averaged.

    All passes read a segment of the text before the next segment begins, so only the distributions of one
    segment, [T, V], are in memory. `batch` passes share a batch. The passes can stop between two segments.
    """

    def __init__(self, model: LanguageModel, stream_N: Tensor, groups: Groups, options: PassOptions) -> None:
        self.model, self.stream_N, self.groups = model, stream_N, groups
        self.samples = samples = options.samples
        firsts = range(0, samples, options.batch)
        self.batches = [range(first, min(first + options.batch, samples)) for first in firsts]
        self.masks = PassMasks(model, options.seed, options.word_dropout)
        self.number = 0  # of the next segment
        self.states: list[State] = [model.zero_state(len(passes)) for passes in self.batches]
        # by size of a group of passes: the negative log-likelihood of the text, summed, of each group
        self.nll = {
            count: torch.zeros(samples // count, dtype=torch.float64, device=stream_N.device)
            for count in sample_counts(samples)
        }
        self.tokens = Tokens.empty(len(stream_N) - 1, stream_N.device)

    @property
    def words(self) -> int:
        return self.samples * min(self.number * PASS_STEPS, len(self.stream_N) - 1)

    @property
    def total(self) -> int:
        return self.samples * (len(self.stream_N) - 1)

    @torch.no_grad()
    def run(self) -> Iterator[int]:
        """Reads the text to its end; yields after each segment how many words all passes have read in it."""
        # Masks on weights are large, and each pass has its own: they are drawn again for each segment.
        is_stored = self.masks.is_fixed and self.masks.dropout.p_weight == 0
        masks_of = self.fixed_masks() if is_stored else self.masks.draw
        for number, ids_T, targets_T in islice(segments(self.stream_N, PASS_STEPS), self.number, None):
            parts, states = [], []
            for passes, state in zip(self.batches, self.states, strict=True):
                ids_TS = ids_T[:, None].expand(-1, len(passes))
                x_TSE, after = self.model(ids_TS, state, masks_of(passes, number, len(ids_T)))
                parts.append(predictions(self.model, x_TSE, targets_T))
                states.append(after)
            self.add(number, parts, targets_T)
            self.states, self.number = states, number + 1
            yield self.samples * len(ids_T)

    def fixed_masks(self) -> Callable[[range, int, int], ModelMasks]:
        """Draws masks that are held over the text, once for each batch of passes."""
        masks = {passes: self.masks.draw(passes, 0, PASS_STEPS) for passes in self.batches}
        return lambda passes, number, time: masks[passes]

    def add(self, number: int, parts: list[Predictions], targets_T: Tensor) -> None:
        """Adds the predictions of segment `number` to the results."""
        here = slice(number * PASS_STEPS, number * PASS_STEPS + len(targets_T))
        for whole_N, values_T in zip(self.tokens, tokens_of(parts, targets_T), strict=True):
            whole_N[here] = values_T
        log_p_TS = torch.cat([part.log_p_TS for part in parts], 1).double()
        for count, nll in self.nll.items():
            groups_TGS = log_p_TS[:, : len(nll) * count].reshape(-1, len(nll), count)
            nll += (math.log(count) - groups_TGS.logsumexp(2)).sum(0)

    def results(self) -> Measured:
        """Returns metrics and tables of the averaged distribution, and the perplexity by number of passes."""
        tokens = self.tokens.cpu()
        measured = tokens.measures(is_averaged=True)
        metrics = {f"test_{name}_mc{self.samples}": value for name, value in measured.items()}
        tokens_read = len(self.stream_N) - 1
        rows = [
            mc_row("ppl", count, [ppl(value / tokens_read) for value in nll.tolist()])
            for count, nll in self.nll.items()
        ]
        return Measured(metrics, {"mc": rows, **self.groups.tables(tokens, "_mc", is_averaged=True)})

    def state_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "states": [[part.cpu() for part in state] for state in self.states],
            "nll": {count: nll.cpu() for count, nll in self.nll.items()},
            "tokens": torch.stack(self.tokens)[:, : self.number * PASS_STEPS].cpu(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        device = self.stream_N.device
        self.number = state["number"]
        self.states = [tuple(part.to(device) for part in parts) for parts in state["states"]]
        self.nll = {count: nll.to(device) for count, nll in state["nll"].items()}
        for whole_N, values_N in zip(self.tokens, state["tokens"], strict=True):
            whole_N[: len(values_N)] = values_N.to(device)

    def require_fitting(self, state: dict[str, Any]) -> None:
        tokens = len(self.stream_N) - 1
        number, states, nll, measured = (state.get(name) for name in ("number", "states", "nll", "tokens"))
        number = place_in_text(number, tokens, PASS_STEPS)
        shape = (len(self.tokens), min(number * PASS_STEPS, tokens))
        if not is_numeric(measured, shape, torch.float64):
            raise ValueError("its tokens are not those of the text")
        if not isinstance(nll, dict) or nll.keys() != self.nll.keys():
            raise ValueError("its averages are of other numbers of passes")
        if not all(is_numeric(nll[count], own.shape, own.dtype) for count, own in self.nll.items()):
            raise ValueError("its averages are of other numbers of passes")
        if not isinstance(states, list) or len(states) != len(self.batches):
            raise ValueError("its states are of other batches")
        for parts, passes in zip(states, self.batches, strict=True):
            if not is_state_of(parts, self.model.zero_state(len(passes))):
                raise ValueError("its states are of another model")


def mc_tokens(model: LanguageModel, stream_N: Tensor, options: PassOptions) -> Tokens:
    """Returns what the mean distribution of MC passes says of every token of a text but the first."""
    passes = NextWordPasses(model, stream_N, Groups(None, None), options)
    for _ in passes.run():
        interruption.check()
    return passes.tokens.cpu()
