"""`LSTM` and `GRU` with dropout on inputs, recurrence or cell state: the weights, states and outputs of `torch.nn`'s modules.

T time  B batch  D input size  H hidden size  L layers
"""

from typing import Any

import torch
from torch import Tensor, nn

from vdrop_cli import kernels
from vdrop_cli.config import Cell, Dropout, Policy
from vdrop_cli.dropout import GATES, MaskShape, ModelMasks, Stream, draw, mean_masks
from vdrop_cli.kernels import Masks

State = tuple[Tensor, ...]  # h and, for an LSTM, c; each [L, B, H]
STATES = {Cell.lstm: 2, Cell.gru: 1}
Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # w_ih, w_hh, b_ih, b_hh


class Recurrent(nn.Module):
    """Stacked layers of one kind of cell. Weights have the names and shapes of `torch.nn.LSTM` and `torch.nn.GRU`.

    In training mode every call draws new masks from torch's global random state, unless it is given `masks`; in evaluation
    mode their means take their place, unless given. The policy's word mask is not used here, it belongs to an embedding; its output mask
    multiplies the output. `compute_dtype` is the type in which matrix products are multiplied (None: that of the weights); under
    autocast it is no other, and inputs and states are taken in the type of the weights. `backend` is one of `kernels.BACKENDS`, or
    `auto`, which depends on the device of the input. `recompute` has `triton` keep less in memory.
    """

    cell: Cell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        dropout: Dropout | None = None,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not isinstance(dropout, Dropout | None):
            raise TypeError(f"dropout must be a vdrop_cli.config.Dropout, got {dropout!r}; Policy.zaremba with p_x is between layers")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first = batch_first
        self.dropout = dropout or Dropout(name="none", policy=Policy.none)
        self.backend, self.compute_dtype, self.recompute = kernels.known(backend), compute_dtype, recompute
        if self.dropout.policy is Policy.moon and self.cell is not Cell.lstm:
            raise ValueError("the policy moon masks the cell state, which a GRU does not have")
        rows = GATES[self.cell] * hidden_size
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size
            shapes = {"weight_ih": (rows, width), "weight_hh": (rows, hidden_size), "bias_ih": (rows,), "bias_hh": (rows,)}
            for name, shape in shapes.items():
                self.register_parameter(f"{name}_l{layer}", nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√H, as `torch.nn.LSTM`."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.hidden_size**-0.5), self.hidden_size**-0.5)

    def weights(self, layer: int) -> Weights:
        """As they are now: parameters, or what was put in their place."""
        w_ih, w_hh, b_ih, b_hh = (getattr(self, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        return w_ih, w_hh, b_ih, b_hh

    @property
    def options(self) -> dict[str, Any]:
        """How the kernels are to work."""
        return {"backend": self.backend, "compute_dtype": self.compute_dtype, "recompute": self.recompute}

    def mask_shape(self, time: int, batch: int) -> MaskShape:
        widths = (self.input_size, *[self.hidden_size] * (self.num_layers - 1))
        return MaskShape(time, batch, widths, self.hidden_size, GATES[self.cell])

    def zero_state(self, batch: int) -> State:
        like = self.weights(0)[0]
        return tuple(like.new_zeros(self.num_layers, batch, self.hidden_size) for _ in range(STATES[self.cell]))

    def masks(self, time: int, batch: int, device: torch.device) -> ModelMasks:
        """New ones, from torch's global random state, which stays as it is where nothing is ever dropped."""
        dropout = self.dropout
        if not any((dropout.p_word, dropout.p_x, dropout.p_h, dropout.p_c, dropout.p_out)):
            return ModelMasks([Masks()] * self.num_layers)
        seed = int(torch.randint(2**62, (), device="cpu"))
        return draw(dropout, self.mask_shape(time, batch), Stream((seed,))).to(device, self.weights(0)[0].dtype)

    def mean_masks(self) -> ModelMasks:
        """What stands for the masks where none are drawn: the standard approximation."""
        return mean_masks(self.dropout, self.num_layers, self.weights(0)[0])

    def step(self, x_TBD: Tensor, state: State, weights: Weights, masks: Masks, lengths: Tensor | None) -> tuple[Tensor, State]:
        """One layer; `state` and the state returned are [B, H] each."""
        raise NotImplementedError

    def entry(self, x: Tensor, state: Any) -> tuple[Tensor, State]:
        """What the first layer reads, [T, B, D], and the states to begin with, all in the type of the weights under autocast."""
        if x.dim() != 3 or x.shape[2] != self.input_size:
            wanted = "[B, T, {}]" if self.batch_first else "[T, B, {}]"
            raise ValueError(f"x must be {wanted.format(self.input_size)}, got {list(x.shape)}")
        x_TBD = x.transpose(0, 1) if self.batch_first else x
        batch, dtype = x_TBD.shape[1], self.weights(0)[0].dtype
        parts: State = self.zero_state(batch) if state is None else tuple(state) if isinstance(state, tuple | list) else (state,)
        shapes = [list(part.shape) for part in parts]
        if shapes != [[self.num_layers, batch, self.hidden_size]] * STATES[self.cell]:
            names = "(h, c), each" if self.cell is Cell.lstm else "h,"
            raise ValueError(f"the state must be {names} {[self.num_layers, batch, self.hidden_size]}, got {', '.join(map(str, shapes))}")
        if torch.is_autocast_enabled(x.device.type):
            return x_TBD.to(dtype), tuple(part.to(dtype) for part in parts)
        return x_TBD, parts

    def forward(
        self, x: Tensor, state: Any = None, *, lengths: Tensor | list[int] | None = None, masks: ModelMasks | None = None
    ) -> tuple[Tensor, Any]:
        """`x` [T, B, D], or [B, T, D] with `batch_first`; returns the output alike and the last state, as `torch.nn`'s modules.

        With `lengths` [B] the state is that after each sequence's last step, and the output is zero beyond it; those above T are T.
        """
        x_TBD, parts = self.entry(x, state)
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=x.device)
        if masks is None:
            masks = self.masks(x_TBD.shape[0], x_TBD.shape[1], x.device) if self.training else self.mean_masks()
        if len(masks.layers) != self.num_layers:
            raise ValueError(f"masks must be for {self.num_layers} layers, got {len(masks.layers)}")
        last = []
        for layer, layer_masks in enumerate(masks.layers):
            x_TBD, new = self.step(x_TBD, tuple(part[layer] for part in parts), self.weights(layer), layer_masks, lengths)
            last.append(new)
        y_TBH = x_TBD if masks.out is None else x_TBD * masks.out
        stacked = tuple(torch.stack(part) for part in zip(*last, strict=True))
        return (y_TBH.transpose(0, 1) if self.batch_first else y_TBH), (stacked if self.cell is Cell.lstm else stacked[0])

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, dropout={self.dropout.policy}"


class LSTM(Recurrent):
    """Stacked LSTM; the state is (h, c), each [L, B, H]."""

    cell = Cell.lstm

    def step(self, x_TBD: Tensor, state: State, weights: Weights, masks: Masks, lengths: Tensor | None) -> tuple[Tensor, State]:
        h_BH, c_BH = state
        y_TBH, h_BH, c_BH = kernels.lstm(x_TBD, h_BH, c_BH, *weights, masks, lengths=lengths, **self.options)
        return y_TBH, (h_BH, c_BH)


class GRU(Recurrent):
    """Stacked GRU; the state is h, [L, B, H]. `reset_after` is torch's and cuDNN's variant, without it the paper's."""

    cell = Cell.gru

    def __init__(self, *args: Any, reset_after: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reset_after = reset_after

    def step(self, x_TBD: Tensor, state: State, weights: Weights, masks: Masks, lengths: Tensor | None) -> tuple[Tensor, State]:
        (h_BH,) = state
        y_TBH, h_BH = kernels.gru(x_TBD, h_BH, *weights, masks, lengths=lengths, reset_after=self.reset_after, **self.options)
        return y_TBH, (h_BH,)
