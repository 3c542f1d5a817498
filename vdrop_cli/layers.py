"""`LSTM` and `GRU` with dropout on inputs, recurrence or cell state: the weights, states and outputs of `torch.nn`'s modules.

T time  B batch  D input size  H hidden size  L layers
"""

from typing import Any, ClassVar, Self

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
    """Stacked layers of one kind of cell. Weights have the names and shapes of `torch.nn.LSTM` and `torch.nn.GRU` (`from_torch`).

    In training mode every call draws new masks from torch's global random state, unless it is given `masks`; in evaluation
    mode their means take their place, unless given. The policy's word mask is not used here, it belongs to an embedding; its output mask
    multiplies the output. `compute_dtype` is the type in which matrix products are multiplied (None: that of the weights); under
    autocast it is no other, and inputs and states are taken in the type of the weights. `backend` is one of `kernels.BACKENDS`, or
    `auto`, which depends on the device of the input. `recompute` has `triton` keep less in memory.
    """

    cell: Cell
    torch_module: type[nn.RNNBase]  # the module of `torch.nn` whose weights it takes
    torch_variant: ClassVar[dict[str, Any]] = {}  # the options with which it computes what that one does

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

    @classmethod
    def from_torch(
        cls,
        module: nn.RNNBase,
        *,
        dropout: Dropout | None = None,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        recompute: bool = False,
    ) -> Self:
        """One that computes what `module` does, with a copy of its weights: their sizes, dtype, device and mode, and `batch_first`.

        A module with dropout of its own needs `dropout` to say what takes its place. What these layers lack is a ValueError.
        """
        name = cls.torch_module.__name__
        if not isinstance(module, cls.torch_module):
            raise TypeError(f"module must be a torch.nn.{name}, got {type(module).__name__}")
        for option, value, supported in (
            ("bidirectional", module.bidirectional, False),
            ("proj_size", module.proj_size, 0),
            ("bias", module.bias, True),
        ):
            if value != supported:
                raise ValueError(f"a torch.nn.{name} with {option}={value} cannot be taken over: only {option}={supported} is supported")
        if module.dropout and dropout is None:
            raise ValueError(
                f"the torch.nn.{name} has dropout={module.dropout}: give dropout=Dropout(…) to take its place, Policy.none for no dropout"
            )
        options: dict[str, Any] = {"backend": backend, "compute_dtype": compute_dtype, "recompute": recompute, **cls.torch_variant}
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
            sizes = (module.input_size, module.hidden_size, module.num_layers)
            layers = cls(*sizes, batch_first=module.batch_first, dropout=dropout, **options)
        for parameter in list(layers._parameters):
            weight = getattr(module, parameter)
            copied = weight.detach().clone(memory_format=torch.contiguous_format)
            setattr(layers, parameter, nn.Parameter(copied, requires_grad=weight.requires_grad))
        return layers.train(module.training)

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
        dropout, sizes = self.dropout, f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        set_here = [f"{key}={getattr(dropout, key)}" for key in ("untied", "p_x", "p_h", "p_c", "p_out") if getattr(dropout, key)]
        policy = f"{dropout.policy}({', '.join(set_here)})" if set_here else str(dropout.policy)
        return f"{sizes}, batch_first={self.batch_first}, dropout={policy}"


class LSTM(Recurrent):
    """Stacked LSTM; the state is (h, c), each [L, B, H]."""

    cell = Cell.lstm
    torch_module = nn.LSTM

    def step(self, x_TBD: Tensor, state: State, weights: Weights, masks: Masks, lengths: Tensor | None) -> tuple[Tensor, State]:
        h_BH, c_BH = state
        y_TBH, h_BH, c_BH = kernels.lstm(x_TBD, h_BH, c_BH, *weights, masks, lengths=lengths, **self.options)
        return y_TBH, (h_BH, c_BH)


class GRU(Recurrent):
    """Stacked GRU; the state is h, [L, B, H].

    The reset gate acts before the recurrent product of the candidate, as in the paper. With the same weights `torch.nn.GRU` computes
    something else: there, as in cuDNN, it acts after that product, which is `reset_after=True`. `from_torch` sets it;
    `load_state_dict` cannot notice that it is missing, as both variants have weights of the same names and shapes.
    """

    cell = Cell.gru
    torch_module = nn.GRU
    torch_variant: ClassVar = {"reset_after": True}

    def __init__(self, *args: Any, reset_after: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reset_after = reset_after

    def step(self, x_TBD: Tensor, state: State, weights: Weights, masks: Masks, lengths: Tensor | None) -> tuple[Tensor, State]:
        (h_BH,) = state
        y_TBH, h_BH = kernels.gru(x_TBD, h_BH, *weights, masks, lengths=lengths, reset_after=self.reset_after, **self.options)
        return y_TBH, (h_BH,)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reset_after={self.reset_after}"
