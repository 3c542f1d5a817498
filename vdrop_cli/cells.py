"""`LSTMCell` and `GRUCell`: single steps, as `torch.nn`'s, with masks that are held over a sequence.

They are for loops that a layer cannot express: decoders with attention, beam search, streams. Plain
operations of torch, so that second derivatives, `torch.func`, export and trace work.

B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdrop_cli.dropout import GATES, MaskShape, ModelMasks, mean_masks, new_masks
from vdrop_cli.kernels import Masks
from vdrop_cli.kernels.derivatives import in_transform
from vdrop_cli.kernels.masks import check_sizes
from vdrop_cli.layers import MaskSampling, check_policy, chosen_dropout, describe, shape_of, weight_like
from vdrop_cli.policies import Cell, Dropout


class RecurrentCell(nn.Module):
    """One step of a recurrent network. Arguments, weights and results are those of `torch.nn.LSTMCell` and
    `GRUCell`.

    Masks are drawn once for a sequence, by `masks(batch)`, and given at every step: `cell(x, hx,
    masks=masks)`. They multiply what enters the products, never the state that is carried (but for `p_c`,
    which is on the new cell state). In training mode, a cell that drops anything refuses a step without
    masks, since masks drawn at every step would be another method. In evaluation mode the means of the masks
    are used where none are given. `variational=p` drops from the input and the recurrence,
    `recurrent_dropout=p` from the recurrence alone; the output of a cell is its state, so that `p_out` is for
    `LockedDropout`.
    """

    cell: ClassVar[Cell]
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        dropout: Dropout | None = None,
        variational: float | None = None,
        recurrent_dropout: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        if dropout is not None:
            check_policy(dropout, self.cell, 1)
        chosen = chosen_dropout(dropout, variational, recurrent_dropout, 1, output=False)
        if chosen.p_out > 0:
            raise ValueError(
                f"p_out must be 0 in a cell, whose output is its state, got {chosen.p_out}; use "
                "LockedDropout on the output"
            )
        if chosen.new_every_step and chosen.drops:
            raise ValueError(
                "policy must be variational or moon in a cell, whose masks are held over the sequence, got "
                f"{chosen.policy}"
            )
        self.sampling = MaskSampling(chosen)
        rows = GATES[self.cell] * hidden_size
        shapes = {
            "weight_ih": (rows, input_size),
            "weight_hh": (rows, hidden_size),
            "bias_ih": (rows,),
            "bias_hh": (rows,),
        }
        for name, shape in shapes.items():
            here = bias or name.startswith("weight")
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if here else None
            )
        self.reset_parameters()

    @property
    def dropout(self) -> Dropout:
        return self.sampling.dropout

    def reset_parameters(self) -> None:
        """Uniform in ±1/√H, as torch's, and with the same random numbers."""
        limit = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -limit, limit)

    def masks(self, batch: int, device: torch.device | str | None = None) -> ModelMasks:
        """Masks of `batch` sequences: new ones in training mode, their means in evaluation mode. They hold
        for any number of steps.
        """
        like = weight_like(self, "weight_ih")
        if not self.sampling.training:
            return mean_masks(self.dropout, 1, like)
        shape = MaskShape(1, batch, (self.input_size,), self.hidden_size, GATES[self.cell])
        return new_masks(self.dropout, shape, torch.device(device or like.device), like.dtype)

    def chosen_masks(self, masks: ModelMasks | None, batch: int) -> Masks:
        """Those that are given, if they fit, or those of evaluation, as `step_masks` shapes them."""
        if masks is None:
            if self.sampling.training and self.dropout.drops:
                raise ValueError(
                    "masks must be given in training mode: masks = cell.masks(batch) once for a sequence, "
                    "then masks=masks"
                )
            return step_masks(mean_masks(self.dropout, 1, weight_like(self, "weight_ih")).layers[0])
        if not isinstance(masks, ModelMasks):
            raise TypeError(f"masks must be those of cell.masks(batch), got {type(masks).__name__}")
        if torch.compiler.is_compiling():  # which keeps what it has checked as guards
            self.check_masks(masks, batch)
            return step_masks(masks.layers[0])
        # The masks are the same at every step, so they store what the first one has checked and shaped. What
        # is computed within a
        # transform of torch.func, or is part of a graph of gradients, belongs to that step alone.
        sizes = (self.cell, batch, self.input_size, self.hidden_size)
        known = masks.checked_masks
        if known is None or known[0] is not masks.layers[0] or known[1] != sizes:
            self.check_masks(masks, batch)
            known = (masks.layers[0], sizes, step_masks(masks.layers[0]))
            if not in_transform() and not any(
                mask is not None and mask.requires_grad for mask in masks.layers[0]
            ):
                object.__setattr__(masks, "checked_masks", known)
        return known[2]

    def check_masks(self, masks: ModelMasks, batch: int) -> None:
        """Raises ValueError where they are not for steps of this cell with so many sequences."""
        if len(masks.layers) != 1 or masks.batch not in (None, batch) or masks.time not in (None, 1):
            raise ValueError(
                f"masks must be of one layer and {batch} sequences, held over time; use cell.masks({batch})"
            )
        if masks.word is not None or masks.out is not None:
            raise ValueError(
                "masks.word and masks.out must be None: a cell uses neither; use WordDropout and "
                "LockedDropout"
            )
        if masks.layers[0].c is not None and self.cell is Cell.gru:
            raise ValueError("masks.c must be None: a GRU has no cell state")
        check_sizes(
            masks.layers[0], 1, GATES[self.cell], batch, self.input_size, self.hidden_size, self.hidden_size
        )

    def prepare(self, x: Tensor, hx: Any, states: int) -> tuple[Tensor, Any, bool]:
        """Input and states with a batch, and whether they came with one."""
        batched = x.dim() == 2
        x_BD = x if batched else x[None]
        if x_BD.dim() != 2 or x_BD.shape[1] != self.input_size:
            raise ValueError(
                f"input must be [B, {self.input_size}] or [{self.input_size}], got {list(x.shape)}"
            )
        if hx is None:
            return (
                x_BD,
                [x.new_zeros(len(x_BD), self.hidden_size, dtype=weight_like(self, "weight_ih").dtype)]
                * states,
                batched,
            )
        parts = hx if isinstance(hx, tuple | list) else (hx,)
        if not batched:
            parts = tuple(part[None] if isinstance(part, Tensor) else part for part in parts)
        shape = (len(x_BD), self.hidden_size)
        if len(parts) != states or any(not isinstance(part, Tensor) or part.shape != shape for part in parts):
            names = "(h, c), each" if states == 2 else "h,"
            raise ValueError(
                f"the state must be {names} {list(shape)}, got {', '.join(map(shape_of, parts))}"
            )
        return x_BD, parts, batched

    def product(self, value: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`W (m ∘ value) + b` of all gates, [B, G·H]."""
        if is_tied(mask):
            return F.linear(under(value, mask), weight, bias)
        assert mask is not None
        masked_GBD = value * mask
        products_GBH = torch.bmm(masked_GBD, weight.view(len(masked_GBD), -1, weight.shape[1]).mT)
        joined = products_GBH.transpose(0, 1).flatten(1)
        return joined if bias is None else joined + bias

    def extra_repr(self) -> str:
        bias = "" if self.bias else ", bias=False"
        return f"{self.input_size}, {self.hidden_size}{bias}, dropout={describe(self.dropout)}"


def step_masks(masks: Masks) -> Masks:
    """Without the dimension of time, which is 1.

    Those of x and h are [1 or B, size] where all gates share a mask, and [G, 1 or B, size] otherwise.
    """
    x, h = (
        None if mask is None else mask[0, 0] if mask.shape[1] == 1 else mask[0] for mask in (masks.x, masks.h)
    )
    return Masks(x, h, None if masks.c is None else masks.c[0])


def is_tied(mask: Tensor | None) -> bool:
    """Whether all gates have the same mask of a step, or none."""
    return mask is None or mask.dim() == 2


def under(value: Tensor, mask: Tensor | None) -> Tensor:
    """`m ∘ value` with a mask that all gates have."""
    return value if mask is None else value * mask


class LSTMCell(RecurrentCell):
    """One step of an LSTM: (h, c), each [B, H], from x [B, D] and (h, c)."""

    cell = Cell.lstm

    def forward(
        self, input: Tensor, hx: Any = None, *, masks: ModelMasks | None = None
    ) -> tuple[Tensor, Tensor]:
        x_BD, (h_BH, c_BH), batched = self.prepare(input, hx, 2)
        mask = self.chosen_masks(masks, len(x_BD))
        if is_tied(mask.x) and is_tied(mask.h) and mask.c is None and not in_transform():
            # h enters the step by its products alone, so that torch's cell may have it masked; it has no
            # rules for torch.func.
            h_BH, c_BH = torch.lstm_cell(
                under(x_BD, mask.x),
                (under(h_BH, mask.h), c_BH),
                self.weight_ih,
                self.weight_hh,
                self.bias_ih,
                self.bias_hh,
            )
        else:
            a = self.product(x_BD, mask.x, self.weight_ih, self.bias_ih) + self.product(
                h_BH, mask.h, self.weight_hh, self.bias_hh
            )
            i, f, g, o = a.chunk(4, 1)
            c_BH = f.sigmoid() * c_BH + i.sigmoid() * g.tanh()
            if mask.c is not None:
                c_BH = c_BH * mask.c
            h_BH = o.sigmoid() * c_BH.tanh()
        return (h_BH, c_BH) if batched else (h_BH[0], c_BH[0])


class GRUCell(RecurrentCell):
    """One step of a GRU: h [B, H] from x [B, D] and h. `reset_after=True` computes what `torch.nn.GRUCell`
    does, see `layers.GRU`.
    """

    cell = Cell.gru

    def __init__(self, *args: Any, reset_after: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reset_after = reset_after

    def forward(self, input: Tensor, hx: Any = None, *, masks: ModelMasks | None = None) -> Tensor:
        x_BD, (h_BH,), batched = self.prepare(input, hx, 1)
        mask = self.chosen_masks(masks, len(x_BD))
        if self.reset_after:
            a_r, a_z, a_n = self.product(x_BD, mask.x, self.weight_ih, self.bias_ih).chunk(3, 1)
            u_r, u_z, u_n = self.product(h_BH, mask.h, self.weight_hh, self.bias_hh).chunk(3, 1)
            r, z = (a_r + u_r).sigmoid(), (a_z + u_z).sigmoid()
            n = torch.addcmul(a_n, r, u_n).tanh()
        else:
            bias = (
                self.bias_ih if self.bias_hh is None or self.bias_ih is None else self.bias_ih + self.bias_hh
            )
            size = self.hidden_size
            sizes = (2 * size, size)
            a_rz, a_n = self.product(x_BD, mask.x, self.weight_ih, bias).split_with_sizes(sizes, 1)
            w_rz, w_n = self.weight_hh.split_with_sizes(sizes)
            if is_tied(mask.h):
                masked_h = under(h_BH, mask.h)
                r, z = torch.addmm(a_rz, masked_h, w_rz.T).sigmoid().split_with_sizes((size, size), 1)
                n = torch.addmm(a_n, r * masked_h, w_n.T).tanh()
            else:
                assert mask.h is not None
                r, z = (a_rz + self.product(h_BH, mask.h[:2], w_rz, None)).sigmoid().chunk(2, 1)
                n = torch.addmm(a_n, r * h_BH * mask.h[2], w_n.T).tanh()
        if n.dtype != h_BH.dtype:  # under autocast, which leaves the state as it is
            n, z = n.to(h_BH.dtype), z.to(h_BH.dtype)
        h_BH = torch.lerp(n, h_BH, z)
        return h_BH if batched else h_BH[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reset_after={self.reset_after}"
