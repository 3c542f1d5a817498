"""Where the steps of sequences of different lengths lie."""

import pytest
import torch

from vdrop_cli.kernels.layout import Layout, Packed

TIME, LENGTHS = 6, torch.tensor([2, 5, 0, 3])  # the sixth step is nobody's


def test_sequences_of_one_length_stay_as_they_are() -> None:
    x = torch.randn(3, 2, 1)
    for lengths in (None, torch.tensor([3, 3])):
        layout = Layout.of(x, lengths)
        assert type(layout) is Layout and layout.pack(x) is x and layout.unpack(x) is x
    assert type(Layout.of(x, torch.tensor([3, 2]))) is Packed


def test_packing_keeps_what_is_there_and_nothing_else() -> None:
    """[T, B] holds 10·t + b; each step has its sequences, the longest first."""
    x = (10 * torch.arange(TIME)[:, None] + torch.arange(4))[..., None].float()
    layout = Layout.of(x, LENGTHS)
    packed = layout.pack(x)
    assert [step.flatten().tolist() for step in layout.each(packed)] == [
        [1, 3, 0],
        [11, 13, 10],
        [21, 23],
        [31],
        [41],
    ]
    there = torch.arange(TIME)[:, None] < LENGTHS
    assert torch.equal(layout.unpack(packed), x * there[..., None])
    assert layout.blocks(6) == [range(0, 2), range(2, 4), range(4, 5)]
    assert [packed[layout.part(steps)].flatten().tolist() for steps in layout.blocks(6)] == [
        [1, 3, 0, 11, 13, 10],
        [21, 23, 31],
        [41],
    ]


def test_states_follow_their_sequences() -> None:
    """A state that counts the steps: before, after and at the end of each sequence."""
    layout, start = Packed(TIME, LENGTHS), 100 * torch.arange(4)[:, None].float()
    state = layout.sort(start)
    assert torch.equal(layout.unsort(state), start)
    states = layout.states(state)
    for t, after in enumerate(layout.each(layout.after(states))):
        state = layout.go_on(t, state)
        state = after.copy_(state + 1)
    assert torch.equal(layout.before(states), layout.after(states) - 1)
    assert layout.last(states).flatten().tolist() == [2, 105, 200, 303]
    assert torch.equal(layout.outputs(states)[:, 1].flatten(), torch.tensor([101.0, 102, 103, 104, 105, 0]))


def test_a_gradient_comes_in_where_its_sequence_ends() -> None:
    """One that every step multiplies by ten: 10^length times what came from upstream."""
    layout = Packed(TIME, LENGTHS)
    end = layout.end_gradient(torch.arange(1.0, 5.0)[:, None], torch.empty(0, 1, 1))
    gradient = end[:0]
    for t in reversed(range(layout.time)):
        gradient = 10 * layout.go_back(t, gradient, end)
    gradient = layout.unsort(layout.go_back(-1, gradient, end))
    assert gradient.flatten().tolist() == [1e2, 2e5, 3, 4e3]


@pytest.mark.parametrize("time", [1, TIME])
@pytest.mark.parametrize("batch", [1, 4])
def test_masks_go_with_their_sequences(time: int, batch: int) -> None:
    """Fixed or not, of each sequence or of all: those of each step, and one for all steps."""
    mask = torch.rand(time, 2, batch, 3)
    layout, full = Packed(TIME, LENGTHS), mask.expand(TIME, -1, 4, -1)
    order = [1, 3, 0]
    steps = layout.masks(mask)
    assert steps is not None and len(steps) == 5
    for t, step in enumerate(steps):
        there = [b for b in order if t < LENGTHS[b]]
        assert torch.equal(step.expand(-1, len(there), -1), full[t][:, there])
    of_all = layout.mask_of_all(mask)
    assert of_all is not None
    expected = [full[t, :, b] for t in range(TIME) for b in order if t < LENGTHS[b]]
    assert torch.equal(of_all.expand(len(expected), -1, -1, -1)[:, :, 0], torch.stack(expected))
