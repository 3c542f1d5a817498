"""Dropout beside the recurrent layers: with masks held over a sequence, on words, and on weights.

Each is an `nn.Dropout` to whatever looks for those (`mc_dropout`, tools for uncertainty): `training` decides
whether it drops.

T time  B batch  D size of a vector
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vdrop_cli.cells import RecurrentCell
from vdrop_cli.dropout import WordMasks, new_mask, new_word_masks
from vdrop_cli.policies import WordMask, checked_probability, choice


class LockedDropout(nn.Dropout):
    """One mask for all steps of a sequence, another for each sequence: on [T, B, D], or [B, T, D] with
    `batch_first`, or a step [B, D].

    In training mode every call draws a new mask unless it is given one (`masks`); a mask that is given is
    used in either mode.
    """

    def __init__(self, p: float = 0.5, batch_first: bool = False) -> None:
        checked_probability("p", p)
        super().__init__(p)
        self.batch_first = batch_first

    def masks(
        self, batch: int, size: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Tensor:
        """A new mask [1, B, D], or [B, 1, D] with `batch_first`: 0 with probability p, otherwise 1 / (1 - p);
        ones in evaluation mode.
        """
        checked_probability("p", self.p)
        shape = (batch, 1, size) if self.batch_first else (1, batch, size)
        return new_mask(self.p if self.training else 0.0, shape, device, dtype)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        if x.dim() == 2:  # one step of a loop
            time_dim = 1 if self.batch_first else 0
            return self(x.unsqueeze(time_dim), masks).squeeze(time_dim)  # type: ignore[no-any-return]
        if x.dim() != 3:
            raise ValueError(
                f"x must be {'[B, T, D]' if self.batch_first else '[T, B, D]'}, or [B, D], got "
                f"{list(x.shape)}"
            )
        if masks is None:
            if not self.training or self.p == 0:
                return x
            masks = self.masks(x.shape[0 if self.batch_first else 1], x.shape[2], x.device, x.dtype)
        wanted = (x.shape[0], 1, x.shape[2]) if self.batch_first else (1, *x.shape[1:])
        if masks.shape != wanted or masks.dtype != x.dtype:
            raise ValueError(
                f"masks must be {x.dtype} {list(wanted)} like x, got {masks.dtype} {list(masks.shape)}"
            )
        return x * masks

    def extra_repr(self) -> str:
        return f"p={self.p}, batch_first={self.batch_first}"


class WordDropout(nn.Dropout):
    """Drops words from a text: the vectors of dropped words are zero, those of the others are divided by 1 -
    p.

    With `by="type"` a word that is dropped is dropped wherever it stands in its sequence (Gal & Ghahramani
    2016, section 4.2), with `by="token"` each occurrence is dropped by itself. In training mode every call
    draws new masks unless it is given some; masks that are given are used in either mode. Vectors are [T, B,
    D] and words [T, B], or [B, T, D] and [B, T] with `batch_first`.
    """

    def __init__(self, p: float = 0.5, by: str | WordMask = "type", batch_first: bool = False) -> None:
        checked_probability("p", p)
        super().__init__(p)
        self.by, self.batch_first = choice(WordMask, "by", by), batch_first

    def masks(self, time: int, batch: int, device: torch.device | str = "cpu") -> WordMasks | None:
        """New masks; None where p is 0 and in evaluation mode. Those by type hold for any number of steps."""
        checked_probability("p", self.p)
        return new_word_masks(
            self.p if self.training else 0.0, self.by, time, batch, device, self.batch_first
        )

    def forward(self, x: Tensor, ids: Tensor, masks: WordMasks | None = None) -> Tensor:  # type: ignore[override]
        if x.dim() != 3 or x.shape[:2] != ids.shape:
            raise ValueError(f"x must be [*ids.shape, D] with ids {list(ids.shape)}, got {list(x.shape)}")
        if masks is None:
            if not self.training or self.p == 0:
                return x
            time, batch = reversed(ids.shape) if self.batch_first else ids.shape
            masks = self.masks(time, batch, x.device)
            assert masks is not None
        return x * masks.keep(ids)[..., None].to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}, by={self.by}, batch_first={self.batch_first}"


class DroppedWeight(nn.Dropout):
    """A weight with some of its elements dropped while training; new ones whenever it is computed, which is
    once a forward pass.
    """

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return weight
        checked_probability("p", self.p)
        return weight * new_mask(self.p, tuple(weight.shape), weight.device, weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def WeightDrop(module: nn.Module, p: float = 0.5, names: list[str] | None = None) -> nn.Module:
    """Drops elements of the recurrent weights of `module` in training, the same at every step (Merity et al.
    2018, AWD-LSTM).

    `names` are the weights, by default all `weight_hh…` of the module itself: of `nn.LSTM`, `nn.GRU` and the
    layers here. Cells are refused: they compute their weights at every step, so that elements would be
    dropped anew at every step. The module is changed, by `torch.nn.utils.parametrize`, and returned;
    `parametrize.remove_parametrizations` undoes it.
    """
    checked_probability("p", p)
    if isinstance(module, RecurrentCell | nn.RNNCellBase):
        raise ValueError(
            f"module must not be a {type(module).__name__}: its weights would be dropped anew at every "
            "step; use a layer"
        )
    own = [name for name, _ in module.named_parameters(recurse=False)]
    names = [name for name in own if name.startswith("weight_hh")] if names is None else names
    if not names:
        raise ValueError(f"names must be given: a {type(module).__name__} has no parameters weight_hh…")
    if unknown := [name for name in names if name not in own]:
        raise ValueError(
            f"names must be parameters of the {type(module).__name__}, which has no {', '.join(unknown)}"
        )
    for name in names:
        parametrize.register_parametrization(module, name, DroppedWeight(p))
    return module


__all__ = ["DroppedWeight", "LockedDropout", "WeightDrop", "WordDropout"]
