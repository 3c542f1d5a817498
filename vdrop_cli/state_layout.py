"""Where the states of all layers are in the tensors h and c of a stack of layers.

B batch  H hidden size  P size of the hidden state (H, or that of a projection)  L layers
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = tuple[Tensor, ...]  # h and, for an LSTM, c; each [L, B, H]


def shape_text(part: object) -> str:
    """Describes a tensor by its shape, and anything else by its type, for a message."""
    return str(list(part.shape)) if isinstance(part, Tensor) else type(part).__name__


@dataclass(frozen=True)
class StateLayout:
    """The sizes of the states of all layers, and their order.

    h and c are [L · directions, B, size], as those of torch. Where the sizes of the layers differ, they are
    joined in the last dimension: [directions, B, sum of the sizes].
    """

    hidden_sizes: tuple[int, ...]  # H of each layer
    directions: int
    projected_size: int  # P of an LSTM with projections; 0: H
    states: int  # 2 for an LSTM, which has h and c, 1 for a GRU

    @property
    def has_equal_sizes(self) -> bool:
        return len(set(self.hidden_sizes)) == 1

    def state_size(self, layer: int) -> int:
        """The size P of the hidden state h of a layer."""
        return self.projected_size or self.hidden_sizes[layer]

    def shapes(self, batch: int) -> list[list[int]]:
        """The shapes of the states of all layers, of h and for an LSTM of c."""
        if not self.has_equal_sizes:
            return [[self.directions, batch, sum(self.hidden_sizes)]] * self.states
        sizes = (self.state_size(0), self.hidden_sizes[0])[: self.states]
        return [[len(self.hidden_sizes) * self.directions, batch, size] for size in sizes]

    def layer_part(self, states: State, layer: int) -> State:
        """Returns the part of the states of all layers that belongs to one, each [directions, B, …]."""
        if self.has_equal_sizes:
            rows = slice(layer * self.directions, (layer + 1) * self.directions)
            return tuple(part[rows] for part in states)
        return tuple(torch.split(part, list(self.hidden_sizes), -1)[layer] for part in states)

    def join(self, states: Sequence[State]) -> State:
        """Joins the states of all layers and directions, [B, …] each, to those of `shapes`."""
        if self.has_equal_sizes:
            return tuple(torch.stack(part) for part in zip(*states, strict=True))
        rows = range(0, len(states), self.directions)
        layers = [
            [torch.stack(part) for part in zip(*states[row : row + self.directions], strict=True)]
            for row in rows
        ]
        return tuple(torch.cat(part, -1) for part in zip(*layers, strict=True))

    def zeros(self, batch: int, like: Tensor) -> State:
        """Returns zero states of the type and device of `like`."""
        return tuple(like.new_zeros(shape) for shape in self.shapes(batch))

    def initial(self, hx: Any, batch: int, batched: bool, like: Tensor) -> State:
        """Returns the states `hx` as a tuple, with a batch dimension; zeros without any.

        Raises TypeError for what is no tensor, ValueError for shapes that do not fit.
        """
        if hx is None:
            return self.zeros(batch, like)
        parts: State = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"the state must be tensors, got {', '.join(map(shape_text, parts))}")
        if not batched:
            parts = tuple(part.unsqueeze(1) if part.dim() == 2 else part for part in parts)
        expected, shapes = self.shapes(batch), [list(part.shape) for part in parts]
        if shapes != expected:
            if self.states == 1:
                names = f"h, {expected[0]}"
            elif expected[0] == expected[1]:
                names = f"(h, c), each {expected[0]}"
            else:
                names = f"(h, c), {expected[0]} and {expected[1]}"
            raise ValueError(f"the state must be {names}, got {', '.join(map(str, shapes))}")
        return parts
