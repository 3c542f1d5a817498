"""Where the steps of sequences lie in memory: as they come where all are of one length, else packed, so that
padding costs nothing.

T time  B batch  N steps of all sequences together  K groups of gates  H, D, X any size
"""

from itertools import accumulate

import torch
from torch import Tensor


def each_step(mask: Tensor, time: int) -> list[Tensor]:
    """The masks of all steps, one after the other."""
    return [mask[0]] * time if len(mask) == 1 else list(mask.unbind(0))


def zero_padding(x_TBD: Tensor, lengths: Tensor | None) -> Tensor:
    """The input with zeros beyond the end of each sequence, where it may hold NaN."""
    if lengths is None:
        return x_TBD
    padding_TB = torch.arange(len(x_TBD), device=x_TBD.device)[:, None] >= lengths
    return x_TBD.masked_fill(padding_TB[..., None], 0)


class Layout:
    """Every sequence has every step: tensors are [T, B, X], as they come."""

    def __init__(self, time: int, batch: int) -> None:
        self.time, self.batch = time, batch
        self.most = batch  # sequences that have the same step

    @staticmethod
    def of(x_TBD: Tensor, lengths: Tensor | None) -> "Layout":
        """Lengths are looked at, so that a GPU is waited for, and torch.compile breaks its graph here."""
        time, batch, _ = x_TBD.shape
        return (
            Layout(time, batch) if lengths is None or bool((lengths >= time).all()) else Packed(time, lengths)
        )

    @property
    def is_packed(self) -> bool:
        return False

    @property
    def row_starts(self) -> list[int]:
        """The row where each step begins, and behind the last one how many rows there are."""
        return [step * self.batch for step in range(self.time + 1)]

    @property
    def row_places(self) -> Tensor | None:
        """Where each row lies in [T·B], where that is not its number."""
        return None

    def blocks(self, at_once: int) -> list[range]:
        """The steps in groups that hold about so many of all sequences together."""
        steps = max(1, at_once // max(1, self.most))
        return [range(first, min(first + steps, self.time)) for first in range(0, self.time, steps)]

    def part(self, steps: range) -> slice:
        """Where some steps lie."""
        return slice(steps.start, steps.stop)

    def pack(self, x_TBX: Tensor) -> Tensor:
        """What is there."""
        return x_TBX

    def unpack(self, packed: Tensor) -> Tensor:
        """[T, B, X], zero where nothing is."""
        return packed

    def each(self, packed: Tensor, dim: int = 0) -> list[Tensor]:
        """Each step, [..., B, X], or of as many sequences as have it; `dim` is that of time."""
        return list(packed.unbind(dim))

    def masks(self, mask: Tensor | None) -> list[Tensor] | None:
        """Of each step, likewise; the mask is [T|1, ..., B|1, X]."""
        return None if mask is None else each_step(mask, self.time)

    def mask_of_steps(self, mask: Tensor | None) -> Tensor | None:
        """The mask [T|1, ..., B|1, X] with sequences in the order that they are worked in."""
        return mask

    def within(self, memory: Tensor, dim: int, *, start: bool = False) -> Tensor:
        """The rows that `pack` gives, within memory [..., T, B, X] of full length (with `start` of T + 1
        states); `dim` is that of B.
        """
        return memory

    def mask_of_all(self, mask_TKBD: Tensor | None) -> Tensor | None:
        """One for what `pack` gives: [T|1, K, B|1, D], or [N|1, K, 1, D]."""
        return mask_TKBD

    def sort(self, state_BH: Tensor) -> Tensor:
        """A state or its gradient in the order that sequences are worked in."""
        return state_BH

    def unsort(self, state_BH: Tensor) -> Tensor:
        """And in the order that they came in."""
        return state_BH

    def states(self, start_BH: Tensor) -> Tensor:
        """Memory for a state before the first step, which is there, and after each one."""
        states = start_BH.new_empty(self.time + 1, *start_BH.shape)
        states[0] = start_BH
        return states

    def before(self, states: Tensor) -> Tensor:
        """Those before each step."""
        return states[:-1]

    def after(self, states: Tensor) -> Tensor:
        """Those after each step."""
        return states[1:]

    def outputs(self, states: Tensor) -> Tensor:
        """Those after each step, [T, B, H], zero where no step is, in memory of their own."""
        return states[1:].clone()

    def last(self, states: Tensor) -> Tensor:
        """That after the last step of each sequence, [B, H], as they came, in memory of its own."""
        return states[-1].clone()

    def go_on(self, t: int, state: Tensor) -> Tensor:
        """Of the state after step t - 1 that of the sequences that have step t."""
        return state

    def end_gradient(self, upstream_BH: Tensor | None, like: Tensor) -> Tensor:
        """That of the last state, sorted and in memory of its own."""
        return like.new_zeros(self.batch, like.shape[-1]) if upstream_BH is None else upstream_BH.clone()

    def go_back(self, t: int, gradient: Tensor, end: Tensor) -> Tensor:
        """That of the state after step t: what step t + 1 gives, and the last state's where a sequence has
        none; it may be written to.

        Before the first call, of the last step, there is no `gradient` of any sequence.
        """
        return end if t == self.time - 1 else gradient


class Packed(Layout):
    """The longest sequence first, so that a step is of the first sequences of the one before; step after
    step, [N, 1, X].
    """

    def __init__(self, time: int, lengths_B: Tensor) -> None:
        batch, device = len(lengths_B), lengths_B.device
        sorted_B, self.order_B = lengths_B.clamp(0, time).sort(descending=True, stable=True)
        row_B = torch.arange(batch, device=device)
        self.is_sorted = bool((self.order_B == row_B).all())
        there_TB = torch.arange(time, device=device)[:, None] < sorted_B
        self.sizes = [size for size in there_TB.sum(1).tolist() if size]
        super().__init__(len(self.sizes), batch)
        self.most, self.padded_time = max(self.sizes, default=1), time
        self.step_N, row_N = there_TB.nonzero(as_tuple=True)
        self.sequence_N = self.order_B[row_N]
        self.first = list(accumulate(self.sizes, initial=0))
        self.place_N = self.step_N * batch + self.sequence_N
        # States are those of the start, [B], then those after each step.
        first_T = torch.tensor([0, *(batch + first for first in self.first)], device=device)
        self.before_N = first_T[self.step_N] + row_N
        self.last_B = self.unsort(first_T[sorted_B] + row_B)

    @property
    def is_packed(self) -> bool:
        return True

    @property
    def row_starts(self) -> list[int]:
        return self.first

    @property
    def row_places(self) -> Tensor | None:
        return self.place_N

    def part(self, steps: range) -> slice:
        return slice(self.first[steps.start], self.first[steps.stop])

    def pack(self, x_TBX: Tensor) -> Tensor:
        return x_TBX.flatten(0, 1).index_select(0, self.place_N)[:, None]

    def unpack(self, packed: Tensor) -> Tensor:
        x_TBX = packed.new_zeros(self.padded_time, self.batch, packed.shape[-1])
        x_TBX.view(-1, packed.shape[-1]).index_copy_(0, self.place_N, packed[:, 0])
        return x_TBX

    def each(self, packed: Tensor, dim: int = 0) -> list[Tensor]:
        return list(torch.split(packed.squeeze(dim + 1), self.sizes, dim))

    def masks(self, mask: Tensor | None) -> list[Tensor] | None:
        mask = self.mask_of_steps(mask)
        if mask is None:
            return None
        return [
            step[..., :size, :] for step, size in zip(each_step(mask, self.time), self.sizes, strict=False)
        ]

    def mask_of_steps(self, mask: Tensor | None) -> Tensor | None:
        return (
            mask
            if mask is None or mask.shape[-2] == 1 or self.is_sorted
            else mask.index_select(-2, self.order_B)
        )

    def within(self, memory: Tensor, dim: int, *, start: bool = False) -> Tensor:
        rows = len(self.step_N) + (self.batch if start else 0)
        return memory.flatten(dim - 1, dim).narrow(dim, 0, rows).unsqueeze(dim)

    def mask_of_all(self, mask_TKBD: Tensor | None) -> Tensor | None:
        if mask_TKBD is None or (len(mask_TKBD) == 1 and mask_TKBD.shape[2] == 1):
            return mask_TKBD
        step: Tensor | int = self.step_N if len(mask_TKBD) > 1 else 0
        sequence: Tensor | int = self.sequence_N if mask_TKBD.shape[2] > 1 else 0
        return mask_TKBD.transpose(1, 2)[step, sequence][:, :, None]

    def sort(self, state_BH: Tensor) -> Tensor:
        return state_BH if self.is_sorted else state_BH[self.order_B]

    def unsort(self, state_BH: Tensor) -> Tensor:
        return (
            state_BH if self.is_sorted else torch.empty_like(state_BH).index_copy_(0, self.order_B, state_BH)
        )

    def states(self, start_BH: Tensor) -> Tensor:
        states = start_BH.new_empty(self.batch + len(self.step_N), 1, start_BH.shape[1])
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

    def go_on(self, t: int, state: Tensor) -> Tensor:
        return state[: self.sizes[t]]

    def end_gradient(self, upstream_BH: Tensor | None, like: Tensor) -> Tensor:
        return self.sort(super().end_gradient(upstream_BH, like))

    def go_back(self, t: int, gradient: Tensor, end: Tensor) -> Tensor:
        size = self.sizes[t] if t >= 0 else self.batch
        return gradient if len(gradient) == size else torch.cat([gradient, end[len(gradient) : size]])
