"""`LSTMCell` and `GRUCell`: single steps with the interface of `torch.nn` and masks held over a sequence.

They are for loops that a layer cannot express: decoders with attention, beam search, streams. They use plain
operations of torch, so second derivatives, `torch.func`, export and trace work.

B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdrop_cli.dropout import GATES, MaskShape, ModelMasks, new_masks, no_masks
from vdrop_cli.gru_variant import GRUVariant
from vdrop_cli.kernels import Masks
from vdrop_cli.kernels.contexts import in_forward_mode, in_transform
from vdrop_cli.kernels.reference import masked
from vdrop_cli.layer_dropout import DropoutModule, check_policy, chosen_dropout, describe, weight_like
from vdrop_cli.mask_checks import check_cell_masks, check_type
from vdrop_cli.policies import Cell, Dropout
from vdrop_cli.state_layout import shape_text


class RecurrentCell(DropoutModule):
    """One step of a recurrent network, with the arguments, weights and results of `torch.nn`'s cells.

    `masks(batch)` draws masks once for a sequence; pass them to every step: `cell(x, hx, masks=masks)`. Masks
    multiply what enters the matrix products, never the carried state. The mask of `p_c` is the exception: it
    multiplies the new cell state, and the hidden state is then divided by 1 - p_c. In training mode, a cell
    with dropout raises ValueError for a step without masks, since new masks at every step would be another
    method. In evaluation mode, a step without masks uses their means.

    `variational=p` drops from the input and the recurrence, `recurrent_dropout=p` from the recurrence alone.
    The output of a cell is its state, so `p_out` is not possible; use `LockedDropout` on the output. Raises
    ValueError for sizes and probabilities that are not possible, and for policies that resample masks at
    every step.
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
        self.input_size, self.hidden_size = input_size, hidden_size
        self.bias = bias
        if dropout is not None:
            self.check_dropout(dropout)
        self.dropout = chosen_dropout(dropout, variational, recurrent_dropout, 1, output=False)
        rows = GATES[self.cell] * hidden_size
        shapes = {
            "weight_ih": (rows, input_size),
            "weight_hh": (rows, hidden_size),
            "bias_ih": (rows,),
            "bias_hh": (rows,),
        }
        for name, shape in shapes.items():
            exists = bias or name.startswith("weight")
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if exists else None
            )
        self.reset_parameters()

    def check_dropout(self, dropout: Dropout) -> None:
        """Raises TypeError or ValueError for a policy that a cell cannot apply."""
        check_policy(dropout, self.cell, 1)
        if dropout.p_weight > 0:
            raise ValueError(
                f"p_weight must be 0 in a cell, got {dropout.p_weight}: its weights would be dropped anew at "
                "every step; use a layer"
            )
        if dropout.p_out > 0:
            raise ValueError(
                f"p_out must be 0 in a cell, whose output is its state, got {dropout.p_out}; use "
                "LockedDropout on the output"
            )
        if dropout.one_state_mask:
            raise ValueError(
                "one_state_mask must be False in a cell, whose output is its state; multiply the output by "
                "masks.layers[0].h"
            )
        if dropout.new_each_step:
            raise ValueError(
                "new_each_step must be empty in a cell, whose masks are held over the sequence, got "
                f"{', '.join(dropout.new_each_step)}"
            )
        if dropout.new_every_step and dropout.drops:
            raise ValueError(
                "policy must be variational or moon in a cell, whose masks are held over the sequence, got "
                f"{dropout.policy}"
            )

    def reset_parameters(self) -> None:
        """Initialises weights uniformly in ±1/√H, with the random numbers of torch's cells."""
        limit = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -limit, limit)

    def masks(self, batch: int, device: torch.device | str | None = None) -> ModelMasks:
        """Draws masks for `batch` sequences in training mode; in evaluation mode returns their means.

        They fit any number of steps.
        """
        dropout = self.dropout  # an error, in either mode, where another module took the place of `sampling`
        if not self.sampling.training:
            return no_masks(1)
        like = weight_like(self, "weight_ih")
        device = torch.device(device or like.device)
        return new_masks(dropout, self.mask_shape(batch), device, like.dtype)

    def mask_shape(self, batch: int) -> MaskShape:
        """Returns the sizes of the masks for `batch` sequences."""
        return MaskShape(1, batch, (self.input_size,), self.hidden_size, GATES[self.cell])

    def chosen_masks(self, masks: ModelMasks | None, batch: int) -> Masks:
        """Returns the masks of a step, as `step_masks` shapes them; raises where `masks` do not fit."""
        if masks is None:
            dropout = self.dropout  # as in `masks`
            if self.sampling.training and dropout.drops:
                raise ValueError(
                    "masks are required in training mode: masks = cell.masks(batch) once for a sequence, "
                    "then masks=masks"
                )
            return Masks()
        check_type(masks, "cell.masks(batch)")
        if torch.compiler.is_compiling():  # the checks become guards of the compiled code
            check_cell_masks(masks, self.cell, self.mask_shape(batch))
            return step_masks(masks.layers[0])
        # All steps of a sequence get the same masks, so the first step stores the checked and shaped masks
        # in them. Tensors from inside a transform of torch.func, or with gradients, are not stored: they are
        # valid in that step alone.
        sizes = (self.cell, batch, self.input_size, self.hidden_size)
        needs_grad = any(mask is not None and mask.requires_grad for mask in masks.layers[0])
        cached = masks.checked_masks
        if needs_grad or cached is None or cached[0] is not masks.layers[0] or cached[1] != sizes:
            check_cell_masks(masks, self.cell, self.mask_shape(batch))
            cached = (masks.layers[0], sizes, step_masks(masks.layers[0]))
            if not in_transform() and not needs_grad:
                object.__setattr__(masks, "checked_masks", cached)
        return cached[2]

    def prepare(self, x: Tensor, hx: Any, states: int) -> tuple[Tensor, Any, bool]:
        """Returns input and states with a batch dimension, and whether the input had one.

        `states` is the number of tensors in the state, `hx` the state or None for zeros. Raises ValueError
        for shapes that do not fit.
        """
        batched = x.dim() == 2
        x_BD = x if batched else x[None]
        if x_BD.dim() != 2 or x_BD.shape[1] != self.input_size:
            raise ValueError(
                f"input must be [B, {self.input_size}] or [{self.input_size}], got {list(x.shape)}"
            )
        if hx is None:
            dtype = weight_like(self, "weight_ih").dtype
            return x_BD, [x.new_zeros(len(x_BD), self.hidden_size, dtype=dtype)] * states, batched
        parts = hx if isinstance(hx, tuple | list) else (hx,)
        if not batched:
            parts = tuple(part[None] if isinstance(part, Tensor) else part for part in parts)
        shape = (len(x_BD), self.hidden_size)
        if len(parts) != states or any(not isinstance(part, Tensor) or part.shape != shape for part in parts):
            names = "(h, c), each" if states == 2 else "h,"
            raise ValueError(
                f"the state must be {names} {list(shape)}, got {', '.join(map(shape_text, parts))}"
            )
        return x_BD, parts, batched

    def product(self, value: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns `W (m ∘ value) + b` of all gates, [B, G·H]."""
        if is_tied(mask):
            return F.linear(masked(value, mask), weight, bias)
        assert mask is not None
        masked_GBD = value * mask
        products_GBH = torch.bmm(masked_GBD, weight.view(len(masked_GBD), -1, weight.shape[1]).mT)
        joined = products_GBH.transpose(0, 1).flatten(1)
        return joined if bias is None else joined + bias

    def extra_repr(self) -> str:
        bias = "" if self.bias else ", bias=False"
        return f"{self.input_size}, {self.hidden_size}{bias}, dropout={describe(self.dropout)}"


def step_masks(masks: Masks) -> Masks:
    """Removes the time dimension, which is 1.

    Masks of x and h become [1 or B, size] where all gates share them, and [G, 1 or B, size] otherwise.
    """
    x, h = (
        None if mask is None else mask[0, 0] if mask.shape[1] == 1 else mask[0] for mask in (masks.x, masks.h)
    )
    return Masks(x, h, None if masks.c is None else masks.c[0])


def is_tied(mask: Tensor | None) -> bool:
    """Whether all gates share one mask in a step, or have no mask."""
    return mask is None or mask.dim() == 2


class LSTMCell(RecurrentCell):
    """One step of an LSTM: from x [B, D] and (h, c), each [B, H], to the new (h, c)."""

    cell = Cell.lstm

    def forward(
        self, input: Tensor, hx: Any = None, *, masks: ModelMasks | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the new (h, c) after one step, as `torch.nn.LSTMCell` does.

        `input` is [B, D] and `hx` (h, c), each [B, H]; without a batch [D] and [H]. Without `hx` both are
        zeros. `masks` come from `masks(B)`. In training mode a cell with dropout requires them; in evaluation
        mode without masks, their means are used. Raises ValueError for shapes and masks that do not fit, and
        for masks that are required and missing, TypeError for masks that are not `ModelMasks`.
        """
        x_BD, (h_BH, c_BH), batched = self.prepare(input, hx, 2)
        mask = self.chosen_masks(masks, len(x_BD))
        if (
            is_tied(mask.x)
            and is_tied(mask.h)
            and mask.c is None
            and not (in_transform() or in_forward_mode())
        ):
            # h enters the step only through its matrix products, so torch.lstm_cell can take the masked h.
            # torch.lstm_cell has no rules for torch.func, and on CUDA none for forward-mode derivatives.
            h_BH, c_BH = torch.lstm_cell(
                masked(x_BD, mask.x),
                (masked(h_BH, mask.h), c_BH),
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
        if masks is not None and masks.cell_scales is not None:
            h_BH = h_BH * masks.cell_scales[0]
        return (h_BH, c_BH) if batched else (h_BH[0], c_BH[0])


class GRUCell(GRUVariant, RecurrentCell):
    """One step of a GRU: from x [B, D] and h [B, H] to the new h.

    `reset_after=True` has the equations of `torch.nn.GRUCell`, see `layers.GRU`.
    """

    cell = Cell.gru

    def forward(self, input: Tensor, hx: Any = None, *, masks: ModelMasks | None = None) -> Tensor:
        """Returns the new h after one step, as `torch.nn.GRUCell` does.

        `input` is [B, D] and `hx` [B, H]; without a batch [D] and [H]. Without `hx` it is zeros. `masks` and
        errors are those of `LSTMCell.forward`.
        """
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
                masked_h = masked(h_BH, mask.h)
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
