"""The dropout policy of layers and cells: how arguments choose it, its checks, and when masks are drawn."""

import numbers
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from vdrop_cli.policies import BETWEEN, BY_LAYER, NO_DROPOUT, Cell, Dropout, Policy, checked_probability


class DropoutSampling(nn.Dropout):
    """Decides whether a layer draws masks: it does while `training` of this module is true.

    It is an `nn.Dropout`, and its name begins with `Dropout`, so that tools for MC dropout find it by either.
    It has no parameters and is never called. `p` is the largest probability of the layer. It cannot be set,
    since a layer has several.
    """

    def __init__(self, dropout: Dropout) -> None:
        nn.Module.__init__(self)
        self.dropout, self.inplace = dropout, False

    @property
    def p(self) -> float:
        return self.dropout.max_probability

    @p.setter
    def p(self, p: float) -> None:
        raise AttributeError(
            f"sampling.p cannot be set, got {p}: the layer has a probability for each place; set "
            "layer.dropout = Dropout(…)"
        )

    @property
    def drops_weights(self) -> bool:
        """Whether it draws masks on weights, which a whole batch shares; `predict_mc` asks for this."""
        return self.dropout.p_weight > 0

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("sampling only switches the masks of a layer; call the layer")

    def extra_repr(self) -> str:
        return describe(self.dropout)


class DropoutModule(nn.Module):
    """A layer or cell with a dropout policy, which may be set at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.sampling = DropoutSampling(NO_DROPOUT)

    @property
    def dropout(self) -> Dropout:
        """The policy and its probabilities; it may be set at any time."""
        sampling: object = self.sampling
        if not isinstance(sampling, DropoutSampling):
            raise TypeError(
                f"sampling was replaced by the module {sampling}, which cannot switch the masks of a layer: "
                "tools that replace nn.Dropout do not work here; use mc_dropout(model)"
            )
        return sampling.dropout

    @dropout.setter
    def dropout(self, dropout: Dropout) -> None:
        self.check_dropout(dropout)
        self.sampling.dropout = dropout

    def check_dropout(self, dropout: Dropout) -> None:
        """Raises TypeError or ValueError for a policy that the module cannot apply."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register such a value as a child, and dropout would not change.
        if name == "dropout" and isinstance(value, nn.Module):
            raise TypeError(f"dropout must be a Dropout, got the module {value}")
        if name in ("variational", "recurrent_dropout"):  # it would change nothing
            raise AttributeError(
                f"{name} is an argument of {type(self).__name__}(…) and cannot be set, got {value!r}; set "
                "dropout = Dropout(…)"
            )
        super().__setattr__(name, value)


def describe(dropout: Dropout) -> str:
    """Writes a policy with the values that differ from its defaults, as `variational(p_x=0.3, p_h=0.3)`."""
    defaults = Dropout(dropout.policy)
    values = [(f.name, getattr(dropout, f.name)) for f in fields(dropout) if f.name != "policy"]
    changed = [f"{name}={value}" for name, value in values if value != getattr(defaults, name)]
    return f"{dropout.policy}({', '.join(changed)})" if changed else str(dropout.policy)


def chosen_dropout(
    dropout: Dropout | float | None,
    variational: float | None,
    recurrent_dropout: float | None,
    layers: int,
    *,
    output: bool = True,
) -> Dropout:
    """Returns the policy that the shorthand arguments stand for.

    `output`: whether `variational` also drops from the output. Raises ValueError where more than one is set.
    """
    arguments = {
        "dropout": dropout or None,
        "variational": variational,
        "recurrent_dropout": recurrent_dropout,
    }
    names = [name for name, value in arguments.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"give one of {' and '.join(names)}; dropout=Dropout(…) combines probabilities")
    if isinstance(dropout, Dropout):
        return dropout
    for name, value in (("variational", variational), ("recurrent_dropout", recurrent_dropout)):
        if isinstance(value, Sequence):
            raise TypeError(
                f"{name} must be one probability, got {value!r}; dropout=Dropout(…, p_x=[…], p_h=[…]) has "
                "one for each layer"
            )
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


def check_policy(
    dropout: object, cell: Cell, layers: int, *, is_chain: bool = True, layer_norm: bool = False
) -> None:
    """Raises TypeError or ValueError for a policy that the layer cannot apply.

    `is_chain`: whether the input of each layer but the first is the hidden state of the one below.
    `layer_norm`: whether the cell state is normalised.
    """
    if not isinstance(dropout, Dropout):
        raise TypeError(f'dropout must be a Dropout, as Dropout("variational", p_h=0.3), got {dropout!r}')
    if dropout.policy is Policy.moon and cell is not Cell.lstm:
        raise ValueError("policy must not be moon in a GRU, which has no cell state")
    if dropout.policy is Policy.moon and layer_norm:
        raise ValueError(
            "policy must not be moon with layer_norm=True: the norm of the cell state would give a dropped "
            "unit a value"
        )
    if dropout.p_word > 0:
        raise ValueError(
            f"p_word must be 0 in a layer, whose input has no words, got {dropout.p_word}; use WordDropout(p)"
        )
    if dropout.p_head > 0 or "p_head" in dropout.new_each_step:
        raise ValueError(
            f"p_head must be 0, and not in new_each_step, in a layer, which has no head, got {dropout.p_head}"
            "; use LockedDropout on a projection"
        )
    for name in BY_LAYER:
        dropout.layer_probabilities(name, layers)
    if layers == 1 and (dropout.p_between is not None or BETWEEN in dropout.new_each_step):
        raise ValueError("p_between must be unset, and not in new_each_step, in a single layer")
    if dropout.one_state_mask and not is_chain:
        raise ValueError(
            "one_state_mask must be False with bidirectional=True or residual=True, where the input of a "
            "layer is not one hidden state"
        )


def weight_like(module: nn.Module, name: str) -> Tensor:
    """Returns a tensor of the weight's type and device, without computing a parametrized weight."""
    if parametrize.is_parametrized(module, name):
        parts = cast(Any, module.parametrizations)[name]
        # a parametrization may compute the weight from several tensors
        return cast(Tensor, parts.original if hasattr(parts, "original") else parts.original0)
    return cast(Tensor, getattr(module, name))
