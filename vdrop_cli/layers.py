"""`LSTM` and `GRU` with dropout on inputs, recurrence or cell state: constructors, weights, states and
outputs of `torch.nn`'s modules.

T time  B batch  D input size  H hidden size  P size of the hidden state (H, or that of a projection)  L
layers
"""

import math
import numbers
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from vdrop_cli import kernels
from vdrop_cli.dropout import GATES, MaskShape, ModelMasks, WordMasks, mean_masks, new_masks
from vdrop_cli.kernels import Masks, Norms
from vdrop_cli.kernels.masks import is_broadcastable
from vdrop_cli.policies import BY_LAYER, NO_DROPOUT, Cell, Dropout, Policy, Tie, WordMask, checked_probability

__all__ = ["GRU", "LSTM", "Dropout", "Masks", "ModelMasks", "Policy", "Tie", "WordMask", "WordMasks"]

Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # w_ih, w_hh, b_ih, b_hh
State = tuple[Tensor, ...]  # h and, for an LSTM, c; each [L, B, H]
STATES = {Cell.lstm: 2, Cell.gru: 1}


def weight_like(module: nn.Module, name: str) -> Tensor:
    """The parameter, or what is in its place: of its type and device, without computing a parametrized
    weight.
    """
    if parametrize.is_parametrized(module, name):
        return cast(Tensor, module.parametrizations[name].original)  # type: ignore[index, union-attr]
    return cast(Tensor, getattr(module, name))


def shape_of(part: object) -> str:
    """For messages."""
    return str(list(part.shape)) if isinstance(part, Tensor) else type(part).__name__


class MaskSampling(nn.Dropout):
    """The switch of a layer's masks, where tools for MC dropout look for it: new masks are drawn while
    `training` is true.

    It has no parameters and is never called. `p` is the largest probability of the layer, to be read only.
    """

    def __init__(self, dropout: Dropout) -> None:
        nn.Module.__init__(self)
        self.dropout, self.inplace = dropout, False

    @property
    def p(self) -> float:  # type: ignore[override]
        return self.dropout.largest

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the switch of a layer's masks is not to be called; call the layer")

    def extra_repr(self) -> str:
        return describe(self.dropout)


def describe(dropout: Dropout) -> str:
    """The policy with what is not as it is by default, as `variational(p_x=0.3, p_h=0.3)`."""
    usual = Dropout(dropout.policy)
    given = [(f.name, getattr(dropout, f.name)) for f in fields(dropout) if f.name != "policy"]
    changed = [f"{name}={value}" for name, value in given if value != getattr(usual, name)]
    return f"{dropout.policy}({', '.join(changed)})" if changed else str(dropout.policy)


def chosen_dropout(
    dropout: Dropout | float | None,
    variational: float | None,
    recurrent_dropout: float | None,
    layers: int,
    *,
    output: bool = True,
) -> Dropout:
    """The policy that the arguments stand for; `output`: whether `variational` is on the output, too. A
    ValueError for more than one.
    """
    given = {
        "dropout": dropout or None,
        "variational": variational,
        "recurrent_dropout": recurrent_dropout,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"give one of {' and '.join(names)}; dropout=Dropout(…) combines probabilities")
    if isinstance(dropout, Dropout):
        return dropout
    if variational is not None:
        p = checked_probability("variational", variational)
        return Dropout(Policy.variational, p_x=p, p_h=p, p_out=p if output else 0.0)
    if recurrent_dropout is not None:
        return Dropout(Policy.variational, p_h=checked_probability("recurrent_dropout", recurrent_dropout))
    if not dropout:
        return NO_DROPOUT
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real):
        raise TypeError(f"dropout must be a Dropout or a probability, got {dropout!r}")
    return Dropout(Policy.zaremba, p_x=(0.0, *[checked_probability("dropout", dropout)] * (layers - 1)))


def check_policy(dropout: object, cell: Cell, layers: int) -> None:
    """Refuses what a layer cannot do."""
    if not isinstance(dropout, Dropout):
        raise TypeError(f'dropout must be a Dropout, as Dropout("variational", p_h=0.3), got {dropout!r}')
    if dropout.policy is Policy.moon and cell is not Cell.lstm:
        raise ValueError("policy must be another than moon for a GRU, which has no cell state")
    if dropout.p_word > 0:
        raise ValueError(
            f"p_word must be 0 in a layer, which knows no words, got {dropout.p_word}; use WordDropout(p)"
        )
    for name in BY_LAYER:
        dropout.of_layers(name, layers)


class Recurrent(nn.Module):
    """Stacked layers of one kind of cell. Arguments, weights and results are those of `torch.nn.LSTM` and
    `torch.nn.GRU`.

    Dropout is one of
    - `dropout=Dropout(policy, …)`, with a probability for each place;
    - `dropout=p`: as in torch, between layers and new at every step;
    - `variational=p`: held over the sequence, on the inputs of all layers, the recurrence and the output;
    - `recurrent_dropout=p`: held over the sequence, on the recurrence alone, one mask for all gates (as in
    Keras).

    In training mode every call draws new masks from torch's global random state, unless it is given `masks`;
    in evaluation mode their means take their place, unless given. Whether masks are drawn is decided by
    `sampling.training`, which follows `train()` and `eval()`. `reverse` makes layers that read backward in
    time. `compute_dtype` is the type in which matrix products are multiplied (None: that of the weights);
    under autocast it is no other, and inputs and states are taken in the type of the weights. `backend` is
    one of `kernels.BACKENDS`, or `auto`, which depends on the device of the input. `recompute` makes `triton`
    keep less in memory. `layer_norm` normalises inside the cell (Ba et al. 2016, see `kernels.Norms`), with
    parameters `norm_…` of its own. `triton` has none. Projections (`proj_size`, LSTM) are computed by
    `reference`, a plain loop.
    """

    cell: ClassVar[Cell]
    torch_module: ClassVar[type[nn.RNNBase]]  # the module of `torch.nn` whose weights it takes
    torch_variant: ClassVar[dict[str, Any]] = {}  # the options with which it computes what that one does

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
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
        layer_norm: bool = False,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= proj_size < hidden_size:
            raise ValueError(
                f"proj_size must be at least 0 and below hidden_size={hidden_size}, got {proj_size}"
            )
        if proj_size and self.cell is not Cell.lstm:
            raise ValueError(f"proj_size must be 0 for a {type(self).__name__}: only an LSTM has projections")
        if bidirectional and reverse:
            raise ValueError(
                "reverse must be False with bidirectional=True, which has a backward layer already"
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional, self.proj_size = (
            bias,
            batch_first,
            bidirectional,
            proj_size,
        )
        self.reverse, self.layer_norm, self.recompute = reverse, layer_norm, recompute
        self.backend, self.compute_dtype = kernels.known(backend), compute_dtype
        self.sampling = MaskSampling(NO_DROPOUT)
        self.dropout = chosen_dropout(dropout, variational, recurrent_dropout, num_layers)
        if num_layers == 1 and dropout and not isinstance(dropout, Dropout):
            level = 2 if type(self).__init__ is Recurrent.__init__ else 3
            warnings.warn("dropout between layers has no effect with num_layers=1", stacklevel=level)
        for layer in range(num_layers):
            for suffix in self.suffixes(layer):
                for name, shape in self.weight_shapes(layer).items():
                    self.register_parameter(
                        f"{name}{suffix}", nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    )
        self.reset_parameters()

    @property
    def dropout(self) -> Dropout:
        """What is dropped; it may be set to another policy at any time."""
        return self.sampling.dropout

    @dropout.setter
    def dropout(self, dropout: Dropout) -> None:
        check_policy(dropout, self.cell, self.num_layers)
        self.sampling.dropout = dropout

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "dropout" and isinstance(
            value, nn.Module
        ):  # which would be taken for a child, and change nothing
            raise TypeError(f"dropout must be a Dropout, got the module {value}")
        super().__setattr__(name, value)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def state_size(self) -> int:
        """Of the hidden state h."""
        return self.proj_size or self.hidden_size

    def suffixes(self, layer: int) -> list[str]:
        """Of the names of the weights of a layer, one for each direction."""
        return [f"_l{layer}", f"_l{layer}_reverse"][: self.directions]

    def weight_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Of one layer and direction, in torch's order."""
        rows = GATES[self.cell] * self.hidden_size
        width = self.input_size if layer == 0 else self.directions * self.state_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, width),
            "weight_hh": (rows, self.state_size),
        }
        if self.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, self.hidden_size)
        if self.layer_norm:
            shapes |= {"norm_ih": (rows,), "norm_hh": (rows,)}
            if self.cell is Cell.lstm:
                shapes |= {"norm_c": (self.hidden_size,), "norm_c_bias": (self.hidden_size,)}
        return shapes

    def reset_parameters(self) -> None:
        """Uniform in ±1/√H, as `torch.nn.LSTM`, and with the same random numbers; gains of layer norm are 1,
        its biases 0.
        """
        limit = 1 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith("norm_"):
                nn.init.constant_(parameter, 0.0 if "bias" in name else 1.0)
            else:
                nn.init.uniform_(parameter, -limit, limit)

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
        """A layer that computes what `module` does, with a copy of its weights: their sizes, dtype, device
        and mode.

        Its dropout between layers is replaced by that which is given here, if any.
        """
        name = cls.torch_module.__name__
        if not isinstance(module, cls.torch_module):
            raise TypeError(f"module must be a torch.nn.{name}, got {type(module).__name__}")
        if parametrize.is_parametrized(module):
            raise ValueError(
                "module must have plain weights: remove its parametrizations first "
                "(torch.nn.utils.parametrize)"
            )
        given = (dropout, variational, recurrent_dropout)
        options: dict[str, Any] = {
            "backend": backend,
            "compute_dtype": compute_dtype,
            "recompute": recompute,
            **cls.torch_variant,
        }
        options |= {"variational": variational, "recurrent_dropout": recurrent_dropout}
        options["dropout"] = module.dropout if given == (None, None, None) else dropout
        for option in ("bias", "batch_first", "bidirectional", "proj_size"):
            options[option] = getattr(module, option)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
            layers = cls(module.input_size, module.hidden_size, module.num_layers, **options)
        for parameter in list(layers._parameters):
            weight = getattr(module, parameter)
            copied = weight.detach().clone(memory_format=torch.contiguous_format)
            setattr(layers, parameter, nn.Parameter(copied, requires_grad=weight.requires_grad))
        return layers.train(module.training)

    def weights(self, layer: int, direction: int = 0) -> Weights:
        """As they are now: parameters, or what was put in their place. Biases that the layer lacks are
        zeros.
        """
        suffix = self.suffixes(layer)[direction]
        w_ih, w_hh = getattr(self, f"weight_ih{suffix}"), getattr(self, f"weight_hh{suffix}")
        if self.bias:
            return w_ih, w_hh, getattr(self, f"bias_ih{suffix}"), getattr(self, f"bias_hh{suffix}")
        zeros = w_ih.new_zeros(len(w_ih))
        return w_ih, w_hh, zeros, zeros

    def projection(self, layer: int, direction: int = 0) -> Tensor | None:
        """The weights [P, H] that make the hidden state smaller, if any."""
        return getattr(self, f"weight_hr{self.suffixes(layer)[direction]}") if self.proj_size else None

    def norms(self, layer: int, direction: int = 0) -> Norms | None:
        """The parameters of layer norm, if any."""
        if not self.layer_norm:
            return None
        suffix = self.suffixes(layer)[direction]
        names = ("norm_ih", "norm_hh", "norm_c", "norm_c_bias")[: 2 * STATES[self.cell]]
        return Norms(*(getattr(self, name + suffix) for name in names))

    def parameter_like(self) -> Tensor:
        """A weight, of the type and device of all."""
        return weight_like(self, "weight_ih_l0")

    def flatten_parameters(self) -> None:
        """Nothing, as the weights need no such order; it is here for scripts that call it of torch's
        modules.
        """

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, as torch's modules give them."""
        places = [(layer, suffix) for layer in range(self.num_layers) for suffix in self.suffixes(layer)]
        return [
            [getattr(self, name + suffix) for name in self.weight_shapes(layer)] for layer, suffix in places
        ]

    @property
    def options(self) -> dict[str, Any]:
        """How the kernels are to work."""
        return {"backend": self.backend, "compute_dtype": self.compute_dtype, "recompute": self.recompute}

    def mask_shape(self, time: int, batch: int) -> MaskShape:
        widths = (self.input_size, *[self.directions * self.state_size] * (self.num_layers - 1))
        return MaskShape(
            time, batch, widths, self.hidden_size, GATES[self.cell], self.directions, self.proj_size
        )

    def zero_state(self, batch: int) -> State:
        """The state that a sequence begins with where none is given, [L · directions, B, P] and, for an LSTM,
        [L · directions, B, H].
        """
        sizes = (self.state_size, self.hidden_size)[: STATES[self.cell]]
        like = self.parameter_like()
        return tuple(like.new_zeros(self.num_layers * self.directions, batch, size) for size in sizes)

    def masks(self, time: int, batch: int, device: torch.device | str | None = None) -> ModelMasks:
        """Masks on the device (None: that of the weights): new ones in training mode, their means in
        evaluation mode.

        For held masks in MC dropout draw them with `sampling.train()`, or inside
        `sampling.mc_dropout(model)`. New ones are from torch's global random state, which stays as it is
        where nothing is ever dropped.
        """
        if not self.sampling.training:
            return self.mean_masks()
        like = self.parameter_like()
        return new_masks(
            self.dropout, self.mask_shape(time, batch), torch.device(device or like.device), like.dtype
        )

    def mean_masks(self) -> ModelMasks:
        """The means of all masks, used where none are drawn: the standard approximation."""
        return mean_masks(self.dropout, self.num_layers, self.parameter_like(), self.directions)

    def run_cell(
        self,
        place: tuple[int, int],
        x_TBD: Tensor,
        state: State,
        masks: Masks,
        lengths: Tensor | None,
        cells: bool,
    ) -> tuple[State, State]:
        """The layer and direction `place`: h of all steps (of an LSTM with `cells` c, too), and the last
        state, [B, P] and [B, H].
        """
        raise NotImplementedError

    def run_layer(
        self,
        layer: int,
        x_TBD: Tensor,
        states: State,
        masks: list[Masks],
        lengths: Tensor | None,
        cells: bool,
    ) -> tuple[list[State], list[State]]:
        """One layer: for each direction h of all steps (of an LSTM with `cells` c, too), the last state;
        `states` [directions, B, …].
        """
        steps, last = [], []
        for direction in range(self.directions):
            layer_masks, x = masks[direction], x_TBD
            backward = self.reverse or direction == 1
            if backward:
                order = reversed_order(len(x_TBD), lengths)
                x, layer_masks = reverse_time(x, order), reverse_masks(layer_masks, order)
            begin = tuple(part[direction] for part in states)
            new_steps, new = self.run_cell((layer, direction), x, begin, layer_masks, lengths, cells)
            steps.append(tuple(reverse_time(part, order) for part in new_steps) if backward else new_steps)
            last.append(new)
        return steps, last

    def checked_state(self, hx: Any, batch: int, batched: bool) -> State:
        """The states to begin with, each [L · directions, B, …]."""
        if hx is None:
            return self.zero_state(batch)
        parts: State = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"the state must be tensors, got {', '.join(map(shape_of, parts))}")
        if not batched:
            parts = tuple(part.unsqueeze(1) if part.dim() == 2 else part for part in parts)
        rows, sizes = (
            self.num_layers * self.directions,
            (self.state_size, self.hidden_size)[: STATES[self.cell]],
        )
        wanted, shapes = [[rows, batch, size] for size in sizes], [list(part.shape) for part in parts]
        if shapes != wanted:
            if self.cell is not Cell.lstm:
                names = f"h, {wanted[0]}"
            else:
                names = (
                    f"(h, c), each {wanted[0]}"
                    if wanted[0] == wanted[1]
                    else f"(h, c), {wanted[0]} and {wanted[1]}"
                )
            raise ValueError(f"the state must be {names}, got {', '.join(map(str, shapes))}")
        return parts

    def check_masks(self, masks: ModelMasks, x_TBD: Tensor) -> None:
        """Refuses masks that are not for this input; those of layers have their sizes checked by the
        kernels.
        """
        if not isinstance(masks, ModelMasks):
            raise TypeError(f"masks must be those of layer.masks(time, batch), got {type(masks).__name__}")
        time, batch, _ = x_TBD.shape
        if len(masks.layers) != self.num_layers * self.directions:
            raise ValueError(
                f"masks must be for {self.num_layers * self.directions} layers, got {len(masks.layers)}"
            )
        if masks.batch not in (None, batch):
            raise ValueError(f"masks must be of {batch} sequences like the input, got masks of {masks.batch}")
        if masks.time not in (None, time):
            raise ValueError(
                f"masks that are new at every step must be of {time} steps like the input, got masks of "
                f"{masks.time}"
            )
        if masks.word is not None:
            raise ValueError(
                "masks.word must be None: a layer knows no words; multiply the embedding by "
                "masks.word.keep(ids)"
            )
        if masks.out is not None:
            shape = (time, batch, self.directions * self.state_size)
            if masks.out.dtype != x_TBD.dtype or masks.out.device != x_TBD.device:
                raise ValueError(
                    f"masks.out must be {x_TBD.dtype} on {x_TBD.device} like the input, got "
                    f"{masks.out.dtype} on {masks.out.device}"
                )
            if not is_broadcastable(masks.out.shape, shape):
                raise ValueError(
                    f"masks.out must be broadcastable to {list(shape)}, got {list(masks.out.shape)}"
                )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | list[int] | None = None,
        masks: ModelMasks | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """The output and the last state, as `torch.nn`'s modules give them.

        `input` is [T, B, D], or [B, T, D] with `batch_first`, or [T, D] without a batch, or a PackedSequence.
        With `lengths` [B] the state is that after each sequence's last step, and the output is zero beyond
        it; lengths above T are T. Masks are of all sequences in the order that they came in, and those of
        backward layers are of places in the text.

        With `return_states` there is a third result: for each layer and direction, in torch's order, the
        states of all steps as the output has them, (h,) or, for an LSTM, (h, c), before the output mask.
        """
        x = input
        if isinstance(x, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths must be None with a PackedSequence, which has its own")
            padded_TBD, own_lengths = pad_packed_sequence(x)
            if padded_TBD.dim() != 3 or padded_TBD.shape[2] != self.input_size:
                raise ValueError(f"input must be packed rows of {self.input_size}, got {list(x.data.shape)}")
            lengths = own_lengths.to(padded_TBD.device)
            return self.run(padded_TBD, hx, lengths, masks, True, return_states).given(
                lambda part: pack_like(part, own_lengths, x)
            )
        batched = x.dim() != 2
        if not batched and lengths is not None:
            raise ValueError("lengths must be None with an input without a batch")
        x_TBD = (
            x.unsqueeze(1) if not batched else x.transpose(0, 1) if self.batch_first and x.dim() == 3 else x
        )
        if x_TBD.dim() != 3 or x_TBD.shape[2] != self.input_size:
            wanted = "[B, T, {}]" if self.batch_first else "[T, B, {}]"
            raise ValueError(
                f"input must be {wanted.format(self.input_size)}, or [T, {self.input_size}], got "
                f"{list(x.shape)}"
            )
        results = self.run(x_TBD, hx, checked_lengths(lengths, x_TBD), masks, batched, return_states)
        if not batched:
            last = tuple(part.squeeze(1) for part in results.last)
            return results._replace(last=last).given(lambda part: part.squeeze(1))
        return results.given(lambda part: part.transpose(0, 1) if self.batch_first else part)

    def run(
        self,
        x_TBD: Tensor,
        hx: Any,
        lengths: Tensor | None,
        masks: ModelMasks | None,
        batched: bool,
        return_states: bool,
    ) -> "Results":
        """All layers."""
        time, batch, _ = x_TBD.shape
        states, like = self.checked_state(hx, batch, batched), self.parameter_like()
        if torch.is_autocast_enabled(x_TBD.device.type):
            x_TBD, states = x_TBD.to(like.dtype), tuple(part.to(like.dtype) for part in states)
        if masks is None:
            masks = self.masks(time, batch, x_TBD.device)
        else:
            self.check_masks(masks, x_TBD)
        last: list[State] = []
        steps: list[State] = []
        for layer in range(self.num_layers):
            here = slice(layer * self.directions, (layer + 1) * self.directions)
            begin = tuple(part[here] for part in states)
            new_steps, new = self.run_layer(layer, x_TBD, begin, masks.layers[here], lengths, return_states)
            x_TBD = new_steps[0][0] if self.directions == 1 else torch.cat([h for h, *_ in new_steps], -1)
            last += new
            steps += new_steps
        y_TBP = x_TBD if masks.out is None else x_TBD * masks.out
        return Results(
            y_TBP,
            tuple(torch.stack(part) for part in zip(*last, strict=True)),
            steps if return_states else None,
        )

    def repr_arguments(self) -> Iterator[str]:
        """The sizes, what is not as by default, and always `batch_first` and the dropout."""
        yield f"{self.input_size}, {self.hidden_size}"
        usual: dict[str, Any] = {
            "num_layers": 1,
            "bias": True,
            "bidirectional": False,
            "proj_size": 0,
            "reverse": False,
            "layer_norm": False,
        }
        for name, value in usual.items():
            if getattr(self, name) != value:
                yield f"{name}={getattr(self, name)}"
        yield f"batch_first={self.batch_first}"
        yield f"dropout={describe(self.dropout)}"

    @property
    def mode(self) -> str:
        """LSTM or GRU, as torch's layers name themselves."""
        return self.torch_module.__name__

    def extra_repr(self) -> str:
        return ", ".join(self.repr_arguments())


class Results(NamedTuple):
    """Of all layers, time first."""

    y_TBP: Tensor  # [T, B, directions · P]
    last: State
    steps: list[State] | None  # the states of all steps, where they were asked for

    def given(self, like_input: Callable[[Tensor], Any]) -> tuple[Any, ...]:
        """As a layer gives them; `like_input` brings what is [T, B, …] to the form of the input."""
        found = (like_input(self.y_TBP), self.last if len(self.last) > 1 else self.last[0])
        return (
            found if self.steps is None else (*found, [tuple(map(like_input, state)) for state in self.steps])
        )


def checked_lengths(lengths: Tensor | list[int] | None, x_TBD: Tensor) -> Tensor | None:
    """As int64 on the device of the input.

    Raises ValueError; negative lengths on a GPU, which is not waited for, or in compiled code are a
    RuntimeError once they are read.
    """
    if lengths is None:
        return None
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be whole numbers, got {lengths.dtype}")
    if lengths.shape != (x_TBD.shape[1],):
        raise ValueError(f"lengths must be [{x_TBD.shape[1]}], got {list(lengths.shape)}")
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async((lengths >= 0).all(), "lengths must be at least 0")
    elif bool((lengths < 0).any()):
        raise ValueError(f"lengths must be at least 0, got {int(lengths.min())}")
    return lengths.to(x_TBD.device, torch.int64)


def pack_like(y_TBP: Tensor, lengths: Tensor, packed: PackedSequence) -> PackedSequence:
    """The output in the order of a packed input."""
    if packed.sorted_indices is not None:
        order = packed.sorted_indices
        y_TBP, lengths = y_TBP.index_select(1, order), lengths[order.cpu()]
    data = pack_padded_sequence(y_TBP, lengths).data
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def reversed_order(time: int, lengths: Tensor | None) -> Tensor | None:
    """Which step [T, B] comes at each step of a backward layer: the last of each sequence first; padding
    stays where it is.
    """
    if lengths is None:
        return None
    step_T1 = torch.arange(time, device=lengths.device)[:, None]
    lengths = lengths.clamp(max=time)
    return torch.where(step_T1 < lengths, lengths - 1 - step_T1, step_T1)


def reverse_time(x_TBX: Tensor, order_TB: Tensor | None) -> Tensor:
    """Steps in that order; None: from the last to the first."""
    if order_TB is None:
        return x_TBX.flip(0)
    return x_TBX.gather(0, order_TB[..., None].expand(-1, -1, x_TBX.shape[-1]))


def reverse_mask(mask: Tensor | None, order_TB: Tensor | None) -> Tensor | None:
    """A mask [T|1, …, B|1, X], for its places in the text."""
    if mask is None or len(mask) == 1:
        return mask
    if order_TB is None:
        return mask.flip(0)
    time, batch = order_TB.shape
    mask = mask.expand(*mask.shape[:-2], batch, mask.shape[-1])
    index = order_TB.view(time, *[1] * (mask.dim() - 3), batch, 1)
    return mask.gather(0, index.expand(mask.shape))


def reverse_masks(masks: Masks, order_TB: Tensor | None) -> Masks:
    return Masks(*(reverse_mask(mask, order_TB) for mask in masks))


class LSTM(Recurrent):
    """Stacked LSTM, as `torch.nn.LSTM`; the state is (h, c), [L · directions, B, P] and [L · directions, B,
    H].
    """

    cell = Cell.lstm
    torch_module = nn.LSTM

    def run_cell(
        self,
        place: tuple[int, int],
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
        y_TBP, h_BP, c_BH, *c_TBH = kernels.lstm(x_TBD, h_BP, c_BH, *self.weights(*place), masks, **options)
        return (y_TBP, *c_TBH), (h_BP, c_BH)


class GRU(Recurrent):
    """Stacked GRU; the state is h, [L · directions, B, H].

    The reset gate acts before the recurrent product of the candidate, as in the paper. With the same weights
    `torch.nn.GRU` computes something else: there, as in cuDNN, it acts after that product, which is
    `reset_after=True`. `from_torch` sets it; `load_state_dict` cannot notice that it is missing, as both
    variants have weights of the same names and shapes.
    """

    cell = Cell.gru
    torch_module = nn.GRU
    torch_variant: ClassVar[dict[str, Any]] = {"reset_after": True}

    def __init__(self, *args: Any, reset_after: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reset_after = reset_after

    def run_cell(
        self,
        place: tuple[int, int],
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
        y_TBH, h_BH = kernels.gru(x_TBD, h_BH, *self.weights(*place), masks, **options)
        return (y_TBH,), (h_BH,)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reset_after={self.reset_after}"
