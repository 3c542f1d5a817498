"""The gates of a layer at all steps in one tensor, and the products over all steps at once.

These products come before the loop over time and after it.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)  N rows of all steps
R size of a row of a gate: H, or in the back end `triton` that of an aligned row, at least H (`alignment.py`)
K groups of gates: 1, or one for each gate
"""

import torch
from torch import Tensor

from vdrop_cli.kernels.alignment import pad_columns
from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.packing import Layout
from vdrop_cli.kernels.products import WeightMatrices, WeightMatrix, mm_into, operand

# Parts of the gates in the order of their rows.
ALL_LSTM = slice(0, 4)
ALL_GRU = slice(0, 3)
R_AND_Z = slice(0, 2)
ONLY_N = slice(2, 3)


def differs_by_gate(mask: Tensor | None) -> bool:
    return mask is not None and mask.shape[1] > 1


def select_gates(mask_TGBH: Tensor | None, part: slice) -> Tensor | None:
    """The mask of some gates, whether it differs by gate or not."""
    return mask_TGBH[:, part] if mask_TGBH is not None and differs_by_gate(mask_TGBH) else mask_TGBH


class Gates:
    """One tensor of all gates and steps, in a layout in which each group of gates is a matrix.

    Its shape is [T, B, G·R] if no mask differs by gate, and [G, T, B, R] if one does. For packed sequences
    (`packing.py`), T is the number of rows and B is 1.
    """

    def __init__(self, memory: Tensor, gates: int) -> None:
        self.memory = memory
        self.gates = gates
        self.by_gate = memory.dim() == 4
        self.time, self.batch = memory.shape[-3:-1]
        if self.by_gate:
            self.row_size, self.view_GTBR = memory.shape[-1], memory
        else:
            self.row_size = memory.shape[-1] // gates
            self.view_GTBR = memory.view(self.time, self.batch, gates, self.row_size).permute(2, 0, 1, 3)

    @classmethod
    def allocate(cls, x_TBD: Tensor, row_size: int, gates: int, masks: Masks) -> "Gates":
        """Memory for the gates of a layer with these masks, in rows of `row_size`."""
        time, batch, _ = x_TBD.shape
        by_gate = differs_by_gate(masks.x) or differs_by_gate(masks.h)
        shape = (gates, time, batch, row_size) if by_gate else (time, batch, gates * row_size)
        return cls(x_TBD.new_empty(shape), gates)

    def empty_like(self, dtype: torch.dtype | None = None) -> "Gates":
        """Memory of the same layout, for the gradients."""
        return Gates(torch.empty_like(self.memory, dtype=dtype), self.gates)

    def rows(self, part: slice) -> slice:
        """The rows of a weight matrix that belong to some gates."""
        return slice(part.start * self.row_size, part.stop * self.row_size)

    def weight_matrix(
        self, w_hh: Tensor, rows: int, *, transposed: bool = False
    ) -> WeightMatrix | WeightMatrices:
        """The recurrent weights of some gates, for products with about `rows` rows at each step; transposed,
        for products with the gradients of these gates.
        """
        w = w_hh.view(-1, self.row_size, self.row_size) if self.by_gate else w_hh
        w = w.mT if transposed else w
        return WeightMatrices(w, rows) if self.by_gate else WeightMatrix(w, rows)

    def groups(self, part: slice) -> list[slice]:
        """The groups of gates with one product each: all of `part` together, or one by one."""
        return [slice(g, g + 1) for g in range(part.start, part.stop)] if self.by_gate else [part]

    def matrix(self, group: slice) -> Tensor:
        """A group of gates at every step as a matrix, [T·B, gates·R]."""
        if self.by_gate:
            return self.memory[group.start].flatten(0, 1)
        return self.memory.flatten(0, 1)[:, self.rows(group)]

    def unbind_steps(self, part: slice, layout: Layout | None = None) -> list[Tensor]:
        """The gates of `part` at each step: [gates, B, R] if each has its own product, else [B, gates·R]."""
        layout = layout or Layout(self.time, self.batch)
        if self.by_gate:
            return layout.unbind_steps(self.memory[part], 1)
        return layout.unbind_steps(self.memory[..., self.rows(part)])


def masked_inputs(
    gates: Gates, part: slice, x_TBD: Tensor, dtype: torch.dtype, mask: Tensor | None, size: int | None = None
) -> list[Tensor]:
    """The masked inputs of the products of each group of gates of `part`, at all steps, rounded to `dtype`:
    [T·B, D]. With `size`, which is at least D, their rows have this size, with zeros at their end.
    """
    size = size or x_TBD.shape[-1]

    def masked(group: slice) -> Tensor:
        group_mask = select_gates(mask, group)
        x = x_TBD if group_mask is None else x_TBD * group_mask[:, 0]
        return pad_columns(x, dtype, size).flatten(0, 1)

    groups = gates.groups(part)
    return [masked(group) for group in groups] if differs_by_gate(mask) else [masked(part)] * len(groups)


def project_inputs(
    gates: Gates, x_TBD: Tensor, w_ih: Tensor, bias: Tensor | None, mask_x: Tensor | None
) -> list[Tensor]:
    """Fills the gates with `W (m_x ∘ x) + b` for all steps at once; returns the masked inputs of each group,
    [T·B, D], in rows as long as those of `w_ih`.
    """
    all_gates = slice(0, gates.gates)
    inputs_ND = masked_inputs(gates, all_gates, x_TBD, w_ih.dtype, mask_x, w_ih.shape[1])
    for group, input_ND in zip(gates.groups(all_gates), inputs_ND, strict=True):
        mm_into(gates.matrix(group), input_ND, w_ih[gates.rows(group)].T)
    if bias is not None:
        gates.view_GTBR.add_(bias.view(gates.gates, 1, 1, -1))
    return inputs_ND


def input_gradient(
    da_lowp: Gates, w_ih: Tensor, mask_x: Tensor | None, dtype: torch.dtype, columns: int | None = None
) -> Tensor:
    """The gradient of the layer's input, [T, B, D], from those of the gates in the type of the products.
    `columns` is D where the rows of `w_ih` are longer.
    """
    dx_TBD: Tensor | None = None
    for group in da_lowp.groups(slice(0, da_lowp.gates)):
        product_ND = operand(da_lowp.matrix(group)) @ operand(w_ih[da_lowp.rows(group)])
        product_TBD = product_ND.view(da_lowp.time, da_lowp.batch, w_ih.shape[1])
        group_dx_TBD = product_TBD[..., :columns].to(dtype).contiguous()
        mask = select_gates(mask_x, group)
        if mask is not None:
            group_dx_TBD.mul_(mask[:, 0])
        dx_TBD = group_dx_TBD if dx_TBD is None else dx_TBD.add_(group_dx_TBD)
    assert dx_TBD is not None
    return dx_TBD


def weight_gradient(da_lowp: Gates, part: slice, inputs_ND: list[Tensor], dw: Tensor) -> None:
    """Writes the gradient of the weights that multiplied the inputs of each group, summed over all steps in
    one product.
    """
    for group, input_ND in zip(da_lowp.groups(part), inputs_ND, strict=True):
        mm_into(dw[da_lowp.rows(group)], da_lowp.matrix(group).T, input_ND)


def sum_over_steps(da: Gates, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient of the biases, [G·R], summed in `dtype` (None: that of `da`)."""
    if da.by_gate:
        return da.view_GTBR.sum((1, 2), dtype=dtype).flatten()
    return da.memory.flatten(0, 1).sum(0, dtype=dtype)
