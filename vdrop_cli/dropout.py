"""A dropout policy becomes mask tensors here; the cells know masks and never policies.

T time  B batch  D input size  H hidden size  G gates
"""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor

from vdrop_cli.config import Cell, Dropout, Policy, WordMask
from vdrop_cli.kernels import Masks

GATES = {Cell.lstm: 4, Cell.gru: 3}
NEW_EVERY_STEP = (Policy.zaremba, Policy.naive)
KEEP_BITS = 16  # a mask's elements are as many random bits, compared with the drop probability
HASH_BITS = 24  # a word's fate is one of 2^24 equally likely values, compared with the drop probability


@dataclass(frozen=True)
class Stream:
    """Random numbers as a function of (seed, path): the same whatever was drawn before, so that a run resumes without replay."""

    path: tuple[str | int, ...]

    def at(self, *more: str | int) -> "Stream":
        return Stream((*self.path, *more))

    def generator(self) -> torch.Generator:
        """A fresh generator on the CPU, so that every device sees the same numbers."""
        digest = hashlib.blake2b(repr(self.path).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class MaskShape:
    """What the masks are for: `input_sizes` holds D of each layer."""

    time: int
    batch: int
    input_sizes: tuple[int, ...]
    hidden_size: int
    gates: int


class WordMasks(NamedTuple):
    """Which words are dropped: never a table of [B, V], but a rule worked out where a word stands, so it costs O(T·B).

    `by_type` holds a key for each sequence, and a word's fate is a hash of key and word; `by_token` a mask for each place.
    Deviation: by type is the default, as in the paper; the authors' code had it by token until 2017-01.
    """

    p: float
    by_type_B: Tensor | None = None
    by_token_TB: Tensor | None = None

    def keep(self, ids_TB: Tensor) -> Tensor:
        """The factor on the embedding of each word, [T, B]: 0 or 1 / (1 - p)."""
        if self.by_type_B is None:
            assert self.by_token_TB is not None
            return self.by_token_TB
        threshold = threshold_of(self.p, HASH_BITS)
        fate_TB = (mix(self.by_type_B ^ mix(ids_TB)) >> 16) & (2**HASH_BITS - 1)
        kept_TB: Tensor = (fate_TB >= threshold) / (1 - threshold / 2**HASH_BITS)
        return kept_TB


def mix(x: Tensor) -> Tensor:
    """A hash of int64 numbers: multiply by odd constants, wrapping around, and fold the high half on the low."""
    for factor in (-0x61C8864680B583EB, -0x40A7B892E31B1A47):
        x = (x + 1) * factor
        x = x ^ ((x >> 32) & 0xFFFFFFFF)
    return x


class ModelMasks(NamedTuple):
    """All masks of one forward pass; None stands for all ones."""

    layers: list[Masks]
    word: WordMasks | None = None
    out: Tensor | None = None  # broadcastable to [T, B, H]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "ModelMasks":
        """On a device, and where a type is given, in that."""
        layers = [Masks(*(sent(mask, device, dtype) for mask in layer)) for layer in self.layers]
        word = self.word and WordMasks(self.word.p, sent(self.word.by_type_B, device), sent(self.word.by_token_TB, device, dtype))
        return ModelMasks(layers, word, sent(self.out, device, dtype))

    def pinned(self) -> "ModelMasks":
        """In memory that a GPU reads by itself."""
        layers = [Masks(*(pinned(mask) for mask in layer)) for layer in self.layers]
        word = self.word and WordMasks(self.word.p, pinned(self.word.by_type_B), pinned(self.word.by_token_TB))
        return ModelMasks(layers, word, pinned(self.out))


def pinned(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.pin_memory()


@overload
def sent(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor: ...
@overload
def sent(tensor: Tensor | None, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor | None: ...
def sent(tensor: Tensor | None, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor | None:
    """To its device; from memory that a GPU reads by itself, so that nothing waits for what is still to be done there."""
    if tensor is None:
        return None
    tensor = tensor.to(dtype or tensor.dtype)
    leaves = tensor.device.type == "cpu" and torch.device(device).type == "cuda"
    return (tensor.pin_memory() if leaves else tensor).to(device, non_blocking=leaves)


def threshold_of(p: float, bits: int) -> int:
    """The whole numbers below it, of those with so many bits, stand for «dropped»."""
    numbers = 1 << bits
    return min(max(round(p * numbers), 1), numbers - 1)


def keep_mask(p: float, shape: tuple[int, ...], generator: torch.Generator, *, divided: bool = True) -> Tensor | None:
    """0 with probability p, in steps of 2^-16, otherwise 1 / (1 - p), or 1; a random number of 64 bits serves four elements."""
    if p == 0:
        return None
    count, threshold = math.prod(shape), threshold_of(p, KEEP_BITS)
    bits = (
        torch.empty((count + 3) // 4, dtype=torch.int64, device="cpu")
        .random_(-(2**63), None, generator=generator)
        .view(torch.int16)[:count]
    )
    kept = torch.ge(bits, threshold - 2 ** (KEEP_BITS - 1), out=torch.empty(count, device="cpu"))
    return (kept.mul_(1 / (1 - threshold / 2**KEEP_BITS)) if divided else kept).view(shape)


def draw(dropout: Dropout, shape: MaskShape, stream: Stream, device: torch.device | str = "cpu", outputs: int | None = None) -> ModelMasks:
    """The masks of one chunk of text, by the policies of `config.Policy`: every sequence has its own (Gal & Ghahramani 2016, section 4).

    `outputs` is of how many steps the output is used; None: of all. The mask on the cell state is not divided by the keep probability:
    it is on the carried state itself, so that the quotient would come in anew at every step, and states and gradients would grow
    without bound (with p_c = 0.25 they are not numbers any more within an epoch of Penn Treebank).
    """
    generator = stream.generator()
    time = shape.time if dropout.policy in NEW_EVERY_STEP else 1
    gates = shape.gates if dropout.untied or dropout.policy is Policy.naive else 1
    by_type = dropout.word_mask is WordMask.type

    def keep(p: float, *sizes: int, divided: bool = True) -> Tensor | None:
        return keep_mask(p, (time, *sizes), generator, divided=divided)

    layers = [
        Masks(
            x=keep(dropout.p_x, gates, shape.batch, size),
            h=keep(dropout.p_h, gates, shape.batch, shape.hidden_size),
            c=keep(dropout.p_c, shape.batch, shape.hidden_size, divided=False),
        )
        for size in shape.input_sizes
    ]
    out = keep_mask(dropout.p_out, (min(time, outputs or time), shape.batch, shape.hidden_size), generator)
    word = None
    if dropout.p_word > 0 and by_type:
        keys_B = torch.randint(-(2**63), 2**63 - 1, (shape.batch,), generator=generator, device="cpu")
        word = WordMasks(dropout.p_word, by_type_B=keys_B)
    elif dropout.p_word > 0:
        word = WordMasks(dropout.p_word, by_token_TB=keep_mask(dropout.p_word, (shape.time, shape.batch), generator))
    return ModelMasks(layers, word, out).to(device)


def mean_masks(dropout: Dropout, layers: int, like: Tensor) -> ModelMasks:
    """The standard approximation: every mask replaced by its mean, which is one but for that on the cell state (Moon et al. 2015)."""
    kept = 1 - threshold_of(dropout.p_c, KEEP_BITS) / 2**KEEP_BITS
    return ModelMasks([Masks(c=like.new_full((1, 1, 1), kept) if dropout.p_c > 0 else None)] * layers)


def side_by_side(masks: list[ModelMasks]) -> ModelMasks:
    """The masks of several batches as those of one, joined along the batch dimension."""

    def join(tensors: list[Tensor | None], dim: int) -> Tensor | None:
        return None if tensors[0] is None else torch.cat([t for t in tensors if t is not None], dim)

    layers = [
        Masks(join([m.x for m in layer], 2), join([m.h for m in layer], 2), join([m.c for m in layer], 1))
        for layer in zip(*(m.layers for m in masks), strict=True)
    ]
    words = [m.word for m in masks if m.word is not None]
    word = None
    if words:
        by_type, by_token = join([w.by_type_B for w in words], 0), join([w.by_token_TB for w in words], 1)
        word = WordMasks(words[0].p, by_type, by_token)
    return ModelMasks(layers, word, join([m.out for m in masks], 1))
