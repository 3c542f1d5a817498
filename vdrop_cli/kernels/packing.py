"""How the steps of sequences lie in memory: as [T, B, …] if all lengths are the same, otherwise packed.

Packed sequences are stored as in torch's PackedSequence, so padding costs nothing.

T time  B batch  N steps of all sequences together  K groups of gates  H, D, X any size
"""

from itertools import accumulate

import torch
from torch import Tensor


def expand_steps(mask: Tensor, time: int) -> list[Tensor]:
    """The mask of each step, from one of [T|1, …]."""
    return [mask[0]] * time if len(mask) == 1 else list(mask.unbind(0))


def zero_padding(x_TBD: Tensor, lengths: Tensor | None) -> Tensor:
    """The input with zeros beyond the end of each sequence, where it may contain NaN."""
    if lengths is None:
        return x_TBD
    padding_TB = torch.arange(len(x_TBD), device=x_TBD.device)[:, None] >= lengths
    return x_TBD.masked_fill(padding_TB[..., None], 0)


class Layout:
    """The layout of sequences that have all steps: tensors are [T, B, X].

    It has the methods of `PackedLayout`; many of them return their argument as it is.
    """

    is_packed = False

    def __init__(self, time: int, batch: int) -> None:
        self.time, self.batch = time, batch
        self.max_rows = batch  # of one step

    @property
    def step_offsets(self) -> list[int]:
        """The row where each step begins, and the number of rows."""
        return [step * self.batch for step in range(self.time + 1)]

    @property
    def padded_rows(self) -> Tensor | None:
        """The row that each packed row has in [T·B]; None if nothing is packed."""
        return None

    def blocks(self, rows: int) -> list[range]:
        """The steps in blocks of about so many rows."""
        steps = max(1, rows // max(1, self.max_rows))
        return [range(first, min(first + steps, self.time)) for first in range(0, self.time, steps)]

    def block_slice(self, steps: range) -> slice:
        """The part of the first dimension of packed tensors that a block of steps occupies."""
        return slice(steps.start, steps.stop)

    def pack(self, x_TBX: Tensor) -> Tensor:
        """[T, B, X] without padding."""
        return x_TBX

    def unpack(self, packed: Tensor) -> Tensor:
        """[T, B, X] with zeros as padding."""
        return packed

    def unbind_steps(self, packed: Tensor, dim: int = 0) -> list[Tensor]:
        """Each step, [..., B, X], with the rows of the sequences that have it; `dim` is that of time."""
        return list(packed.unbind(dim))

    def masks_by_step(self, mask: Tensor | None) -> list[Tensor] | None:
        """The mask of each step and of its rows, from one of [T|1, ..., B|1, X]."""
        return None if mask is None else expand_steps(mask, self.time)

    def sort_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask [T|1, ..., B|1, X] with its sequences in sorted order."""
        return mask

    def pack_mask(self, mask_TKBD: Tensor | None) -> Tensor | None:
        """The mask of packed rows: [T|1, K, B|1, D], or [N|1, K, 1, D]."""
        return mask_TKBD

    def packed_view(self, memory: Tensor, *, start: bool = False) -> Tensor:
        """The packed rows in memory [..., T, B, X] of full length (with `start` of T + 1 states)."""
        return memory

    def sort(self, state_BH: Tensor) -> Tensor:
        """A state or its gradient with its sequences in sorted order."""
        return state_BH

    def unsort(self, state_BH: Tensor) -> Tensor:
        """A state or its gradient with its sequences in the order of the input."""
        return state_BH

    def allocate_states(self, start_BH: Tensor) -> Tensor:
        """Memory for the states before the first step, which are filled in, and after each step."""
        states = start_BH.new_empty(self.time + 1, *start_BH.shape)
        states[0] = start_BH
        return states

    def states_before(self, states: Tensor) -> Tensor:
        """The states before each step."""
        return states[:-1]

    def states_after(self, states: Tensor) -> Tensor:
        """The states after each step."""
        return states[1:]

    def outputs(self, states: Tensor) -> Tensor:
        """A copy of the states after each step, [T, B, H], with zeros as padding."""
        return states[1:].clone()

    def last_state(self, states: Tensor) -> Tensor:
        """A copy of the state after the last step of each sequence, [B, H], in the order of the input."""
        return states[-1].clone()

    def active_rows(self, t: int, state: Tensor) -> Tensor:
        """The rows of the state after step t - 1 whose sequences have step t."""
        return state

    def last_gradient(self, upstream_BH: Tensor | None, like: Tensor) -> Tensor:
        """A contiguous copy of the gradient of the last state, in sorted order; zeros where none comes."""
        if upstream_BH is None:
            return like.new_zeros(self.batch, like.shape[-1])
        return upstream_BH.clone(memory_format=torch.contiguous_format)

    def grow_gradient(self, t: int, gradient: Tensor, last: Tensor) -> Tensor:
        """The gradient of the state after step t, which may be written to.

        `gradient` comes from step t + 1 and has the rows of the sequences that have that step. For sequences
        that end at step t, rows of `last`, the gradient of the last state, are appended. At the last step
        `gradient` has no rows. t = -1 is the state before the first step.
        """
        return last if t == self.time - 1 else gradient


class PackedLayout(Layout):
    """The layout of sequences of different lengths: [N, 1, X], one step after the other. A step has a row for
    each sequence that has this step, the longest sequence first.
    """

    is_packed = True

    def __init__(self, time: int, lengths_B: Tensor) -> None:
        batch, device = len(lengths_B), lengths_B.device
        sorted_lengths_B, self.sorted_indices = lengths_B.clamp(0, time).sort(descending=True, stable=True)
        self.unsorted_indices = self.sorted_indices.argsort()
        row_B = torch.arange(batch, device=device)
        self.is_sorted = bool((self.sorted_indices == row_B).all())
        exists_TB = torch.arange(time, device=device)[:, None] < sorted_lengths_B
        self.batch_sizes = [size for size in exists_TB.sum(1).tolist() if size]
        super().__init__(len(self.batch_sizes), batch)
        self.max_rows, self.padded_time = max(self.batch_sizes, default=1), time
        self.step_N, row_N = exists_TB.nonzero(as_tuple=True)
        self.sequence_N = self.sorted_indices[row_N]
        self.offsets = list(accumulate(self.batch_sizes, initial=0))
        self.padded_row_N = self.step_N * batch + self.sequence_N
        # Memory of states holds those before the first step, [B], then those after each step.
        state_offset_T = torch.tensor([0, *(batch + offset for offset in self.offsets)], device=device)
        self.state_before_N = state_offset_T[self.step_N] + row_N
        self.last_state_B = self.unsort(state_offset_T[sorted_lengths_B] + row_B)

    @property
    def step_offsets(self) -> list[int]:
        return self.offsets

    @property
    def padded_rows(self) -> Tensor | None:
        return self.padded_row_N

    def block_slice(self, steps: range) -> slice:
        return slice(self.offsets[steps.start], self.offsets[steps.stop])

    def pack(self, x_TBX: Tensor) -> Tensor:
        return x_TBX.flatten(0, 1).index_select(0, self.padded_row_N)[:, None]

    def unpack(self, packed: Tensor) -> Tensor:
        x_TBX = packed.new_zeros(self.padded_time, self.batch, packed.shape[-1])
        x_TBX.view(-1, packed.shape[-1]).index_copy_(0, self.padded_row_N, packed[:, 0])
        return x_TBX

    def unbind_steps(self, packed: Tensor, dim: int = 0) -> list[Tensor]:
        return list(torch.split(packed.squeeze(dim + 1), self.batch_sizes, dim))

    def masks_by_step(self, mask: Tensor | None) -> list[Tensor] | None:
        mask = self.sort_mask(mask)
        if mask is None:
            return None
        steps = expand_steps(mask, self.time)
        return [step[..., :size, :] for step, size in zip(steps, self.batch_sizes, strict=False)]

    def sort_mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None or mask.shape[-2] == 1 or self.is_sorted:
            return mask
        return mask.index_select(-2, self.sorted_indices)

    def pack_mask(self, mask_TKBD: Tensor | None) -> Tensor | None:
        if mask_TKBD is None or (len(mask_TKBD) == 1 and mask_TKBD.shape[2] == 1):
            return mask_TKBD
        time, groups, batch, size = mask_TKBD.shape
        step_N = self.step_N if time > 1 else torch.zeros_like(self.step_N)
        sequence_N = self.sequence_N if batch > 1 else torch.zeros_like(self.sequence_N)
        group_K = torch.arange(groups, device=step_N.device) * batch
        row_NK = (step_N * (groups * batch) + sequence_N)[:, None] + group_K
        rows = mask_TKBD.reshape(-1, size).index_select(0, row_NK.flatten())
        return rows.view(len(step_N), groups, 1, size)

    def packed_view(self, memory: Tensor, *, start: bool = False) -> Tensor:
        rows = len(self.step_N) + (self.batch if start else 0)
        return memory.flatten(-3, -2).narrow(-2, 0, rows).unsqueeze(-2)

    def sort(self, state_BH: Tensor) -> Tensor:
        return state_BH if self.is_sorted else state_BH[self.sorted_indices]

    def unsort(self, state_BH: Tensor) -> Tensor:
        return state_BH if self.is_sorted else state_BH[self.unsorted_indices]

    def allocate_states(self, start_BH: Tensor) -> Tensor:
        states = start_BH.new_empty(self.batch + len(self.step_N), 1, start_BH.shape[1])
        states[: self.batch, 0] = start_BH
        return states

    def states_before(self, states: Tensor) -> Tensor:
        return states.index_select(0, self.state_before_N)

    def states_after(self, states: Tensor) -> Tensor:
        return states[self.batch :]

    def outputs(self, states: Tensor) -> Tensor:
        return self.unpack(self.states_after(states))

    def last_state(self, states: Tensor) -> Tensor:
        return states[:, 0].index_select(0, self.last_state_B)

    def active_rows(self, t: int, state: Tensor) -> Tensor:
        return state[: self.batch_sizes[t]]

    def last_gradient(self, upstream_BH: Tensor | None, like: Tensor) -> Tensor:
        return self.sort(super().last_gradient(upstream_BH, like))

    def grow_gradient(self, t: int, gradient: Tensor, last: Tensor) -> Tensor:
        size = self.batch_sizes[t] if t >= 0 else self.batch
        return gradient if len(gradient) == size else torch.cat([gradient, last[len(gradient) : size]])


def layout_for(x_TBD: Tensor, lengths: Tensor | None) -> Layout:
    """The layout of a batch.

    It reads the lengths, so it waits for a GPU, and torch.compile breaks its graph here.
    """
    time, batch, _ = x_TBD.shape
    if lengths is None or bool((lengths >= time).all()):
        return Layout(time, batch)
    return PackedLayout(time, lengths)
