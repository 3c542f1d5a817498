"""The gates of a layer, all steps of them in one tensor, and the products over all steps at once: before the
loop over time and after it.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)  K groups of gates: 1, or each
for itself N tokens
"""

import torch
from torch import Tensor

from vdrop_cli.kernels.layout import Layout
from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.products import Weights, WeightsByGate, mm_into


def differs_by_gate(mask: Tensor | None) -> bool:
    return mask is not None and mask.shape[1] > 1


def some_gates(mask_TGBH: Tensor | None, part: slice) -> Tensor | None:
    """The mask of some gates, of one that differs by gate or not."""
    return mask_TGBH[:, part] if mask_TGBH is not None and differs_by_gate(mask_TGBH) else mask_TGBH


def lower(tensor: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`tensor ∘ mask`, rounded to the type that is multiplied in."""
    return (tensor if mask is None else tensor * mask).to(dtype)


class Gates:
    """One tensor of all gates and steps, laid out so that each product reads and writes its part in one go.

    Time first ([T, B, G·H]) when no mask differs by gate; gate first ([G, T, B, H]) when one does. Of packed
    sequences (`layout.py`) every row stands for a step of a batch of one.
    """

    def __init__(self, memory: Tensor, gates: int) -> None:
        self.memory, self.gates, self.by_gate = memory, gates, memory.dim() == 4
        self.time, self.batch, self.hidden = (
            memory.shape[-3],
            memory.shape[-2],
            memory.shape[-1] // (1 if self.by_gate else gates),
        )
        self.view_GTBH = (
            memory
            if self.by_gate
            else memory.view(self.time, self.batch, gates, self.hidden).permute(2, 0, 1, 3)
        )

    @classmethod
    def of(cls, x_TBD: Tensor, hidden: int, gates: int, masks: Masks) -> "Gates":
        (time, batch, _), by_gate = x_TBD.shape, differs_by_gate(masks.x) or differs_by_gate(masks.h)
        return cls(
            x_TBD.new_empty((gates, time, batch, hidden) if by_gate else (time, batch, gates * hidden)), gates
        )

    def another(self, dtype: torch.dtype | None = None) -> "Gates":
        """Of the same layout, for the gradients."""
        return Gates(torch.empty_like(self.memory, dtype=dtype), self.gates)

    def rows(self, part: slice) -> slice:
        """The rows of a weight matrix that belong to some gates."""
        return slice(part.start * self.hidden, part.stop * self.hidden)

    def weights(self, w_hh: Tensor, rows: int, *, transposed: bool = False) -> Weights | WeightsByGate:
        """Of some gates, to be multiplied with about `rows` rows of what enters them at each step;
        transposed, of their gradients.
        """
        w = w_hh.view(-1, self.hidden, self.hidden) if self.by_gate else w_hh
        w = w.mT if transposed else w
        return WeightsByGate(w, rows) if self.by_gate else Weights(w, rows)

    def groups(self, part: slice) -> list[slice]:
        """How the gates of `part` are grouped into products: all together, or one by one."""
        return [slice(g, g + 1) for g in range(part.start, part.stop)] if self.by_gate else [part]

    def matrix(self, group: slice) -> Tensor:
        """Gates of every step as a matrix, [T·B, gates·H]."""
        return (
            self.memory[group.start].flatten(0, 1)
            if self.by_gate
            else self.memory.flatten(0, 1)[:, self.rows(group)]
        )

    def steps(self, part: slice, layout: Layout | None = None) -> list[Tensor]:
        """Gates of each step, [gates, B, H] where each is multiplied for itself, else [B, gates·H]; packed:
        of those that have it.
        """
        layout = layout or Layout(self.time, self.batch)
        return (
            layout.each(self.memory[part], 1)
            if self.by_gate
            else layout.each(self.memory[..., self.rows(part)])
        )


def masked_inputs(
    gates: Gates, part: slice, x_TBD: Tensor, dtype: torch.dtype, mask: Tensor | None
) -> list[Tensor]:
    """What enters the products of each group of the gates of `part`, at all steps, [T·B, D]."""
    masks_TKBD = [some_gates(mask, group) for group in gates.groups(part)]
    return [lower(x_TBD, None if m is None else m[:, 0], dtype).flatten(0, 1) for m in masks_TKBD]


def project_inputs(
    gates: Gates, x_TBD: Tensor, w_ih: Tensor, bias: Tensor | None, mask_x: Tensor | None
) -> list[Tensor]:
    """Fills the gates with `W (m_x ∘ x) + b` for all steps at once; returns the masked inputs of each group,
    [T·B, D].
    """
    every = slice(0, gates.gates)
    inputs_ND = masked_inputs(gates, every, x_TBD, w_ih.dtype, mask_x)
    for group, input_ND in zip(gates.groups(every), inputs_ND, strict=True):
        mm_into(gates.matrix(group), input_ND, w_ih[gates.rows(group)].T)
    if bias is not None:
        gates.view_GTBH.add_(bias.view(gates.gates, 1, 1, -1))
    return inputs_ND


def input_gradient(low: Gates, w_ih: Tensor, mask_x: Tensor | None, dtype: torch.dtype) -> Tensor:
    """That of the layer's input, [T, B, D]."""
    dx_TBD: Tensor | None = None
    for group in low.groups(slice(0, low.gates)):
        through_TBD = (
            (low.matrix(group) @ w_ih[low.rows(group)]).view(low.time, low.batch, w_ih.shape[1]).to(dtype)
        )
        mask = some_gates(mask_x, group)
        if mask is not None:
            through_TBD.mul_(mask[:, 0])
        dx_TBD = through_TBD if dx_TBD is None else dx_TBD.add_(through_TBD)
    assert dx_TBD is not None
    return dx_TBD


def weight_gradient(low: Gates, part: slice, inputs_ND: list[Tensor], dw: Tensor) -> None:
    """Writes the gradient of the weights that multiplied the inputs of each group, summed over all steps, in
    one product.
    """
    for group, input_ND in zip(low.groups(part), inputs_ND, strict=True):
        mm_into(dw[low.rows(group)], low.matrix(group).T, input_ND)


def sum_over_steps(da: Gates, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient of the biases, [G·H], summed in `dtype` (None: that of `da`)."""
    return (
        da.view_GTBH.sum((1, 2), dtype=dtype).flatten()
        if da.by_gate
        else da.memory.flatten(0, 1).sum(0, dtype=dtype)
    )
