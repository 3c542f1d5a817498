"""`LSTM` and `GRU` with dropout on inputs, recurrence or cell state, in the interface of `torch.nn`.

T time  B batch  D input size  H hidden size  P size of the hidden state (H, or that of a projection) L layers
G gates
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from vdrop_cli import kernels
from vdrop_cli.dropout import GATES, MaskShape, ModelMasks, WordMasks, new_masks, no_masks
from vdrop_cli.gru_variant import GRUVariant
from vdrop_cli.kernels import Masks, Norms
from vdrop_cli.kernels.contexts import in_transform, no_autocast
from vdrop_cli.layer_dropout import DropoutModule, check_policy, chosen_dropout, describe, weight_like
from vdrop_cli.mask_checks import check_layer_masks
from vdrop_cli.policies import Cell, Dropout, Policy, Tie, WordMask
from vdrop_cli.state_layout import State as State
from vdrop_cli.state_layout import StateLayout
from vdrop_cli.time_reversal import reverse_masks, reverse_time, reversed_order

__all__ = ["GRU", "LSTM", "Dropout", "Masks", "ModelMasks", "Policy", "Tie", "WordMask", "WordMasks"]

Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # w_ih, w_hh, b_ih, b_hh
STATES = {Cell.lstm: 2, Cell.gru: 1}


def checked_sizes(hidden_size: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Returns the hidden size of each layer; raises ValueError for another number of sizes than of layers."""
    if not isinstance(hidden_size, Sequence):
        return (hidden_size,) * num_layers
    if len(hidden_size) == 0 or num_layers not in (1, len(hidden_size)):
        raise ValueError(
            f"hidden_size must be one size or {num_layers}, one for each layer, got {list(hidden_size)}"
        )
    return tuple(hidden_size)


def joined_sizes(hidden_sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    """The sizes of all layers as the argument `hidden_size`: one size where they are equal."""
    return hidden_sizes[0] if len(set(hidden_sizes)) == 1 else hidden_sizes


class Recurrent(DropoutModule):
    """Stacked layers of one kind of cell, with the arguments, weights and results of `torch.nn`.

    Dropout is one of
    - `dropout=Dropout(policy, …)`: a probability for each place;
    - `dropout=p`: as in torch, between layers, resampled at every step;
    - `variational=p`: masks held over the sequence, on the inputs of all layers, the recurrence and the
      output;
    - `recurrent_dropout=p`: a mask held over the sequence, on the recurrence alone, shared by all gates.

    In training mode, every call without `masks` draws new masks from torch's global random state. In
    evaluation mode, it uses the means of the masks. The attribute `sampling.training` of the layer decides
    which; `train()` and `eval()` set it. `masks` that are passed are used in either mode.

    - `reverse`: the layers read backward in time.
    - `compute_dtype`: the type in which matrix products are multiplied (None: that of the weights). Autocast
      does not change it; under it, inputs and states are converted to the type of the weights.
    - `backend`: one of `kernels.BACKENDS`, or `auto`, which depends on the device of the input.
    - `recompute`: the back end `triton` stores fewer intermediate results in the forward pass, and computes
      them again in the backward pass.
    - `hidden_size` may be a sequence with the size of each layer; `num_layers` is then its length. States of
      layers whose sizes differ are joined in the last dimension: h and c are [directions, B, sum of the
      sizes], those of the last layer at the end.
    - `residual`: the input of each layer but the first is added to its output, not to its states. All layers
      must have the same size. The added input is the one before the layer's dropout.
    - `layer_norm`: normalises inside the cell (Ba et al. 2016, see `kernels.Norms`), with parameters
      `norm_…`. The back end `triton` does not support it.
    - `proj_size` (LSTM): a projection of the hidden state, computed by the back end `reference`, a plain
      loop.

    Raises ValueError for sizes, probabilities and combinations that are not possible, TypeError for a
    `dropout` that is neither a number nor a `Dropout`.
    """

    cell: ClassVar[Cell]
    torch_module: ClassVar[type[nn.RNNBase]]  # the module of `torch.nn` with the same weights
    torch_variant: ClassVar[dict[str, Any]] = {}  # options that give that module's equations

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: Dropout | float | None = None,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        variational: float | None = None,
        recurrent_dropout: float | None = None,
        reverse: bool = False,
        residual: bool = False,
        layer_norm: bool = False,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_sizes = checked_sizes(hidden_size, num_layers)
        num_layers = num_layers if num_layers < 1 else len(self.hidden_sizes)
        self.hidden_size = joined_sizes(self.hidden_sizes)
        self.input_size, self.num_layers, self.residual = input_size, num_layers, residual
        self.bias, self.batch_first = bias, batch_first
        self.bidirectional, self.reverse = bidirectional, reverse
        self.proj_size, self.layer_norm = proj_size, layer_norm
        self.require_possible_options()
        self.backend = kernels.check_name(backend)
        self.compute_dtype = kernels.check_compute_dtype(compute_dtype)
        self.recompute = recompute
        self.dropout = chosen_dropout(dropout, variational, recurrent_dropout, num_layers)
        if num_layers == 1 and dropout and not isinstance(dropout, Dropout):
            level = 2 if type(self).__init__ is Recurrent.__init__ else 3
            warnings.warn("dropout between layers has no effect with num_layers=1", stacklevel=level)
        self.register_weights(device, dtype)
        self.reset_parameters()

    def require_possible_options(self) -> None:
        """Raises ValueError for sizes and combinations of options that a layer cannot have."""
        hidden_size, proj_size = self.hidden_size, self.proj_size
        sizes = [("hidden_size", size) for size in self.hidden_sizes]
        for name, size in (("input_size", self.input_size), *sizes, ("num_layers", self.num_layers)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if (proj_size or self.residual) and isinstance(hidden_size, tuple):
            name, unset = ("proj_size", 0) if proj_size else ("residual", False)
            raise ValueError(
                f"{name} must be {unset} where the sizes of the layers differ, got hidden_size={hidden_size}"
            )
        if self.residual and self.num_layers == 1:
            raise ValueError("residual must be False in a single layer")
        if not 0 <= proj_size < min(self.hidden_sizes):
            raise ValueError(
                f"proj_size must be at least 0 and below hidden_size={hidden_size}, got {proj_size}"
            )
        if proj_size and self.cell is not Cell.lstm:
            raise ValueError("proj_size must be 0 for a GRU: only an LSTM has projections")
        if self.bidirectional and self.reverse:
            raise ValueError(
                "reverse must be False with bidirectional=True, which has a backward layer already"
            )

    def check_dropout(self, dropout: Dropout) -> None:
        """Raises TypeError or ValueError for a policy that these layers cannot apply."""
        is_chain = not (self.bidirectional or self.residual)
        check_policy(dropout, self.cell, self.num_layers, is_chain=is_chain, layer_norm=self.layer_norm)
        if dropout.p_weight > 0 and any(
            name.startswith("weight_hh") and any(isinstance(part, nn.Dropout) for part in parts)
            for name, parts in getattr(self, "parametrizations", {}).items()
        ):
            raise ValueError(
                f"p_weight must be 0 in a layer with WeightDrop, got {dropout.p_weight}: its recurrent "
                "weights would be dropped twice; choose one of the two"
            )

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def state_size(self, layer: int) -> int:
        """The size P of the hidden state h of a layer."""
        return self.state_layout.state_size(layer)

    @property
    def state_layout(self) -> StateLayout:
        """The sizes and the order of the states of all layers."""
        return StateLayout(self.hidden_sizes, self.directions, self.proj_size, STATES[self.cell])

    @property
    def output_size(self) -> int:
        """The size of the output, in all directions."""
        return self.directions * self.state_size(self.num_layers - 1)

    def suffixes(self, layer: int) -> list[str]:
        """Returns the suffixes of the weights' names in a layer, one for each direction."""
        return [f"_l{layer}", f"_l{layer}_reverse"][: self.directions]

    @property
    def input_sizes(self) -> tuple[int, ...]:
        """The size D of the input of each layer."""
        lower = range(self.num_layers - 1)
        return (self.input_size, *(self.directions * self.state_size(layer) for layer in lower))

    def weight_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the weights of one layer and direction by name, in torch's order."""
        hidden_size = self.hidden_sizes[layer]
        rows = GATES[self.cell] * hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, self.input_sizes[layer]),
            "weight_hh": (rows, self.state_size(layer)),
        }
        if self.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, hidden_size)
        if self.layer_norm:
            shapes |= {"norm_ih": (rows,), "norm_hh": (rows,)}
            if self.cell is Cell.lstm:
                shapes |= {"norm_c": (hidden_size,), "norm_c_bias": (hidden_size,)}
        return shapes

    def register_weights(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Adds the parameters of all layers and directions, with undefined values."""
        for layer in range(self.num_layers):
            for suffix in self.suffixes(layer):
                for name, shape in self.weight_shapes(layer).items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(f"{name}{suffix}", parameter)

    def reset_parameters(self) -> None:
        """Initialises weights uniformly in ±1/√H, with the random numbers of `torch.nn.LSTM`.

        Gains of layer norm become 1, its biases 0.
        """
        limits = [1 / math.sqrt(size) for size in self.hidden_sizes]
        for name, parameter in self.named_parameters():
            if name.startswith("norm_"):
                nn.init.constant_(parameter, 0.0 if "bias" in name else 1.0)
            else:
                limit = limits[self.layer_of(name)]
                nn.init.uniform_(parameter, -limit, limit)

    @staticmethod
    def layer_of(name: str) -> int:
        """The layer of a parameter, such as 1 of `weight_hh_l1_reverse`."""
        match = re.search(r"(?:weight|bias|norm)_\w+?_l(\d+)(?:_reverse)?(?:\.|$)", name)
        return int(match[1]) if match else 0

    @classmethod
    def from_torch(
        cls,
        module: nn.RNNBase,
        *,
        dropout: Dropout | float | None = None,
        variational: float | None = None,
        recurrent_dropout: float | None = None,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        recompute: bool = False,
    ) -> Self:
        """Makes a layer from a module of `torch.nn`, with the same equations and a copy of its weights.

        Sizes, dtype, device and mode are those of `module`. The dropout arguments replace its dropout between
        layers. Raises TypeError for another module, ValueError for one whose weights are parametrized, pruned
        or otherwise computed.
        """
        name = cls.torch_module.__name__
        if not isinstance(module, cls.torch_module):
            raise TypeError(f"module must be a torch.nn.{name}, got {type(module).__name__}")
        if parametrize.is_parametrized(module):
            raise ValueError(
                "module must have plain weights: remove its parametrizations first "
                "(torch.nn.utils.parametrize)"
            )
        has_dropout = any(value is not None for value in (dropout, variational, recurrent_dropout))
        options: dict[str, Any] = {
            "backend": backend,
            "compute_dtype": compute_dtype,
            "recompute": recompute,
            **cls.torch_variant,
        }
        options |= {"variational": variational, "recurrent_dropout": recurrent_dropout}
        options["dropout"] = dropout if has_dropout else module.dropout
        for option in ("bias", "batch_first", "bidirectional", "proj_size"):
            options[option] = getattr(module, option)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
            layers = cls(module.input_size, module.hidden_size, module.num_layers, **options)
        if computed := [name for name in layers._parameters if name not in module._parameters]:
            raise ValueError(
                f"module must have plain weights, but its {computed[0]} is computed from others: make it "
                "permanent first (torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove)"
            )
        copies: dict[int, nn.Parameter] = {}  # weights that are the same tensor in `module` remain the same
        for parameter in list(layers._parameters):
            weight = getattr(module, parameter)
            if id(weight) not in copies:
                copied = weight.detach().clone(memory_format=torch.contiguous_format)
                copies[id(weight)] = nn.Parameter(copied, requires_grad=weight.requires_grad)
            setattr(layers, parameter, copies[id(weight)])
        return layers.train(module.training)

    def to_torch(self) -> nn.RNNBase:
        """Makes a module of `torch.nn` with the same equations, without dropout, and a copy of the weights.

        Sizes, dtype, device and mode are those of this layer. In evaluation mode the results are the same.
        Raises ValueError where torch has no such module: for `layer_norm`, `residual`, `reverse`, sizes that
        differ between layers, and a GRU without `reset_after=True`; and for weights that are parametrized.
        """
        name = f"torch.nn.{self.torch_module.__name__}"
        options = {"layer_norm": False, "residual": False, "reverse": False, **self.torch_variant}
        for option, value in options.items():
            if getattr(self, option) != value:
                raise ValueError(f"{option} must be {value} for a {name}, got {getattr(self, option)}")
        if isinstance(self.hidden_size, tuple):
            raise ValueError(f"hidden_size must be one size for a {name}, got {list(self.hidden_size)}")
        if parametrize.is_parametrized(self):
            raise ValueError(
                "the layer must have plain weights: remove its parametrizations first "
                "(torch.nn.utils.parametrize)"
            )
        like = self.parameter_like()
        arguments: dict[str, Any] = {
            option: getattr(self, option) for option in ("bias", "batch_first", "bidirectional")
        }
        if self.proj_size:
            arguments["proj_size"] = self.proj_size
        sizes = (self.input_size, self.hidden_size, self.num_layers)
        create: Callable[..., nn.RNNBase] = self.torch_module
        # no random numbers for weights that are replaced
        module = create(*sizes, **arguments, device="meta", dtype=like.dtype)
        module.to_empty(device=like.device).load_state_dict(self.state_dict())
        for parameter_name, parameter in self.named_parameters():
            module.get_parameter(parameter_name).requires_grad_(parameter.requires_grad)
        return module.train(self.training)

    def weights(self, layer: int, direction: int = 0) -> Weights:
        """Returns the current weights of a layer and direction; biases that the layer lacks are zeros."""
        suffix = self.suffixes(layer)[direction]
        w_ih, w_hh = getattr(self, f"weight_ih{suffix}"), getattr(self, f"weight_hh{suffix}")
        if self.bias:
            return w_ih, w_hh, getattr(self, f"bias_ih{suffix}"), getattr(self, f"bias_hh{suffix}")
        zeros = w_ih.new_zeros(len(w_ih))
        return w_ih, w_hh, zeros, zeros

    def masked_weights(self, layer: int, direction: int, mask: Tensor | None) -> Weights:
        """Returns the weights of a layer and direction, the recurrent ones masked."""
        w_ih, w_hh, b_ih, b_hh = self.weights(layer, direction)
        return w_ih, w_hh if mask is None else w_hh * mask.to(w_hh.dtype), b_ih, b_hh

    def projection(self, layer: int, direction: int = 0) -> Tensor | None:
        """Returns the weights [P, H] of the projection, if any."""
        return getattr(self, f"weight_hr{self.suffixes(layer)[direction]}") if self.proj_size else None

    def norms(self, layer: int, direction: int = 0) -> Norms | None:
        """Returns the parameters of layer norm, if any."""
        if not self.layer_norm:
            return None
        suffix = self.suffixes(layer)[direction]
        names = ("norm_ih", "norm_hh", "norm_c", "norm_c_bias")[: 2 * STATES[self.cell]]
        return Norms(*(getattr(self, name + suffix) for name in names))

    def parameter_like(self) -> Tensor:
        """Returns a tensor of the type and device of the weights."""
        return weight_like(self, "weight_ih_l0")

    def flatten_parameters(self) -> None:
        """Does nothing; scripts written for torch's modules call it."""

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, in the order of torch's modules."""
        places = [(layer, suffix) for layer in range(self.num_layers) for suffix in self.suffixes(layer)]
        return [
            [getattr(self, name + suffix) for name in self.weight_shapes(layer)] for layer, suffix in places
        ]

    @property
    def options(self) -> dict[str, Any]:
        """The options of the kernels."""
        return {"backend": self.backend, "compute_dtype": self.compute_dtype, "recompute": self.recompute}

    def mask_shape(self, time: int, batch: int) -> MaskShape:
        """Returns the sizes of the masks for `time` steps of `batch` sequences."""
        return MaskShape(
            time, batch, self.input_sizes, self.hidden_size, GATES[self.cell], self.directions, self.proj_size
        )

    def zero_state(self, batch: int) -> State:
        """Returns zero states, the default start of a sequence.

        [L · directions, B, P] and, for an LSTM, [L · directions, B, H]; where the sizes of the layers differ,
        [directions, B, sum of the sizes].
        """
        return self.state_layout.zeros(batch, self.parameter_like())

    def masks(self, time: int, batch: int, device: torch.device | str | None = None) -> ModelMasks:
        """Draws masks in training mode, and returns their means in evaluation mode.

        They are on `device` (None: that of the weights). For MC dropout with these masks, draw them after
        `sampling.train()`, or inside `sampling.mc_dropout(model)`. They come from torch's global random
        state, which does not change where the policy drops nothing.
        """
        dropout = self.dropout  # an error, in either mode, where another module took the place of `sampling`
        if not self.sampling.training:
            return self.mean_masks()
        like = self.parameter_like()
        return new_masks(
            dropout, self.mask_shape(time, batch), torch.device(device or like.device), like.dtype
        )

    def mean_masks(self) -> ModelMasks:
        """Returns the means of all masks, which change nothing, for the standard approximation."""
        return no_masks(self.num_layers, self.directions)

    def run_cell(
        self,
        place: tuple[int, int],
        weights: Weights,
        x_TBD: Tensor,
        state: State,
        masks: Masks,
        lengths: Tensor | None,
        cells: bool,
    ) -> tuple[State, State]:
        """Runs one layer in one direction; `place` is (layer, direction).

        Returns the states of all steps, (h,) or with `cells` of an LSTM (h, c), and the last state, [B, P]
        and [B, H].
        """
        raise NotImplementedError

    def run_layer(
        self, layer: int, x_TBD: Tensor, states: State, masks: ModelMasks, lengths: Tensor | None, cells: bool
    ) -> tuple[list[State], list[State]]:
        """Runs one layer in all directions; `states` are [directions, B, …] and `masks` of all layers.

        Returns for each direction the states of all steps, (h,) or with `cells` of an LSTM (h, c), and the
        last state.
        """
        steps, last = [], []
        for direction in range(self.directions):
            number = layer * self.directions + direction
            layer_masks, x = masks.layers[number], x_TBD
            weight_mask = None if masks.weights is None else masks.weights[number]
            weights = self.masked_weights(layer, direction, weight_mask)
            backward = self.reverse or direction == 1
            if backward:
                order = reversed_order(len(x_TBD), lengths)
                x, layer_masks = reverse_time(x, order), reverse_masks(layer_masks, order)
            first = tuple(part[direction] for part in states)
            # With a mask on the cell state, the kernels carry hidden states that are not divided by the keep
            # probability. So the first hidden state is multiplied by it, and the mask on the hidden state in
            # the recurrent product divides by it.
            scale = 1.0 if masks.cell_scales is None else masks.cell_scales[number]
            if scale != 1:
                first, layer_masks = scaled(first, 1 / scale), with_recurrent_scale(layer_masks, scale, x)
            new_steps, new = self.run_cell((layer, direction), weights, x, first, layer_masks, lengths, cells)
            if scale != 1:
                new_steps, new = scaled(new_steps, scale), scaled(new, scale)
            steps.append(tuple(reverse_time(part, order) for part in new_steps) if backward else new_steps)
            last.append(new)
        return steps, last

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | list[int] | None = None,
        masks: ModelMasks | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """Returns the output and the last state, as the modules of `torch.nn` do.

        `input` is [T, B, D], or [B, T, D] with `batch_first`, or [T, D] without a batch, or a PackedSequence.
        With `lengths` [B] the last state is the one after each sequence's last step, and the output beyond it
        is zero; lengths above T count as T. The output mask and the addition of `residual` change the output,
        not the last state. With either of them, `output[-1]` differs from `h[-1]`, unlike in torch. `masks`
        are in the order of the sequences in the input. Masks of backward layers are indexed by the position
        in the sequence, not by the order of reading.

        `return_states` adds a third result: for each layer and direction, in torch's order, the states of all
        steps in the layout of the output, (h,) or for an LSTM (h, c), before the output mask.

        Raises ValueError or TypeError for shapes that do not fit.
        """
        x = input
        if isinstance(x, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths must be None with a PackedSequence, which has its own")
            padded_TBD, own_lengths = pad_packed_sequence(x)
            if padded_TBD.dim() != 3 or padded_TBD.shape[2] != self.input_size:
                raise ValueError(f"input must be packed rows of {self.input_size}, got {list(x.data.shape)}")
            lengths = own_lengths.to(padded_TBD.device)
            results = self.run(padded_TBD, hx, lengths, masks, True, return_states)
            return results.restore(lambda part: pack_like(part, own_lengths, x))
        batched = x.dim() != 2
        if not batched and lengths is not None:
            raise ValueError("lengths must be None with an input without a batch")
        is_batch_first = self.batch_first and x.dim() == 3
        x_TBD = x.transpose(0, 1) if is_batch_first else x if batched else x.unsqueeze(1)
        if x_TBD.dim() != 3 or x_TBD.shape[2] != self.input_size:
            dims = "B, T" if self.batch_first else "T, B"
            raise ValueError(
                f"input must be [{dims}, {self.input_size}], or [T, {self.input_size}], got {list(x.shape)}"
            )
        results = self.run(x_TBD, hx, checked_lengths(lengths, x_TBD), masks, batched, return_states)
        if not batched:
            last = tuple(part.squeeze(1) for part in results.last)
            return Results(results.y_TBP, last, results.steps).restore(lambda part: part.squeeze(1))
        return results.restore(lambda part: part.transpose(0, 1) if self.batch_first else part)

    def run(
        self,
        x_TBD: Tensor,
        hx: Any,
        lengths: Tensor | None,
        masks: ModelMasks | None,
        batched: bool,
        return_states: bool,
    ) -> "Results":
        """Prepares the first states, then runs all layers on a time-first input with autocast off."""
        like = self.parameter_like()
        states = self.state_layout.initial(hx, x_TBD.shape[1], batched, like)
        device_type = x_TBD.device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            x_TBD, states = x_TBD.to(like.dtype), tuple(part.to(like.dtype) for part in states)
            with no_autocast(device_type):
                return self.run_layers(x_TBD, states, lengths, masks, return_states)
        return self.run_layers(x_TBD, states, lengths, masks, return_states)

    def run_layers(
        self,
        x_TBD: Tensor,
        states: State,
        lengths: Tensor | None,
        masks: ModelMasks | None,
        return_states: bool,
    ) -> "Results":
        """Runs all layers on a time-first input; `states` are the first states of all layers."""
        time, batch, _ = x_TBD.shape
        layout = self.state_layout
        if masks is None:
            masks = self.masks(time, batch, x_TBD.device)
        else:
            check_layer_masks(masks, x_TBD, self.mask_shape(time, batch))
        last: list[State] = []
        steps: list[State] = []
        for layer in range(self.num_layers):
            first = layout.layer_part(states, layer)
            new_steps, new = self.run_layer(layer, x_TBD, first, masks, lengths, return_states)
            h_TBP = new_steps[0][0] if self.directions == 1 else torch.cat([h for h, *_ in new_steps], -1)
            x_TBD = h_TBP + x_TBD if self.residual and layer > 0 else h_TBP
            last += new
            steps += new_steps
        y_TBP = x_TBD if masks.out is None else x_TBD * masks.out
        if return_states and y_TBP is steps[-1][0]:
            y_TBP = y_TBP.clone()  # a change of the output in place must not change the states
        return Results(y_TBP, layout.join(last), steps if return_states else None)

    def repr_arguments(self) -> Iterator[str]:
        """Yields the sizes, the arguments that differ from their defaults, `batch_first` and the dropout."""
        yield f"{self.input_size}, {self.hidden_size}"
        defaults: dict[str, Any] = {
            "num_layers": 1,
            "bias": True,
            "bidirectional": False,
            "proj_size": 0,
            "reverse": False,
            "residual": False,
            "layer_norm": False,
        }
        for name, value in defaults.items():
            if getattr(self, name) != value:
                yield f"{name}={getattr(self, name)}"
        yield f"batch_first={self.batch_first}"
        yield f"dropout={describe(self.dropout)}"

    @property
    def mode(self) -> str:
        """LSTM or GRU, the attribute that torch's modules have."""
        return self.torch_module.__name__

    def extra_repr(self) -> str:
        return ", ".join(self.repr_arguments())


def scaled(state: State, scale: float) -> State:
    """Returns a state, or those of all steps, with its hidden part h times `scale`."""
    h, *rest = state
    return (h * scale, *rest)


def with_recurrent_scale(masks: Masks, scale: float, like: Tensor) -> Masks:
    """Returns masks of a layer that also multiply the hidden state in the recurrent product by `scale`."""
    # not `_replace`, which torch.compile cannot trace before torch 2.7
    return Masks(masks.x, like.new_full((1, 1, 1, 1), scale) if masks.h is None else masks.h * scale, masks.c)


class Results(NamedTuple):
    """Outputs and states of all layers, time first."""

    y_TBP: Tensor  # [T, B, directions · P]
    last: State
    steps: list[State] | None  # the states of all steps, with `return_states`

    def restore(self, layout: Callable[[Tensor], Any]) -> tuple[Any, ...]:
        """Returns the results of `forward`; `layout` converts [T, B, …] to the layout of the input."""
        outputs = (layout(self.y_TBP), self.last if len(self.last) > 1 else self.last[0])
        return outputs if self.steps is None else (*outputs, [tuple(map(layout, s)) for s in self.steps])


def checked_lengths(lengths: Tensor | list[int] | None, x_TBD: Tensor) -> Tensor | None:
    """Returns lengths as int64 on the device of the input.

    Raises ValueError for lengths that do not fit. On a GPU or in compiled code, negative lengths raise
    RuntimeError later, when the device reads them: a check here would wait for the device. There, they are
    not noticed within a transform of `torch.func`.
    """
    if lengths is None:
        return None
    lengths = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    kernels.check_lengths(lengths, x_TBD)
    if not kernels.is_readable(lengths) and not in_transform():  # vmap has no rule for the assertion
        torch._assert_async((lengths >= 0).all(), "lengths must be at least 0")
    return lengths.to(x_TBD.device, torch.int64)


def pack_like(y_TBP: Tensor, lengths: Tensor, packed: PackedSequence) -> PackedSequence:
    """Packs an output in the order of a packed input."""
    if packed.sorted_indices is not None:
        order = packed.sorted_indices
        y_TBP, lengths = y_TBP.index_select(1, order), lengths[order.cpu()]
    data = pack_padded_sequence(y_TBP, lengths).data
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


class LSTM(Recurrent):
    """Stacked LSTM with the interface of `torch.nn.LSTM`.

    The state is (h, c), [L · directions, B, P] and [L · directions, B, H].
    """

    cell = Cell.lstm
    torch_module = nn.LSTM

    def run_cell(
        self,
        place: tuple[int, int],
        weights: Weights,
        x_TBD: Tensor,
        state: State,
        masks: Masks,
        lengths: Tensor | None,
        cells: bool,
    ) -> tuple[State, State]:
        h_BP, c_BH = state
        options = {
            "w_hr": self.projection(*place),
            "norms": self.norms(*place),
            "cells": cells,
            "lengths": lengths,
            **self.options,
        }
        y_TBP, h_BP, c_BH, *c_TBH = kernels.lstm(x_TBD, h_BP, c_BH, *weights, masks, **options)
        return (y_TBP, *c_TBH), (h_BP, c_BH)


class GRU(GRUVariant, Recurrent):
    """Stacked GRU with the interface of `torch.nn.GRU`; the state is h, [L · directions, B, H].

    The reset gate acts before the recurrent product of the candidate, as in the paper. With
    `reset_after=True` it acts after that product, as in `torch.nn.GRU` and cuDNN; `from_torch` sets this.
    `load_state_dict` warns where the weights come from the other variant, or from `torch.nn.GRU`. It cannot
    warn where the state_dict has lost its metadata, as in a safetensors file.
    """

    cell = Cell.gru
    torch_module = nn.GRU
    torch_variant: ClassVar[dict[str, Any]] = {"reset_after": True}

    def run_cell(
        self,
        place: tuple[int, int],
        weights: Weights,
        x_TBD: Tensor,
        state: State,
        masks: Masks,
        lengths: Tensor | None,
        cells: bool,
    ) -> tuple[State, State]:
        (h_BH,) = state
        options = {
            "norms": self.norms(*place),
            "lengths": lengths,
            "reset_after": self.reset_after,
            **self.options,
        }
        y_TBH, h_BH = kernels.gru(x_TBD, h_BH, *weights, masks, **options)
        return (y_TBH,), (h_BH,)
