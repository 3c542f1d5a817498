"""Where the steps of sequences of different lengths lie."""

import pytest
import torch

from vdrop_cli.kernels.rows import Packed, Rows

TIME, LENGTHS = 5, torch.tensor([2, 5, 0, 3])


def test_sequences_of_one_length_stay_as_they_are() -> None:
    x = torch.randn(3, 2, 1)
    for lengths in (None, torch.tensor([3, 3])):
        rows = Rows.of(x, lengths)
        assert type(rows) is Rows and rows.pack(x) is x and rows.unpack(x) is x
    assert type(Rows.of(x, torch.tensor([3, 2]))) is Packed


def test_packing_keeps_what_is_there_and_nothing_else() -> None:
    """[T, B] holds 10·t + b; each step has its sequences, the longest first."""
    x = (10 * torch.arange(TIME)[:, None] + torch.arange(4))[..., None].float()
    rows = Rows.of(x, LENGTHS)
    packed = rows.pack(x)
    assert [step.flatten().tolist() for step in rows.each(packed)] == [[1, 3, 0], [11, 13, 10], [21, 23], [31], [41]]
    there = torch.arange(TIME)[:, None] < LENGTHS
    assert torch.equal(rows.unpack(packed), x * there[..., None])
    assert [steps for steps in rows.blocks(6)] == [range(0, 2), range(2, 4), range(4, 5)]
    assert [packed[rows.part(steps)].flatten().tolist() for steps in rows.blocks(6)] == [[1, 3, 0, 11, 13, 10], [21, 23, 31], [41]]


def test_states_follow_their_sequences() -> None:
    """A state that counts the steps: before, after and at the end of each sequence."""
    rows, start = Packed(TIME, LENGTHS), 100 * torch.arange(4)[:, None].float()
    state = rows.start(start)
    assert torch.equal(rows.end(state), start)
    states = rows.states(state)
    for t, after in enumerate(rows.each(rows.after(states))):
        state = rows.on(t, state)
        state = after.copy_(state + 1)
    assert torch.equal(rows.before(states), rows.after(states) - 1)
    assert rows.last(states).flatten().tolist() == [2, 105, 200, 303]
    assert torch.equal(rows.outputs(states)[:, 1].flatten(), torch.arange(101.0, 106.0))


def test_a_gradient_comes_in_where_its_sequence_ends() -> None:
    """One that every step multiplies by ten: 10^length times what came from upstream."""
    rows = Packed(TIME, LENGTHS)
    end = rows.end_gradient(torch.arange(1.0, 5.0)[:, None], torch.empty(0, 1, 1))
    gradient = rows.on(-1, end)
    for t in reversed(range(rows.time)):
        gradient = 10 * rows.back(t, gradient, end)
    gradient = rows.end(rows.back(-1, gradient, end))
    assert gradient.flatten().tolist() == [1e2, 2e5, 3, 4e3]


@pytest.mark.parametrize("time", [1, TIME])
@pytest.mark.parametrize("batch", [1, 4])
def test_masks_go_with_their_sequences(time: int, batch: int) -> None:
    """Fixed or not, of each sequence or of all: those of each step, and one for all rows."""
    mask = torch.rand(time, 2, batch, 3)
    rows, full = Packed(TIME, LENGTHS), mask.expand(TIME, -1, 4, -1)
    order = [1, 3, 0]
    steps = rows.masks(mask)
    assert steps is not None
    for t, step in enumerate(steps):
        there = [b for b in order if t < LENGTHS[b]]
        assert torch.equal(step.expand(-1, len(there), -1), full[t][:, there])
    of_all = rows.mask_of_all(mask)
    assert of_all is not None
    expected = [full[t, :, b] for t in range(TIME) for b in order if t < LENGTHS[b]]
    assert torch.equal(of_all.expand(len(expected), -1, -1, -1)[:, :, 0], torch.stack(expected))
