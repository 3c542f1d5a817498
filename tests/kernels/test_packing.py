"""Layouts of sequences of equal and of different lengths."""

import pytest
import torch

from vdrop_cli.kernels.packing import Layout, PackedLayout, layout_for

TIME, LENGTHS = 6, torch.tensor([2, 5, 0, 3])  # no sequence has the sixth step


def test_sequences_of_one_length_stay_as_they_are() -> None:
    x = torch.randn(3, 2, 1)
    for lengths in (None, torch.tensor([3, 3])):
        layout = layout_for(x, lengths)
        assert type(layout) is Layout and layout.pack(x) is x and layout.unpack(x) is x
    assert type(layout_for(x, torch.tensor([3, 2]))) is PackedLayout


def test_packing_removes_padding_alone() -> None:
    """[T, B] holds 10·t + b; each step has its sequences, the longest first."""
    x = (10 * torch.arange(TIME)[:, None] + torch.arange(4))[..., None].float()
    layout = layout_for(x, LENGTHS)
    packed = layout.pack(x)
    assert [step.flatten().tolist() for step in layout.unbind_steps(packed)] == [
        [1, 3, 0],
        [11, 13, 10],
        [21, 23],
        [31],
        [41],
    ]
    exists = torch.arange(TIME)[:, None] < LENGTHS
    assert torch.equal(layout.unpack(packed), x * exists[..., None])
    assert layout.blocks(6) == [range(0, 2), range(2, 4), range(4, 5)]
    assert [packed[layout.block_slice(steps)].flatten().tolist() for steps in layout.blocks(6)] == [
        [1, 3, 0, 11, 13, 10],
        [21, 23, 31],
        [41],
    ]


def test_states_follow_their_sequences() -> None:
    """A state that counts the steps: before, after and at the end of each sequence."""
    layout, start = PackedLayout(TIME, LENGTHS), 100 * torch.arange(4)[:, None].float()
    state = layout.sort(start)
    assert torch.equal(layout.unsort(state), start)
    states = layout.allocate_states(state)
    for t, after in enumerate(layout.unbind_steps(layout.states_after(states))):
        state = layout.active_rows(t, state)
        state = after.copy_(state + 1)
    assert torch.equal(layout.states_before(states), layout.states_after(states) - 1)
    assert layout.last_state(states).flatten().tolist() == [2, 105, 200, 303]
    assert torch.equal(layout.outputs(states)[:, 1].flatten(), torch.tensor([101.0, 102, 103, 104, 105, 0]))


def test_the_gradient_of_a_last_state_enters_at_the_end_of_its_sequence() -> None:
    """One that every step multiplies by ten: 10^length times what came from upstream."""
    layout = PackedLayout(TIME, LENGTHS)
    end = layout.last_gradient(torch.arange(1.0, 5.0)[:, None], torch.empty(0, 1, 1))
    gradient = end[:0]
    for t in reversed(range(layout.time)):
        gradient = 10 * layout.grow_gradient(t, gradient, end)
    gradient = layout.unsort(layout.grow_gradient(-1, gradient, end))
    assert gradient.flatten().tolist() == [1e2, 2e5, 3, 4e3]


@pytest.mark.parametrize("time", [1, TIME])
@pytest.mark.parametrize("batch", [1, 4])
def test_masks_follow_their_sequences(time: int, batch: int) -> None:
    """Fixed or not, of each sequence or of all: those of each step, and one for all steps."""
    mask = torch.rand(time, 2, batch, 3)
    layout, full = PackedLayout(TIME, LENGTHS), mask.expand(TIME, -1, 4, -1)
    order = [1, 3, 0]
    steps = layout.masks_by_step(mask)
    assert steps is not None and len(steps) == 5
    for t, step in enumerate(steps):
        exists = [b for b in order if t < LENGTHS[b]]
        assert torch.equal(step.expand(-1, len(exists), -1), full[t][:, exists])
    packed_mask = layout.pack_mask(mask)
    assert packed_mask is not None
    expected = [full[t, :, b] for t in range(TIME) for b in order if t < LENGTHS[b]]
    assert torch.equal(packed_mask.expand(len(expected), -1, -1, -1)[:, :, 0], torch.stack(expected))
