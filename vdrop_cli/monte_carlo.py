"""Perplexity by MC dropout (Gal & Ghahramani 2016, section 4), and averages over its passes.

T time  N predicted tokens  S passes in a batch
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from vdrop_cli.assessment import Row
from vdrop_cli.dropout import ModelMasks, concat_batch, draw, is_fixed, joined_masks
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
from vdrop_cli.perplexity import perplexity, segments
from vdrop_cli.policies import Dropout
from vdrop_cli.random_streams import Stream

PASS_STEPS = 35  # steps of a segment; masks that are new at every step are drawn for one segment at a time


class RunningAverages:
    """Averages the probabilities of passes one by one; memory does not grow with their number."""

    def __init__(self, samples: int) -> None:
        self.sample_counts = sample_counts(samples)
        self.sums: dict[int, Tensor | None] = dict.fromkeys(self.sample_counts)
        self.seen = 0
        self.perplexities: dict[int, list[float]] = {count: [] for count in self.sample_counts}

    def add(self, log_p_N: Tensor) -> None:
        """Adds a pass: the log-probability of every token."""
        self.seen += 1
        for count in self.sample_counts:
            partial_N = self.sums[count]
            total_N = (
                log_p_N.double()
                if partial_N is None
                else torch.logaddexp(partial_N.to(log_p_N.device), log_p_N.double())
            )
            if self.seen % count == 0:
                self.perplexities[count].append(perplexity(math.log(count) - total_N))
                self.sums[count] = None
            else:
                self.sums[count] = total_N

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "sums": self.sums, "perplexities": self.perplexities}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state that `require_fitting` accepts."""
        self.seen = state["seen"]
        self.sums = state["sums"]
        self.perplexities = state["perplexities"]

    def require_fitting(self, state: Any, tokens: int) -> None:
        """Raises ValueError unless `state` can be a state of these averages over `tokens` tokens."""
        if (
            not isinstance(state, dict)
            or type(state.get("seen")) is not int
            or not 0 <= state["seen"] < self.sample_counts[-1]
        ):
            raise ValueError("its passes are not counted")
        sums, perplexities = state.get("sums"), state.get("perplexities")
        if (
            not isinstance(sums, dict)
            or not isinstance(perplexities, dict)
            or not set(sums) == set(perplexities) == set(self.sample_counts)
        ):
            raise ValueError("its averages are of other numbers of passes")
        for count in self.sample_counts:
            groups, rest = divmod(state["seen"], count)
            values = perplexities[count]
            if (
                not isinstance(values, list)
                or len(values) != groups
                or not all(type(value) is float and value > 0 for value in values)
            ):
                raise ValueError("its perplexities are not as many as its passes give, or not numbers")
            if (sums[count] is None) != (rest == 0) or not (
                sums[count] is None or is_numeric(sums[count], (tokens,), torch.float64)
            ):
                raise ValueError("its averages are not those of the text")

    @property
    def ppl(self) -> float:
        """The perplexity of all passes averaged, once all are added."""
        (ppl,) = self.perplexities[self.sample_counts[-1]]
        return ppl

    def rows(self) -> list[Row]:
        """Returns the table of the perplexity by number of passes, once all are added."""
        return [mc_row("ppl", count, values) for count, values in self.perplexities.items()]


class PassMasks:
    """The masks of MC passes, as functions of the seed, the pass and, where they are resampled, the segment.

    Masks that are not new at every step, and word masks by type, are held over the whole text.

    Without `word_dropout` the word mask is left out, as in the authors' evaluation.
    """

    def __init__(
        self, model: LanguageModel, seed: int, word_dropout: bool, dropout: Dropout | None = None
    ) -> None:
        """`dropout`: the policy of the passes; None: that of the model."""
        dropout = model.dropout if dropout is None else dropout
        self.model = model
        self.dropout = dropout if word_dropout else dropout.without_words()
        self.is_fixed = is_fixed(self.dropout)
        self.stream = Stream((seed, "mc"))
        # the last passes and their masks of the first segment, which are held where they are not resampled
        self.first: tuple[range, ModelMasks] | None = None

    def draw(self, passes: range, segment: int, time: int) -> ModelMasks:
        """Returns the masks of some passes for a segment of `time` steps, a column for each pass."""
        if self.is_fixed:
            masks = self.draw_passes(self.dropout, passes, 0, time)
        else:
            if self.first is None or self.first[0] != passes:
                # Always PASS_STEPS steps: the numbers drawn for one place shift those of the next.
                self.first = (passes, self.draw_passes(self.dropout, passes, 0, PASS_STEPS))
            # masks on weights, which are drawn last, are those of the first segment
            masks = self.draw_passes(replace(self.dropout, p_weight=0.0), passes, segment, time)
            masks = joined_masks(masks, self.first[1], self.dropout)
        return masks.to(self.model.embedding.device)

    def draw_passes(self, dropout: Dropout, passes: range, number: int, time: int) -> ModelMasks:
        """Returns new masks of a policy on the CPU, those of each pass from a stream of its own."""
        shape = self.model.mask_shape(time, 1)
        return concat_batch([draw(dropout, shape, self.stream.at(s, number)) for s in passes])


class MonteCarlo(McPasses):
    """MC dropout: each token's probability is averaged over `samples` passes, then the log is taken.

    `batch` passes share a batch; apart from rounding, it does not change the result. The passes can stop
    between two segments of the text.
    """

    def __init__(
        self, model: LanguageModel, stream_N: Tensor, options: PassOptions, dropout: Dropout | None = None
    ) -> None:
        """`dropout`: the policy of the passes; None: that of the model."""
        self.pass_masks = PassMasks(model, options.seed, options.word_dropout, dropout)
        self.model, self.stream_N = model, stream_N
        self.samples, self.batch = options.samples, options.batch
        self.averages = RunningAverages(options.samples)
        self.start_batch()

    def start_batch(self) -> None:
        """Puts the next passes at the beginning of the text."""
        self.passes = range(self.averages.seen, min(self.averages.seen + self.batch, self.samples))
        self.number = 0  # of the next segment
        self.masks: ModelMasks | None = None
        self.state: State = self.model.zero_state(len(self.passes))
        self.log_p_SN = torch.empty(len(self.passes), len(self.stream_N) - 1, device=self.stream_N.device)

    @property
    def words(self) -> int:
        return self.averages.seen * self.log_p_SN.shape[1] + len(self.passes) * min(
            self.number * PASS_STEPS, self.log_p_SN.shape[1]
        )

    @property
    def total(self) -> int:
        return self.samples * self.log_p_SN.shape[1]

    def results(self) -> Measured:
        return Measured({f"test_ppl_mc{self.samples}": self.averages.ppl}, {"mc": self.averages.rows()})

    def state_dict(self) -> dict[str, Any]:
        return {
            "averages": self.averages.state_dict(),
            "number": self.number,
            "state": [part.cpu() for part in self.state],
            "log_p": self.log_p_SN[:, : self.number * PASS_STEPS].cpu(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        device = self.stream_N.device
        self.averages.load_state_dict(state["averages"])
        self.start_batch()
        self.number, self.state = state["number"], tuple(part.to(device) for part in state["state"])
        self.log_p_SN[:, : state["log_p"].shape[1]] = state["log_p"].to(device)

    def require_fitting(self, state: dict[str, Any]) -> None:
        tokens = len(self.stream_N) - 1
        averages, number, parts, log_p = (
            state.get(name) for name in ("averages", "number", "state", "log_p")
        )
        self.averages.require_fitting(averages, tokens)
        assert isinstance(averages, dict)
        passes = min(self.batch, self.samples - averages["seen"])
        number = place_in_text(number, tokens, PASS_STEPS)
        if not is_numeric(log_p, (passes, min(number * PASS_STEPS, tokens)), self.log_p_SN.dtype):
            raise ValueError("its probabilities are not those of the text")
        if not is_state_of(parts, self.model.zero_state(passes)):
            raise ValueError("its state is of another model")

    @torch.no_grad()
    def run(self) -> Iterator[int]:
        """Reads the text to its end in all passes; yields after each segment how many words that was."""
        while self.averages.seen < self.samples:
            for number, ids_T, targets_T in islice(segments(self.stream_N, PASS_STEPS), self.number, None):
                if self.masks is None or not self.pass_masks.is_fixed:
                    self.masks = self.pass_masks.draw(self.passes, number, len(ids_T))
                ids_TS, targets_TS = (t[:, None].expand(-1, len(self.passes)) for t in (ids_T, targets_T))
                nll_TS, self.state = self.model.nll(ids_TS, targets_TS, self.state, self.masks)
                self.log_p_SN[:, number * PASS_STEPS :][:, : len(ids_T)] = -nll_TS.T
                self.number += 1
                yield ids_TS.numel()
            for log_p_N in self.log_p_SN:
                self.averages.add(log_p_N)
            self.start_batch()  # without passes once all are finished


def mc_perplexity(model: LanguageModel, stream_N: Tensor, options: PassOptions) -> list[Row]:
    """Returns the perplexity by number of passes of MC dropout, a row of `mc_row` for each."""
    return MonteCarlo(model, stream_N, options).finish().tables["mc"]
