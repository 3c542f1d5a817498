"""Dropout outside the recurrent layers: with masks held over a sequence, on words, and on weights.

Each module is an `nn.Dropout`, so that `mc_dropout` and other tools for uncertainty find it.

T time  B batch  D size of a vector
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from vdrop_cli.cells import RecurrentCell
from vdrop_cli.dropout import WordMasks, new_mask, new_word_masks
from vdrop_cli.policies import Dropout, WordMask, checked_probability, choice


def check_floating(x: object) -> None:
    """Raises TypeError for what is no tensor, ValueError for whole numbers: 1 - p cannot divide them."""
    if not isinstance(x, Tensor):
        padded = "; pad it first (pad_packed_sequence)" if isinstance(x, PackedSequence) else ""
        raise TypeError(f"x must be a tensor, got {type(x).__name__}{padded}")
    if not (x.is_floating_point() or x.is_complex()):
        raise ValueError(f"x must be of a floating-point type, got {x.dtype}")


class LockedDropout(nn.Dropout):
    """Dropout with one mask for all steps of a sequence, and another for each sequence.

    The input is [T, B, D], or [B, T, D] with `batch_first`, or one step [B, D]. In training mode every call
    without `masks` draws a new mask with drop probability `p`. The exception is a single step, which needs
    `masks` that were drawn once for its sequence. `masks` that are passed are used in either mode. Raises
    ValueError for a probability outside [0, 1), for shapes that do not fit, and for a single step in training
    mode without `masks`.
    """

    def __init__(self, p: float = 0.5, batch_first: bool = False) -> None:
        checked_probability("p", p)
        super().__init__(p)
        self.batch_first = batch_first

    def masks(
        self, batch: int, size: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Tensor:
        """Draws a mask [1, B, D], or [B, 1, D] with `batch_first`; ones in evaluation mode.

        Elements are 0 with probability p, otherwise 1 / (1 - p).
        """
        checked_probability("p", self.p)
        shape = (batch, 1, size) if self.batch_first else (1, batch, size)
        return new_mask(self.p if self.training else 0.0, shape, device, dtype)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Returns `x` times one mask for all steps, in the shape of `x`.

        `masks` is a mask from `masks(batch, size, x.device, x.dtype)`. Raises ValueError for a shape, type or
        device that does not fit.
        """
        check_floating(x)
        if x.dim() == 2:  # one step of a loop
            if masks is None and self.training and self.p > 0:
                raise ValueError(
                    "masks are required for a step [B, D] in training mode: masks = dropout.masks(batch, "
                    "size, x.device, x.dtype) once for a sequence, then masks=masks"
                )
            time_dim = 1 if self.batch_first else 0
            return self(x.unsqueeze(time_dim), masks).squeeze(time_dim)  # type: ignore[no-any-return]
        if x.dim() != 3:
            raise ValueError(
                f"x must be {'[B, T, D]' if self.batch_first else '[T, B, D]'}, or [B, D], got "
                f"{list(x.shape)}"
            )
        if masks is not None and not isinstance(masks, Tensor):
            raise TypeError(f"masks must be a tensor, got {type(masks).__name__}; p is set by dropout.p = …")
        if masks is None:
            if not self.training or self.p == 0:
                return x
            masks = self.masks(x.shape[0 if self.batch_first else 1], x.shape[2], x.device, x.dtype)
        expected = (x.shape[0], 1, x.shape[2]) if self.batch_first else (1, *x.shape[1:])
        if masks.shape != expected or masks.dtype != x.dtype or masks.device != x.device:
            raise ValueError(
                f"masks must be {x.dtype} {list(expected)} on {x.device} like x, got {masks.dtype} "
                f"{list(masks.shape)} on {masks.device}; draw them by "
                "masks(batch, size, x.device, x.dtype)"
            )
        return x * masks

    def extra_repr(self) -> str:
        return f"p={self.p}, batch_first={self.batch_first}"


class WordDropout(nn.Dropout):
    """Drops words from a text: sets their vectors to zero and divides all others by 1 - p.

    With `by="type"` a dropped word is dropped wherever it occurs in its sequence (Gal & Ghahramani 2016,
    section 4.2); with `by="token"` each occurrence is dropped independently. Vectors are [T, B, D] and words
    [T, B], or [B, T, D] and [B, T] with `batch_first`, or those of one step, [B, D] and [B]. In training mode
    every call without `masks` draws new ones. The exception is a single step with `by="type"`, which needs
    `masks` that were drawn once for its sequence. `masks` that are passed are used in either mode. Raises
    ValueError for a probability outside [0, 1), for shapes that do not fit, and for a single step by type in
    training mode without `masks`.
    """

    def __init__(self, p: float = 0.5, by: str | WordMask = "type", batch_first: bool = False) -> None:
        checked_probability("p", p)
        super().__init__(p)
        self.by, self.batch_first = choice(WordMask, "by", by), batch_first

    def masks(self, time: int, batch: int, device: torch.device | str = "cpu") -> WordMasks | None:
        """Draws masks; returns None where p is 0 and in evaluation mode.

        Masks by type fit any number of steps.
        """
        checked_probability("p", self.p)
        return new_word_masks(
            self.p if self.training else 0.0, self.by, time, batch, device, self.batch_first
        )

    def forward(self, x: Tensor, ids: Tensor, masks: WordMasks | None = None) -> Tensor:  # type: ignore[override]
        """Returns the vectors `x` of the words `ids`, those of dropped words zero.

        `x` is [T, B, D] and `ids` [T, B], or [B, T, D] and [B, T] with `batch_first`; of one step [B, D] and
        [B]. `masks` come from `masks(time, batch, x.device)`, where `time` is 1 for a single step by token.
        Raises ValueError for shapes that do not fit.
        """
        check_floating(x)
        if not isinstance(ids, Tensor):
            raise TypeError(f"ids must be a tensor, got {type(ids).__name__}")
        if ids.dim() not in (1, 2) or x.dim() != ids.dim() + 1 or x.shape[:-1] != ids.shape:
            raise ValueError(f"x must be [*ids.shape, D] with ids {list(ids.shape)}, got {list(x.shape)}")
        if ids.dim() == 1:  # one step of a loop
            if masks is None and self.training and self.p > 0 and self.by is WordMask.type:
                raise ValueError(
                    "masks are required for a step [B, D] in training mode: masks = dropout.masks(time, "
                    "batch, x.device) once for a sequence, then masks=masks"
                )
            time_dim = 1 if self.batch_first else 0
            return self(x.unsqueeze(time_dim), ids.unsqueeze(time_dim), masks).squeeze(time_dim)  # type: ignore[no-any-return]
        if masks is None:
            if not self.training or self.p == 0:
                return x
            time, batch = reversed(ids.shape) if self.batch_first else ids.shape
            masks = self.masks(time, batch, x.device)
            assert masks is not None
        if not isinstance(masks, WordMasks):
            raise TypeError(
                f"masks must be WordMasks, such as words.masks(time, batch), got {type(masks).__name__}"
            )
        if masks.batch_first != self.batch_first:  # sequences keep their masks in either layout
            masks = replace(masks, batch_first=self.batch_first)
        if masks.device != ids.device:
            raise ValueError(
                f"masks must be on {ids.device} like ids, got {masks.device}; draw them by masks(time, "
                "batch, x.device)"
            )
        return x * masks.keep(ids)[..., None].to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}, by={self.by}, batch_first={self.batch_first}"


class DropoutOnWeights(nn.Dropout):
    """A parametrization that drops elements of a weight in training, resampled once per forward pass."""

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return weight
        checked_probability("p", self.p)
        return weight * new_mask(self.p, tuple(weight.shape), weight.device, weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def WeightDrop(module: nn.Module, p: float = 0.5, names: Sequence[str] | None = None) -> nn.Module:
    """Drops elements of the recurrent weights of a layer in training, the same ones at every step.

    Merity et al. 2018 (AWD-LSTM). `names` are the weights, by default all `weight_hh…` of `module`:
    `nn.LSTM`, `nn.GRU` or a layer of this library. The module itself is changed, by
    `torch.nn.utils.parametrize`, and returned; `parametrize.remove_parametrizations` with
    `leave_parametrized=False` undoes it (by default, one draw of the mask would stay in the weights). It
    renames the weights in `state_dict`, so load weights of a plain module before. Raises ValueError for a
    cell, which would resample its weights at every step, for a layer with `p_weight`, and for unknown names,
    TypeError for names that are no list.
    """
    checked_probability("p", p)
    if isinstance(module, RecurrentCell | nn.RNNCellBase):
        raise ValueError(
            f"module must not be a {type(module).__name__}: its weights would be dropped anew at every "
            "step; use a layer"
        )
    if isinstance(names, str):
        raise TypeError(f"names must be a list of names, got {names!r}; write [{names!r}]")
    own = [name for name, _ in module.named_parameters(recurse=False)]
    names = [name for name in own if name.startswith("weight_hh")] if names is None else names
    dropout = getattr(module, "dropout", None)
    is_recurrent = any(name.startswith("weight_hh") for name in names)
    if is_recurrent and isinstance(dropout, Dropout) and dropout.p_weight > 0:
        raise ValueError(
            f"p_weight of the {type(module).__name__} must be 0, got {dropout.p_weight}: its recurrent "
            "weights would be dropped twice; choose one of the two"
        )
    if not names:
        raise ValueError(f"names are required: a {type(module).__name__} has no parameters weight_hh…")
    if unknown := [name for name in names if name not in own]:
        raise ValueError(
            f"names must be parameters of the {type(module).__name__}, which has no {', '.join(unknown)}"
        )
    for name in names:
        parametrize.register_parametrization(module, name, DropoutOnWeights(p))
    return module


__all__ = ["DropoutOnWeights", "LockedDropout", "WeightDrop", "WordDropout"]
