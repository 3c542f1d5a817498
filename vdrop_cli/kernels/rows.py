"""Where the steps of sequences lie in memory: as they are where all are of one length, else packed, so that padding costs nothing.

T time  B batch  N rows: steps of all sequences  K groups of gates  H, D, X any size
"""

from itertools import accumulate

import torch
from torch import Tensor


def each_step(mask: Tensor, time: int) -> list[Tensor]:
    """The masks of all steps, one after the other."""
    return [mask[0]] * time if len(mask) == 1 else list(mask.unbind(0))


class Rows:
    """Every sequence has every step: tensors are [T, B, X], as they come."""

    def __init__(self, time: int, batch: int) -> None:
        self.time, self.batch = time, batch
        self.most = batch  # rows of a step

    @staticmethod
    def of(x_TBD: Tensor, lengths: Tensor | None) -> "Rows":
        time, batch, _ = x_TBD.shape
        return Rows(time, batch) if lengths is None or bool((lengths >= time).all()) else Packed(time, lengths)

    def blocks(self, at_once: int) -> list[range]:
        """The steps in groups of about so many rows."""
        steps = max(1, at_once // self.most)
        return [range(first, min(first + steps, self.time)) for first in range(0, self.time, steps)]

    def part(self, steps: range) -> slice:
        """Where the rows of some steps lie."""
        return slice(steps.start, steps.stop)

    def pack(self, x_TBX: Tensor) -> Tensor:
        """Those rows that are there."""
        return x_TBX

    def unpack(self, rows: Tensor) -> Tensor:
        """[T, B, X], zero where nothing is."""
        return rows

    def each(self, rows: Tensor, dim: int = 0) -> list[Tensor]:
        """The rows of each step; `dim` is that of time."""
        return list(rows.unbind(dim))

    def masks(self, mask: Tensor | None) -> list[Tensor] | None:
        """Of each step, [..., rows, X]."""
        return None if mask is None else each_step(mask, self.time)

    def mask_of_all(self, mask_TKBD: Tensor | None) -> Tensor | None:
        """One mask for what `pack` gives."""
        return mask_TKBD

    def start(self, state_BH: Tensor) -> Tensor:
        """The state before the first step, or its gradient, its rows in the order that they are worked in."""
        return state_BH

    def end(self, state_BH: Tensor) -> Tensor:
        """The other way round, when all steps are done."""
        return state_BH

    def states(self, start_BH: Tensor) -> Tensor:
        """Memory for a state before and after each step, the first one there."""
        states = start_BH.new_empty(self.time + 1, *start_BH.shape)
        states[0] = start_BH
        return states

    def before(self, states: Tensor) -> Tensor:
        """That before each step."""
        return states[:-1]

    def after(self, states: Tensor) -> Tensor:
        """That after each step."""
        return states[1:]

    def outputs(self, states: Tensor) -> Tensor:
        """That after each step, [T, B, H], zero where no step is, in memory of its own."""
        return states[1:].clone()

    def last(self, states: Tensor) -> Tensor:
        """That after the last step of each sequence, [B, H], in memory of its own."""
        return states[-1].clone()

    def on(self, t: int, state: Tensor) -> Tensor:
        """Of the state after step t - 1 the rows that go on."""
        return state

    def end_gradient(self, upstream_BH: Tensor | None, states: Tensor) -> Tensor:
        """That of the last state, in the order that is worked in and in memory of its own."""
        return states.new_zeros(self.batch, states.shape[-1]) if upstream_BH is None else self.start(upstream_BH.clone())

    def back(self, t: int, gradient: Tensor, end: Tensor) -> Tensor:
        """The gradient of the state after step t: that which step t + 1 gives, and of what ended there, what came from upstream."""
        return gradient


class Packed(Rows):
    """The longest sequence first, so that the rows of a step are the first ones of the step before; one step after the other, [N, 1, X]."""

    def __init__(self, time: int, lengths_B: Tensor) -> None:
        batch, device = len(lengths_B), lengths_B.device
        sorted_B, self.order_B = lengths_B.clamp(0, time).sort(descending=True, stable=True)
        row_B = torch.arange(batch, device=device)
        self.as_they_are = bool((self.order_B == row_B).all())
        there_TB = torch.arange(time, device=device)[:, None] < sorted_B
        self.sizes = [size for size in there_TB.sum(1).tolist() if size]
        super().__init__(len(self.sizes), batch)
        self.most, self.full_time = max(self.sizes, default=1), time
        place_TB = torch.arange(time, device=device)[:, None] * batch + self.order_B
        self.place_N, self.sequence_N = place_TB[there_TB], self.order_B.expand(time, -1)[there_TB]
        self.first = list(accumulate(self.sizes, initial=0))  # where the rows of each step begin
        # States are those of the start, [B], then those after each step.
        first_T = torch.tensor([0, *(batch + first for first in self.first)], device=device)
        self.before_N = (first_T[: self.time, None] + row_B)[there_TB[: self.time]]
        self.last_B = torch.empty_like(self.order_B).index_copy_(0, self.order_B, first_T[sorted_B] + row_B)

    def part(self, steps: range) -> slice:
        return slice(self.first[steps.start], self.first[steps.stop])

    def pack(self, x_TBX: Tensor) -> Tensor:
        return x_TBX.flatten(0, 1).index_select(0, self.place_N)[:, None]

    def unpack(self, rows: Tensor) -> Tensor:
        size = rows.shape[-1]
        return rows.new_zeros(self.full_time * self.batch, size).index_copy_(0, self.place_N, rows[:, 0]).view(self.full_time, -1, size)

    def each(self, rows: Tensor, dim: int = 0) -> list[Tensor]:
        return list(torch.split(rows.squeeze(dim + 1), self.sizes, dim))

    def masks(self, mask: Tensor | None) -> list[Tensor] | None:
        if mask is None:
            return None
        if mask.shape[-2] > 1:
            mask = self.sorted(mask, -2)
        return [step[..., :size, :] for step, size in zip(each_step(mask, self.time), self.sizes, strict=False)]

    def mask_of_all(self, mask_TKBD: Tensor | None) -> Tensor | None:
        if mask_TKBD is None or (len(mask_TKBD) == 1 and mask_TKBD.shape[2] == 1):
            return mask_TKBD
        mask_TBKD = mask_TKBD.transpose(1, 2)
        if len(mask_TKBD) == 1:
            return mask_TBKD[0].index_select(0, self.sequence_N)[:, :, None]
        return mask_TBKD.expand(-1, self.batch, -1, -1).flatten(0, 1).index_select(0, self.place_N)[:, :, None]

    def start(self, state_BH: Tensor) -> Tensor:
        return self.sorted(state_BH, 0)

    def sorted(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor if self.as_they_are else tensor.index_select(dim, self.order_B)

    def end(self, state_BH: Tensor) -> Tensor:
        return state_BH if self.as_they_are else torch.empty_like(state_BH).index_copy_(0, self.order_B, state_BH)

    def states(self, start_BH: Tensor) -> Tensor:
        states = start_BH.new_empty(self.batch + len(self.place_N), 1, start_BH.shape[1])
        states[: self.batch, 0] = start_BH
        return states

    def before(self, states: Tensor) -> Tensor:
        return states.index_select(0, self.before_N)

    def after(self, states: Tensor) -> Tensor:
        return states[self.batch :]

    def outputs(self, states: Tensor) -> Tensor:
        return self.unpack(self.after(states))

    def last(self, states: Tensor) -> Tensor:
        return states[:, 0].index_select(0, self.last_B)

    def on(self, t: int, state: Tensor) -> Tensor:
        return state[: self.sizes[t] if self.sizes else 0]

    def back(self, t: int, gradient: Tensor, end: Tensor) -> Tensor:
        size = self.sizes[t] if t >= 0 else self.batch
        return gradient if len(gradient) == size else torch.cat([gradient, end[len(gradient) : size]])
