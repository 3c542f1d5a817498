"""A dropout policy becomes mask tensors here; the cells know masks and never policies.

T time  B batch  D input size  H hidden size  G gates
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import overload

import torch
from torch import Tensor

from vdrop_cli.kernels import Masks
from vdrop_cli.kernels.derivatives import in_transform
from vdrop_cli.kernels.masks import BATCH_DIMS
from vdrop_cli.policies import Cell, Dropout, Policy, Tie, WordMask
from vdrop_cli.random_streams import Stream, new_stream

GATES = {Cell.lstm: 4, Cell.gru: 3}
CANDIDATE = {4: 2, 3: 2}  # the gate without a sigmoid, by the number of gates: g of i f g o, n of r z n
KEEP_BITS = 16  # a mask's elements are as many random bits, compared with the drop probability
HASH_BITS = (
    24  # whether a word is dropped is one of 2^24 equally likely values, compared with the drop probability
)

Index = Tensor | Sequence[int]


@dataclass(frozen=True)
class MaskShape:
    """What the masks are for. `input_sizes` holds D of each layer; `directions` is 2 for bidirectional
    layers.
    """

    time: int
    batch: int
    input_sizes: tuple[int, ...]
    hidden_size: int
    gates: int
    directions: int = 1
    projected_size: int = 0  # of the hidden state of an LSTM with projections; 0: that is H

    @property
    def state_size(self) -> int:
        """Of the hidden state h."""
        return self.projected_size or self.hidden_size


def row_index(index: Index) -> Tensor:
    """Whole numbers, one for each row; a ValueError otherwise."""
    index = torch.as_tensor(index)
    if index.numel() == 0:
        index = index.long()
    if index.dim() != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
        raise ValueError(f"index must be a list of whole numbers, got {index.dtype} {list(index.shape)}")
    return index.long()


def select_rows(tensor: Tensor | None, dim: int, index: Tensor, batch: int | None) -> Tensor | None:
    """Rows of the batch; a dimension of 1 that stands for every sequence remains."""
    if tensor is None or (tensor.shape[dim] == 1 and batch != 1):
        return tensor
    return tensor.index_select(dim, index.to(tensor.device))


@dataclass(frozen=True, eq=False)
class WordMasks:
    """Which words are dropped: a rule that is worked out where a word stands, at a cost of O(T·B), and no
    table of [B, V].

    `by_type_B` holds a key for each sequence, and a hash of key and word decides whether the word is dropped;
    `by_token_TB` is a mask for each place.
    Deviation: by type is the default, as in the paper; the authors' code had it by token until 2017-01.
    """

    p: float
    by_type_B: Tensor | None = None
    by_token_TB: Tensor | None = None
    batch_first: bool = False  # how words are given

    def keep(self, ids: Tensor) -> Tensor:
        """The factor on the embedding of each word, 0 or 1 / (1 - p), in the shape of `ids`: [T, B], or [B,
        T] with `batch_first`.

        Raises ValueError where the words are not of as many sequences, or steps, as the masks.
        """
        if ids.dim() != 2:
            raise ValueError(f"ids must be [T, B], or [B, T] with batch_first, got {list(ids.shape)}")
        ids_TB = ids.T if self.batch_first else ids
        if self.by_type_B is None:
            assert self.by_token_TB is not None
            if ids_TB.shape != self.by_token_TB.shape:
                raise ValueError(
                    f"ids must be [T, B] = {list(self.by_token_TB.shape)} like the masks, got "
                    f"{list(ids_TB.shape)}"
                )
            keep_TB = self.by_token_TB
        else:
            if ids_TB.shape[1] != len(self.by_type_B):
                raise ValueError(
                    f"ids must be of {len(self.by_type_B)} sequences like the masks, got {ids_TB.shape[1]}"
                )
            threshold = threshold_of(self.p, HASH_BITS)
            hash_TB = (mix(self.by_type_B ^ mix(ids_TB.long())) >> 16) & (2**HASH_BITS - 1)
            keep_TB = (hash_TB >= threshold) / (1 - threshold / 2**HASH_BITS)
        return keep_TB.T if self.batch_first else keep_TB

    @property
    def batch(self) -> int:
        if self.by_type_B is not None:
            return len(self.by_type_B)
        assert self.by_token_TB is not None
        return self.by_token_TB.shape[1]

    def rows(self, index: Index) -> "WordMasks":
        """Those of some sequences, in the order of `index`."""
        index = row_index(index)
        return replace(
            self,
            by_type_B=select_rows(self.by_type_B, 0, index, self.batch),
            by_token_TB=select_rows(self.by_token_TB, 1, index, self.batch),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "WordMasks":
        """On a device, and where a type is given, factors by token in that."""
        by_type_B, by_token_TB = to_device(self.by_type_B, device), to_device(self.by_token_TB, device, dtype)
        return replace(self, by_type_B=by_type_B, by_token_TB=by_token_TB)

    def pinned(self) -> "WordMasks":
        """In memory that a GPU reads by itself."""
        return replace(self, by_type_B=pinned(self.by_type_B), by_token_TB=pinned(self.by_token_TB))

    def repeat(self, n: int) -> "WordMasks":
        """Those of each sequence n times, one after the other."""
        return self.rows(torch.arange(self.batch).repeat_interleave(n))


def mix(x: Tensor) -> Tensor:
    """A hash of int64 numbers: multiply by odd constants, wrapping around, and fold the high half on the
    low.
    """
    for factor in (-0x61C8864680B583EB, -0x40A7B892E31B1A47):
        x = (x + 1) * factor
        x = x ^ ((x >> 32) & 0xFFFFFFFF)
    return x


@dataclass(frozen=True, eq=False)
class ModelMasks:
    """All masks of one forward pass; None stands for all ones.

    Masks belong to sequences, not to places in a batch. In beam search they are repeated for the beam
    (`repeat`) and stay where they are when hypotheses are reordered, as those are of the same sentence;
    `rows` selects them when sentences leave the batch. Raises ValueError where the masks are of batches of
    different sizes.
    """

    layers: list[Masks]  # of bidirectional layers two for each, forward and backward
    word: WordMasks | None = None
    out: Tensor | None = None  # broadcastable to [T, B, H]
    batch: int | None = None  # sequences; None: any number, as of masks that are the same for all
    time: int | None = (
        None  # steps that the masks are for; None: any number, as of masks that are held over the sequence
    )
    # Of a cell: the masks that it has checked, for which sizes, and the same as `cells.step_masks` shapes
    # them.
    checked_masks: tuple[Masks, tuple[object, ...], Masks] | None = field(
        default=None, init=False, repr=False
    )

    def __post_init__(self) -> None:
        sizes = {
            int(mask.shape[dim])
            for layer in self.layers
            for mask, dim in zip(layer, BATCH_DIMS, strict=True)
            if mask is not None
        }
        sizes |= set() if self.out is None else {int(self.out.shape[-2])}
        if self.word is not None:
            sizes.add(self.word.batch)
        sizes -= {1}
        if self.batch is not None and sizes:
            sizes.add(self.batch)
        if len(sizes) > 1:
            raise ValueError(
                f"masks must be of one batch, got masks of {' and '.join(map(str, sorted(sizes)))} sequences"
            )
        if self.batch is None and sizes:
            object.__setattr__(self, "batch", sizes.pop())

    def __getitem__(self, index: object) -> "ModelMasks":
        raise TypeError("masks have no items; use masks.rows(index) for those of some sequences")

    def map(
        self,
        function: Callable[[Tensor | None, int], Tensor | None],
        word: WordMasks | None,
        batch: int | None,
    ) -> "ModelMasks":
        """With `function(mask, dimension of the batch)` of every mask of layers and output."""
        layers = [Masks(*map(function, layer, BATCH_DIMS)) for layer in self.layers]
        return ModelMasks(layers, word, function(self.out, 1), batch, self.time)

    def rows(self, index: Index) -> "ModelMasks":
        """Those of some sequences, in the order of `index`, whole numbers below the batch size."""
        index = row_index(index)
        word = None if self.word is None else self.word.rows(index)
        batch = None if self.batch is None else len(index)
        return self.map(lambda mask, dim: select_rows(mask, dim, index, self.batch), word, batch)

    def repeat(self, n: int) -> "ModelMasks":
        """Those of each sequence n times, one after the other, as `torch.repeat_interleave`: for the n
        hypotheses of a beam.
        """
        return self if self.batch is None else self.rows(torch.arange(self.batch).repeat_interleave(n))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "ModelMasks":
        """On a device, and where a type is given, in that."""
        word = None if self.word is None else self.word.to(device, dtype)
        return self.map(lambda mask, _: to_device(mask, device, dtype), word, self.batch)

    def pinned(self) -> "ModelMasks":
        """In memory that a GPU reads by itself."""
        word = None if self.word is None else self.word.pinned()
        return self.map(lambda mask, _: pinned(mask), word, self.batch)


def pinned(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.pin_memory()


@overload
def to_device(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor: ...
@overload
def to_device(
    tensor: Tensor | None, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor | None: ...
def to_device(
    tensor: Tensor | None, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor | None:
    """From memory that a GPU reads by itself, so that the copy does not wait for the work that is queued
    there.
    """
    if tensor is None:
        return None
    tensor = tensor.to(dtype or tensor.dtype)
    leaves = tensor.device.type == "cpu" and torch.device(device).type == "cuda"
    return (tensor.pin_memory() if leaves else tensor).to(device, non_blocking=leaves)


def threshold_of(p: float, bits: int) -> int:
    """Of the whole numbers with so many bits, those below it stand for "dropped"."""
    numbers = 1 << bits
    return min(max(round(p * numbers), 1), numbers - 1)


def keep_mask(
    p: float, shape: tuple[int, ...], generator: torch.Generator, *, divided: bool = True
) -> Tensor | None:
    """0 with probability p, in steps of 2^-16, otherwise 1 / (1 - p), or 1; a random number of 64 bits serves
    four elements.
    """
    if p == 0:
        return None
    count, threshold = math.prod(shape), threshold_of(p, KEEP_BITS)
    bits = (
        torch.empty((count + 3) // 4, dtype=torch.int64, device="cpu")
        .random_(-(2**63), None, generator=generator)
        .view(torch.int16)[:count]
    )
    keep = torch.ge(bits, threshold - 2 ** (KEEP_BITS - 1), out=torch.empty(count, device="cpu"))
    return (keep.mul_(1 / (1 - threshold / 2**KEEP_BITS)) if divided else keep).view(shape)


def traceable_keep_mask(
    p: float,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    divided: bool = True,
) -> Tensor | None:
    """The same in operations that `torch.compile` traces, from torch's global random state on the device."""
    if p == 0:
        return None
    threshold = threshold_of(p, KEEP_BITS) / 2**KEEP_BITS
    keep: Tensor = (torch.rand(shape, device=device) >= threshold).to(dtype)
    return keep.div(1 - threshold) if divided else keep


def new_mask(
    p: float, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """From torch's global random state; ones where p is 0."""
    if p == 0:
        return torch.ones(shape, device=device, dtype=dtype)
    if torch.compiler.is_compiling() or in_transform():
        mask = traceable_keep_mask(p, shape, torch.device(device))
    else:
        mask = keep_mask(p, shape, new_stream().generator())
    assert mask is not None
    return mask.to(device, dtype)


def new_masks(dropout: Dropout, shape: MaskShape, device: torch.device, dtype: torch.dtype) -> ModelMasks:
    """Those of layers, from torch's global random state, which stays as it is where nothing is dropped.

    Raises ValueError under `torch.jit.trace`, where they would become constants.
    """
    if not dropout.drops:
        return ModelMasks([Masks()] * (len(shape.input_sizes) * shape.directions))
    if torch._C._get_tracing_state() is not None:
        raise ValueError(
            "masks must be given under torch.jit.trace, or the layer be in evaluation mode: drawn masks "
            "would be constants"
        )
    if torch.compiler.is_compiling() or in_transform():
        return draw_traceable(dropout, shape, device, dtype)
    return draw(dropout, shape, new_stream()).to(device, dtype)


Keep = Callable[..., Tensor | None]  # of (p, shape, *, divided)


def by_gate(p: float, size: int, tie: object, shape: MaskShape, time: int, keep: Keep) -> Tensor | None:
    """A mask [time, gates, B, size], or one for all gates."""
    gates = 1 if tie is Tie.all else shape.gates if tie is Tie.none else 2
    mask = keep(p, (time, gates, shape.batch, size))
    if mask is None or tie is not Tie.gates:
        return mask
    candidate = CANDIDATE[shape.gates]
    return torch.cat([mask[:, 1:] if gate == candidate else mask[:, :1] for gate in range(shape.gates)], 1)


def layer_masks(dropout: Dropout, shape: MaskShape, time: int, keep: Keep) -> list[Masks]:
    """The masks of all layers and directions.

    The mask on the cell state is not divided by the keep probability: it is on the carried state itself, so
    that the quotient would come in anew at every step, and states and gradients would grow without bound
    (with p_c = 0.25 they are not numbers any more within an epoch of Penn Treebank).
    """
    layers = len(shape.input_sizes)
    p_x, p_h, p_c = (dropout.of_layers(name, layers) for name in ("p_x", "p_h", "p_c"))
    masks: list[Masks] = []
    for layer in range(layers):
        for direction in range(shape.directions):
            # Ordinary dropout between layers is on the output of a layer, which both directions of the next
            # one read.
            shared = direction == 1 and dropout.policy is Policy.zaremba
            masks.append(
                Masks(
                    x=masks[-1].x
                    if shared
                    else by_gate(p_x[layer], shape.input_sizes[layer], dropout.tie, shape, time, keep),
                    h=by_gate(p_h[layer], shape.state_size, dropout.tie, shape, time, keep),
                    c=keep(p_c[layer], (time, shape.batch, shape.hidden_size), divided=False),
                )
            )
    return masks


def draw(
    dropout: Dropout,
    shape: MaskShape,
    stream: Stream,
    device: torch.device | str = "cpu",
    outputs: int | None = None,
) -> ModelMasks:
    """The masks of one chunk of text: every sequence has its own (Gal & Ghahramani 2016, section 4).

    `outputs` is the number of steps whose output is used; None: all.
    """
    generator = stream.generator()
    time = shape.time if dropout.new_every_step else 1
    keep = partial(keep_mask, generator=generator)
    layers = layer_masks(dropout, shape, time, keep)
    out = keep(dropout.p_out, (min(time, outputs or time), shape.batch, shape.directions * shape.state_size))
    word = draw_word_masks(dropout.p_word, dropout.word_mask, shape.time, shape.batch, generator)
    return ModelMasks(layers, word, out, shape.batch, steps_of(dropout, shape)).to(device)


def steps_of(dropout: Dropout, shape: MaskShape) -> int | None:
    """The steps that masks are for; None where they are held over a sequence of any length."""
    return shape.time if dropout.new_every_step and dropout.drops else None


def new_word_masks(
    p: float, word_mask: WordMask, time: int, batch: int, device: torch.device | str, batch_first: bool
) -> WordMasks | None:
    """From torch's global random state; None where p is 0."""
    if p == 0:
        return None
    if not (torch.compiler.is_compiling() or in_transform()):
        masks = draw_word_masks(p, word_mask, time, batch, new_stream().generator())
        return None if masks is None else replace(masks.to(device), batch_first=batch_first)
    if word_mask is WordMask.type:
        return WordMasks(p, torch.randint(-(2**62), 2**62, (batch,), device=device), None, batch_first)
    return WordMasks(p, None, traceable_keep_mask(p, (time, batch), torch.device(device)), batch_first)


def draw_word_masks(
    p: float, word_mask: object, time: int, batch: int, generator: torch.Generator
) -> WordMasks | None:
    if p == 0:
        return None
    if word_mask is WordMask.type:
        return WordMasks(
            p, by_type_B=torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator, device="cpu")
        )
    return WordMasks(p, by_token_TB=keep_mask(p, (time, batch), generator))


def draw_traceable(
    dropout: Dropout, shape: MaskShape, device: torch.device, dtype: torch.dtype
) -> ModelMasks:
    """As `draw`, without word masks, in operations that `torch.compile` traces, from torch's global random
    state.
    """
    time = shape.time if dropout.new_every_step else 1
    keep = partial(traceable_keep_mask, device=device, dtype=dtype)
    out = keep(dropout.p_out, (time, shape.batch, shape.directions * shape.state_size))
    return ModelMasks(
        layer_masks(dropout, shape, time, keep), None, out, shape.batch, steps_of(dropout, shape)
    )


def mean_masks(dropout: Dropout, layers: int, like: Tensor, directions: int = 1) -> ModelMasks:
    """The standard approximation: every mask replaced by its mean, which is one but for that on the cell
    state (Moon et al. 2015).
    """
    means = [
        1 - threshold_of(p, KEEP_BITS) / 2**KEEP_BITS if p > 0 else None
        for p in dropout.of_layers("p_c", layers)
    ]
    return ModelMasks(
        [
            Masks(c=None if mean is None else like.new_full((1, 1, 1), mean))
            for mean in means
            for _ in range(directions)
        ]
    )


def concat_batch(masks: Sequence[ModelMasks]) -> ModelMasks:
    """The masks of several batches as those of one. Raises ValueError where they are of different steps,
    layers or word masks.
    """
    if len({(m.time, len(m.layers)) for m in masks}) > 1:
        raise ValueError("masks to be joined must be of as many steps and layers each")
    batches = [m.batch for m in masks]

    def join(tensors: Sequence[Tensor | None], dim: int) -> Tensor | None:
        """Ones take the place of masks that are not there."""
        like = next((t for t in tensors if t is not None), None)
        if like is None:
            return None
        whole = []
        for tensor, batch in zip(tensors, batches, strict=True):
            if batch is None:
                raise ValueError(
                    "masks to be joined must say of how many sequences they are: ModelMasks(…, batch=…)"
                )
            shape = list(like.shape)
            shape[dim] = batch
            whole.append(
                like.new_ones(shape)
                if tensor is None
                else tensor.expand([*tensor.shape[:dim], batch, *tensor.shape[dim + 1 :]])
            )
        return torch.cat(whole, dim)

    layers = [
        Masks(*map(join, zip(*layer, strict=True), BATCH_DIMS))
        for layer in zip(*(m.layers for m in masks), strict=True)
    ]
    total = None if None in batches else sum(batch for batch in batches if batch is not None)
    word = concat_words([m.word for m in masks])
    return ModelMasks(layers, word, join([m.out for m in masks], 1), total, masks[0].time)


def concat_words(words: Sequence[WordMasks | None]) -> WordMasks | None:
    there = [word for word in words if word is not None]
    if not there:
        return None
    kinds = {(word.p, word.by_type_B is None, word.batch_first) for word in there}
    if len(there) < len(words) or len(kinds) > 1:
        raise ValueError(
            "word masks to be joined must be there for every batch, with one probability, one kind and one "
            "order of dimensions"
        )
    by_type = [word.by_type_B for word in there if word.by_type_B is not None]
    by_token = [word.by_token_TB for word in there if word.by_token_TB is not None]
    return replace(
        there[0],
        by_type_B=torch.cat(by_type) if by_type else None,
        by_token_TB=torch.cat(by_token, 1) if by_token else None,
    )
