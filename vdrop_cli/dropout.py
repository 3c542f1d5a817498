"""Draws mask tensors from a dropout policy; the cells know masks and never policies.

T time  B batch  D input size  H hidden size  G gates  E size of a word's vector
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from vdrop_cli.kernels import Masks
from vdrop_cli.kernels.contexts import in_transform
from vdrop_cli.kernels.masks import BATCH_DIMS
from vdrop_cli.policies import BETWEEN, Cell, Dropout, Policy, Tie, WordMask
from vdrop_cli.random_streams import Stream, new_stream

GATES = {Cell.lstm: 4, Cell.gru: 3}
CANDIDATE = 2  # the gate without a sigmoid: g of i f g o, n of r z n
KEEP_BITS = 16  # random bits for each element of a mask, compared with the drop probability
KEEP_BLOCK = 2**14  # random numbers of 64 bits that are drawn at a time
HASH_BITS = 24  # bits of the hash of a word, compared with the drop probability

Index = Tensor | Sequence[int]


@dataclass(frozen=True)
class MaskShape:
    """The sizes that masks depend on.

    `input_sizes` has D of each layer; `directions` is 2 for bidirectional layers.
    """

    time: int
    batch: int
    input_sizes: tuple[int, ...]
    hidden_size: int | tuple[int, ...]  # a tuple has H of each layer
    gates: int
    directions: int = 1
    projected_size: int = 0  # size P of the hidden state of an LSTM with projections; 0: H
    head_size: int = 0  # size E of the projected output that enters the head; 0: it is not projected

    def cell_size(self, layer: int) -> int:
        """The size H of the cell state of a layer."""
        return self.hidden_size[layer] if isinstance(self.hidden_size, tuple) else self.hidden_size

    def state_size(self, layer: int) -> int:
        """The size P of the hidden state h of a layer."""
        return self.projected_size or self.cell_size(layer)

    @property
    def output_size(self) -> int:
        """The size of the last layer's output, in all directions."""
        return self.directions * self.state_size(len(self.input_sizes) - 1)


def row_index(index: Index) -> Tensor:
    """Returns an index of rows as int64; raises ValueError for anything but a list of whole numbers."""
    index = index if isinstance(index, Tensor) else torch.as_tensor(index, device="cpu")
    if index.numel() == 0:
        index = index.long()
    if index.dim() != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
        raise ValueError(f"index must be a list of whole numbers, got {index.dtype} {list(index.shape)}")
    return index.long()


def select_rows(tensor: Tensor | None, dim: int, index: Tensor, batch: int | None) -> Tensor | None:
    """Selects rows of the batch; a dimension of 1 that stands for every sequence remains."""
    if tensor is None or (tensor.shape[dim] == 1 and batch != 1):
        return tensor
    return tensor.index_select(dim, index.to(tensor.device))


@dataclass(frozen=True, eq=False)
class WordMasks:
    """Decides for each word of a text whether it is dropped, at a cost of O(T·B) and without a table [B, V].

    `by_type_B` has a key for each sequence; a hash of key and word decides. `by_token_TB` has a factor for
    each position. Deviation: by type is the default, as in the paper; the authors' code dropped by token
    until 2017-01.
    """

    p: float
    by_type_B: Tensor | None = None
    by_token_TB: Tensor | None = None
    batch_first: bool = False  # ids are [B, T]

    def keep(self, ids: Tensor) -> Tensor:
        """Returns the factor on each word's embedding, 0 or 1 / (1 - p), in the shape of `ids`.

        `ids` are [T, B], or [B, T] with `batch_first`. Raises ValueError where the number of sequences, or of
        steps, is not that of the masks.
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
                    f"ids must have {len(self.by_type_B)} sequences like the masks, got {ids_TB.shape[1]}"
                )
            threshold = drop_threshold(self.p, HASH_BITS)
            hash_TB = (mix(self.by_type_B ^ mix(ids_TB.long())) >> 16) & (2**HASH_BITS - 1)
            keep_TB = (hash_TB >= threshold).float() / (1 - threshold / 2**HASH_BITS)
        return keep_TB.T if self.batch_first else keep_TB

    @property
    def device(self) -> torch.device:
        decisive = self.by_token_TB if self.by_type_B is None else self.by_type_B
        assert decisive is not None
        return decisive.device

    @property
    def batch(self) -> int:
        if self.by_type_B is not None:
            return len(self.by_type_B)
        assert self.by_token_TB is not None
        return self.by_token_TB.shape[1]

    def rows(self, index: Index) -> "WordMasks":
        """Returns the masks of some sequences, in the order of `index`."""
        index = row_index(index)
        return replace(
            self,
            by_type_B=select_rows(self.by_type_B, 0, index, self.batch),
            by_token_TB=select_rows(self.by_token_TB, 1, index, self.batch),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "WordMasks":
        """Moves the masks to a device; `dtype` converts the factors by token."""
        by_type_B, by_token_TB = to_device(self.by_type_B, device), to_device(self.by_token_TB, device, dtype)
        return replace(self, by_type_B=by_type_B, by_token_TB=by_token_TB)

    def pin_memory(self) -> "WordMasks":
        """Copies the masks into page-locked memory."""
        return replace(self, by_type_B=pin(self.by_type_B), by_token_TB=pin(self.by_token_TB))

    def repeat(self, n: int) -> "WordMasks":
        """Repeats the masks of each sequence n times in a row."""
        return self.rows(torch.arange(self.batch, device="cpu").repeat_interleave(n))


def mix(x: Tensor) -> Tensor:
    """Hashes int64 numbers: multiplies by odd constants and folds the high half onto the low one."""
    for factor in (-0x61C8864680B583EB, -0x40A7B892E31B1A47):
        x = (x + 1) * factor
        x = x ^ ((x >> 32) & 0xFFFFFFFF)
    return x


@dataclass(frozen=True, eq=False)
class ModelMasks:
    """All masks of one forward pass; None stands for all ones.

    Masks belong to sequences, not to positions in a batch. Masks on weights are the exception: all sequences
    share them. In beam search, `repeat` gives all hypotheses of a sentence the masks of that sentence, so
    reordering the hypotheses does not change the masks. When sentences leave the batch, `rows` selects the
    masks of the sentences that remain. Raises ValueError where the masks have different batch sizes.
    """

    layers: list[Masks]  # one for each layer and direction, in torch's order
    word: WordMasks | None = None
    out: Tensor | None = None  # broadcastable to [T, B, H]
    batch: int | None = None  # number of sequences; None: any, where all share their masks
    time: int | None = None  # number of steps; None: any, where masks are held over the sequence
    # on the recurrent weights of each layer and direction, [G·H, P], for all sequences
    weights: list[Tensor | None] | None = None
    head: Tensor | None = None  # broadcastable to [T, B, E]
    # 1 / (1 - p_c) of each layer and direction, by which its hidden state is multiplied; None: 1 for all
    cell_scales: tuple[float, ...] | None = None
    # A cell's cache: the masks that it has checked, their sizes, and the result of `cells.step_masks`.
    checked_masks: tuple[Masks, tuple[object, ...], Masks] | None = field(
        default=None, init=False, repr=False
    )

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy or a file has: all but the cache."""
        return vars(self) | {"checked_masks": None}

    def __post_init__(self) -> None:
        if self.cell_scales is not None and len(self.cell_scales) != len(self.layers):
            raise ValueError(
                f"cell_scales must be for {len(self.layers)} layers like the masks, got "
                f"{len(self.cell_scales)}"
            )
        named = [
            (f"layers[{n}].{place}", mask, 3 if place == "c" else 4)
            for n, layer in enumerate(self.layers)
            for place, mask in zip(Masks._fields, layer, strict=True)
        ]
        for name, mask, dims in (*named, ("out", self.out, 3), ("head", self.head, 3)):
            if mask is not None and mask.dim() != dims:
                raise ValueError(f"masks.{name} must have {dims} dimensions, got {list(mask.shape)}")
        sizes = {
            int(mask.shape[dim])
            for layer in self.layers
            for mask, dim in zip(layer, BATCH_DIMS, strict=True)
            if mask is not None
        }
        sizes |= {int(mask.shape[-2]) for mask in (self.out, self.head) if mask is not None}
        if self.word is not None:
            sizes.add(self.word.batch)
        sizes -= {1}
        if self.batch is not None and sizes:
            sizes.add(self.batch)
        if len(sizes) > 1:
            numbers = " and ".join(map(str, sorted(sizes)))
            raise ValueError(f"masks must be for one batch, got masks for {numbers} sequences")
        if self.batch is None and sizes:
            object.__setattr__(self, "batch", sizes.pop())

    def __getitem__(self, index: object) -> "ModelMasks":
        raise TypeError("masks have no items; masks.rows(index) selects sequences")

    def map(
        self,
        function: Callable[[Tensor | None, int], Tensor | None],
        word: WordMasks | None,
        batch: int | None,
    ) -> "ModelMasks":
        """Returns new masks: `function(mask, batch dimension)` of every mask of layers, output and head."""
        layers = [Masks(*map(function, layer, BATCH_DIMS)) for layer in self.layers]
        out, head = function(self.out, 1), function(self.head, 1)
        return replace(self, layers=layers, word=word, out=out, batch=batch, head=head)

    def map_weights(self, function: Callable[[Tensor | None], Tensor | None]) -> "ModelMasks":
        """Returns masks with `function` applied to those on weights; all others are the same."""
        return self if self.weights is None else replace(self, weights=list(map(function, self.weights)))

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """All masks by name; None where there is none."""
        named = {
            f"masks.{n}.{place}": mask
            for n, layer in enumerate(self.layers)
            for place, mask in layer._asdict().items()
        }
        if self.word is not None:
            named |= {"masks.word_type": self.word.by_type_B, "masks.word_token": self.word.by_token_TB}
        named |= {f"masks.weights.{n}": mask for n, mask in enumerate(self.weights or [])}
        return named | {"masks.out": self.out, "masks.head": self.head}

    def replaced(self, tensors: Mapping[str, Tensor | None]) -> "ModelMasks":
        """Returns masks of the same kind with other tensors, named as in the property `tensors`."""
        layers = [
            Masks(*(tensors[f"masks.{n}.{place}"] for place in Masks._fields))
            for n in range(len(self.layers))
        ]
        by_type_B, by_token_TB = (tensors.get(f"masks.word_{kind}") for kind in ("type", "token"))
        weights = self.weights and [tensors[f"masks.weights.{n}"] for n in range(len(self.weights))]
        return replace(
            self,
            layers=layers,
            word=self.word and replace(self.word, by_type_B=by_type_B, by_token_TB=by_token_TB),
            out=tensors["masks.out"],
            weights=weights,
            head=tensors["masks.head"],
        )

    def rows(self, index: Index) -> "ModelMasks":
        """Returns the masks of some sequences, in the order of `index`, integers below the batch size."""
        index = row_index(index)
        word = None if self.word is None else self.word.rows(index)
        batch = None if self.batch is None else len(index)
        return self.map(lambda mask, dim: select_rows(mask, dim, index, self.batch), word, batch)

    def repeat(self, n: int) -> "ModelMasks":
        """Repeats the masks of each sequence n times in a row, for the n hypotheses of a beam.

        The order is that of `torch.repeat_interleave`.
        """
        return (
            self
            if self.batch is None
            else self.rows(torch.arange(self.batch, device="cpu").repeat_interleave(n))
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "ModelMasks":
        """Moves the masks to a device, and converts them where a type is passed."""
        word = None if self.word is None else self.word.to(device, dtype)
        masks = self.map(lambda mask, _: to_device(mask, device, dtype), word, self.batch)
        return masks.map_weights(lambda mask: to_device(mask, device, dtype))

    def pin_memory(self) -> "ModelMasks":
        """Copies the masks into page-locked memory."""
        word = None if self.word is None else self.word.pin_memory()
        return self.map(lambda mask, _: pin(mask), word, self.batch).map_weights(pin)


def pin(mask: Tensor | None) -> Tensor | None:
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
    """Moves a tensor to a device and type; copies to a GPU start from page-locked memory and do not block."""
    if tensor is None:
        return None
    tensor = tensor.to(dtype or tensor.dtype)
    to_gpu = tensor.device.type == "cpu" and torch.device(device).type == "cuda"
    return (tensor.pin_memory() if to_gpu else tensor).to(device, non_blocking=to_gpu)


def drop_threshold(p: float, bits: int) -> int:
    """Returns the threshold below which a random number of that many bits means "dropped"."""
    values = 1 << bits
    return min(max(round(p * values), 1), values - 1)


def keep_mask(
    p: float, shape: tuple[int, ...], generator: torch.Generator, *, divided: bool = True
) -> Tensor | None:
    """Draws a mask: 0 with probability p, in steps of 2^-16, otherwise 1 / (1 - p), or 1 if not `divided`.

    Each random number of 64 bits serves four elements. Returns None where p is 0.
    """
    if p == 0:
        return None
    count, threshold = math.prod(shape), drop_threshold(p, KEEP_BITS)
    keep = torch.empty(count, dtype=torch.float32, device="cpu")
    block = torch.empty(min((count + 3) // 4, KEEP_BLOCK), dtype=torch.int64, device="cpu")
    for part in torch.split(keep, 4 * KEEP_BLOCK):
        bits = block[: (len(part) + 3) // 4].random_(-(2**63), None, generator=generator)
        torch.ge(bits.view(torch.int16)[: len(part)], threshold - 2 ** (KEEP_BITS - 1), out=part)
        if divided:
            part.mul_(1 / (1 - threshold / 2**KEEP_BITS))
    return keep.view(shape)


def traceable_keep_mask(
    p: float,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    divided: bool = True,
) -> Tensor | None:
    """Draws a mask as `keep_mask` does, but in operations that `torch.compile` traces.

    The random numbers come from torch's global random state on the device.
    """
    if p == 0:
        return None
    threshold = drop_threshold(p, KEEP_BITS) / 2**KEEP_BITS
    keep: Tensor = (torch.rand(shape, device=device, dtype=torch.float32) >= threshold).to(dtype)
    return keep.div(1 - threshold) if divided else keep


def refuse_constant_masks(device: torch.device | str) -> None:
    """Raises ValueError where drawn masks would become constants.

    This is the case under `torch.jit.trace` and in the capture of a CUDA graph.
    """
    context = "under torch.jit.trace" if torch._C._get_tracing_state() is not None else ""
    # compiled code and transforms draw on the device: each replay of a graph draws new numbers there
    draws_on_host = not (torch.compiler.is_compiling() or in_transform())
    if draws_on_host and torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing():
        context = "in the capture of a CUDA graph"
    if context:
        raise ValueError(f"masks are required {context}, or evaluation mode: drawn masks would be constants")


def new_mask(
    p: float, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """Draws a mask from torch's global random state; ones where p is 0.

    Raises ValueError where the mask would become a constant, see `refuse_constant_masks`.
    """
    if p == 0:
        return torch.ones(shape, device=device, dtype=dtype or torch.float32)
    refuse_constant_masks(device)
    if torch.compiler.is_compiling() or in_transform():
        mask = traceable_keep_mask(p, shape, torch.device(device))
    else:
        mask = keep_mask(p, shape, new_stream().generator())
    assert mask is not None
    return mask.to(device, dtype)


def new_masks(dropout: Dropout, shape: MaskShape, device: torch.device, dtype: torch.dtype) -> ModelMasks:
    """Draws the masks of layers from torch's global random state.

    The random state does not change where nothing is dropped. Raises ValueError where the masks would become
    constants, see `refuse_constant_masks`.
    """
    if not dropout.drops:
        return no_masks(len(shape.input_sizes), shape.directions)
    refuse_constant_masks(device)
    if torch.compiler.is_compiling() or in_transform():
        return draw_traceable(dropout, shape, device, dtype)
    return draw(dropout, shape, new_stream()).to(device, dtype)


Keep = Callable[..., Tensor | None]  # (p, shape, *, divided) -> mask


def gate_mask(p: float, size: int, tie: object, shape: MaskShape, time: int, keep: Keep) -> Tensor | None:
    """Draws a mask [time, gates, B, size], with one gate where all gates share it."""
    gates = 1 if tie is Tie.all else shape.gates if tie is Tie.none else 2
    mask = keep(p, (time, gates, shape.batch, size))
    if mask is None or tie is not Tie.gates:
        return mask
    return torch.cat([mask[:, 1:] if gate == CANDIDATE else mask[:, :1] for gate in range(shape.gates)], 1)


def mask_time(dropout: Dropout, place: str, shape: MaskShape) -> int:
    """Returns the size of the time dimension of a place's masks; 1 where they are held over the sequence."""
    return shape.time if dropout.is_new_each_step(place) else 1


def layer_masks(dropout: Dropout, shape: MaskShape, keep: Keep) -> list[Masks]:
    """Draws the masks of all layers and directions.

    The mask on the cell state is not divided by the keep probability. It multiplies the carried state itself,
    so this division would be repeated at every step, and states and gradients would grow without bound (with
    p_c = 0.25 they overflow within an epoch of Penn Treebank). `cell_scales` returns its substitute.
    """
    layers = len(shape.input_sizes)
    p_x, p_h, p_c = (dropout.layer_probabilities(name, layers) for name in ("p_x", "p_h", "p_c"))
    masks: list[Masks] = []
    time_h = mask_time(dropout, "p_h", shape)
    for layer in range(layers):
        time_x = mask_time(dropout, BETWEEN if layer else "p_x", shape)
        for direction in range(shape.directions):
            # Ordinary dropout between layers acts on the output of a layer. Both directions of the next
            # layer read this output, so they share a mask.
            is_shared = direction == 1 and dropout.policy is Policy.zaremba
            masks.append(
                Masks(
                    x=masks[-1].x
                    if is_shared
                    else masks[-1].h
                    if layer and dropout.one_state_mask
                    else gate_mask(p_x[layer], shape.input_sizes[layer], dropout.tie, shape, time_x, keep),
                    h=gate_mask(p_h[layer], shape.state_size(layer), dropout.tie, shape, time_h, keep),
                    c=keep(p_c[layer], (1, shape.batch, shape.cell_size(layer)), divided=False),
                )
            )
    return masks


def weight_masks(p: float, shape: MaskShape, keep: Keep) -> list[Tensor | None] | None:
    """Draws a mask [G·H, P] on the recurrent weights of each layer and direction; None where p is 0."""
    if p == 0:
        return None
    return [
        keep(p, (shape.gates * shape.cell_size(layer), shape.state_size(layer)))
        for layer in range(len(shape.input_sizes))
        for _ in range(shape.directions)
    ]


def draw(
    dropout: Dropout,
    shape: MaskShape,
    stream: Stream,
    device: torch.device | str = "cpu",
    outputs: int | None = None,
) -> ModelMasks:
    """Draws the masks of one chunk of text; every sequence has its own (Gal & Ghahramani 2016, section 4).

    `outputs` is the number of steps whose output is used; None: all.
    """
    generator = stream.generator()
    keep = partial(keep_mask, generator=generator)
    layers = layer_masks(dropout, shape, keep)
    time = mask_time(dropout, "p_out", shape)
    out = keep(dropout.p_out, (min(time, outputs or time), shape.batch, shape.output_size))
    word = draw_word_masks(dropout.p_word, dropout.word_mask, shape.time, shape.batch, generator)
    if dropout.p_head > 0 and shape.head_size == 0:
        raise ValueError(f"p_head must be 0 without a projection of the output, got {dropout.p_head}")
    head = keep(dropout.p_head, (mask_time(dropout, "p_head", shape), shape.batch, shape.head_size))
    weights = weight_masks(dropout.p_weight, shape, keep)
    return model_masks(dropout, shape, layers, out, word=word, weights=weights, head=head).to(device)


def model_masks(
    dropout: Dropout, shape: MaskShape, layers: list[Masks], out: Tensor | None, **others: Any
) -> ModelMasks:
    """Combines the masks of all places into `ModelMasks`; `others` are further fields by name.

    With `one_state_mask` the mask on the output is that on the last layer's hidden state.
    """
    if dropout.one_state_mask:
        out = None if layers[-1].h is None else layers[-1].h[:, 0]
    time = shape.time if dropout.new_every_step and dropout.drops else None
    scales = cell_scales(dropout, shape)
    return ModelMasks(layers, out=out, batch=shape.batch, time=time, cell_scales=scales, **others)


def new_word_masks(
    p: float, word_mask: WordMask, time: int, batch: int, device: torch.device | str, batch_first: bool
) -> WordMasks | None:
    """Draws word masks from torch's global random state; returns None where p is 0.

    Raises ValueError where they would become constants.
    """
    if p == 0:
        return None
    refuse_constant_masks(device)
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
    """Draws masks as `draw` does, without word masks, in operations that `torch.compile` traces.

    The random numbers come from torch's global random state on the device.
    """
    time = mask_time(dropout, "p_out", shape)
    keep = partial(traceable_keep_mask, device=device, dtype=dtype)
    out = keep(dropout.p_out, (time, shape.batch, shape.output_size))
    layers = layer_masks(dropout, shape, keep)
    weights = weight_masks(dropout.p_weight, shape, keep)
    return model_masks(dropout, shape, layers, out, weights=weights)


def cell_scales(dropout: Dropout, shape: MaskShape) -> tuple[float, ...] | None:
    """Returns 1 / (1 - p_c) of each layer and direction; None without masks on cell states.

    A mask that is held over the sequence sets a unit of the cell state to zero at all steps, or leaves it as
    it is without dropout. So it also acts as a mask on the hidden state. The hidden state is divided by the
    keep probability: once, however many steps the mask has multiplied the cell state.
    """
    probabilities = dropout.layer_probabilities("p_c", len(shape.input_sizes))
    if not any(probabilities):
        return None
    return tuple(
        1 / (1 - drop_threshold(p, KEEP_BITS) / 2**KEEP_BITS) if p > 0 else 1.0
        for p in probabilities
        for _ in range(shape.directions)
    )


def no_masks(layers: int, directions: int = 1) -> ModelMasks:
    """Returns masks that change nothing: the mean of every mask, for the standard approximation."""
    return ModelMasks([Masks()] * (layers * directions))


def is_fixed(dropout: Dropout) -> bool:
    """Whether all masks of a policy can be held over a whole text, whatever segments it is read in."""
    return not dropout.new_every_step and dropout.word_mask is WordMask.type


def joined_masks(masks: ModelMasks, first: ModelMasks, dropout: Dropout) -> ModelMasks:
    """Returns the masks of a part of a text, from new `masks` and the masks of its `first` part.

    Places whose masks `dropout` resamples at every step or token have the new masks. All other places have
    those of the first part, which are held over the text.
    """
    layers = [
        Masks(
            x=new.x if dropout.is_new_each_step(BETWEEN if layer else "p_x") else one.x,
            h=new.h if dropout.is_new_each_step("p_h") else one.h,
            c=one.c,
        )
        for layer, (new, one) in enumerate(zip(masks.layers, first.layers, strict=True))
    ]
    out = masks.out if dropout.is_new_each_step("p_out") else first.out
    head = masks.head if dropout.is_new_each_step("p_head") else first.head
    word = masks.word if dropout.word_mask is WordMask.token else first.word
    return replace(masks, layers=layers, out=out, head=head, word=word, weights=first.weights)


def concat_batch(masks: Sequence[ModelMasks]) -> ModelMasks:
    """Joins the masks of several batches into those of one batch; a mask that is None becomes ones.

    Raises ValueError where steps, layers, scales or kinds of word masks differ, and for masks on weights,
    which all sequences of a batch share.
    """
    if len(masks) == 1:
        return masks[0]
    if any(m.weights is not None for m in masks):
        raise ValueError("masks on weights cannot be joined: all sequences of a batch share them")
    if len({(m.time, len(m.layers)) for m in masks}) > 1:
        raise ValueError("masks to be joined must have the same number of steps and layers")
    if len({m.cell_scales for m in masks}) > 1:
        raise ValueError("masks to be joined must have the same cell_scales: those of one probability p_c")
    batches = [m.batch for m in masks]

    def join(tensors: Sequence[Tensor | None], dim: int) -> Tensor | None:
        like = next((t for t in tensors if t is not None), None)
        if like is None:
            return None
        parts = []
        for tensor, batch in zip(tensors, batches, strict=True):
            if batch is None:
                raise ValueError("masks to be joined must have a number of sequences: ModelMasks(…, batch=…)")
            shape = list(like.shape)
            shape[dim] = batch
            if tensor is None:
                parts.append(like.new_ones(shape))
            else:
                parts.append(tensor.expand([*tensor.shape[:dim], batch, *tensor.shape[dim + 1 :]]))
        return torch.cat(parts, dim)

    layers = [
        Masks(*map(join, zip(*layer, strict=True), BATCH_DIMS))
        for layer in zip(*(m.layers for m in masks), strict=True)
    ]
    total = None if None in batches else sum(batch for batch in batches if batch is not None)
    word = concat_words([m.word for m in masks])
    out, head = join([m.out for m in masks], 1), join([m.head for m in masks], 1)
    return ModelMasks(layers, word, out, total, masks[0].time, head=head, cell_scales=masks[0].cell_scales)


def concat_words(words: Sequence[WordMasks | None]) -> WordMasks | None:
    masks = [word for word in words if word is not None]
    if not masks:
        return None
    kinds = {(mask.p, mask.by_type_B is None, mask.batch_first) for mask in masks}
    if len(masks) < len(words) or len(kinds) > 1:
        raise ValueError(
            "word masks to be joined must exist for every batch, with one probability, one kind and one "
            "order of dimensions"
        )
    by_type = [mask.by_type_B for mask in masks if mask.by_type_B is not None]
    by_token = [mask.by_token_TB for mask in masks if mask.by_token_TB is not None]
    return replace(
        masks[0],
        by_type_B=torch.cat(by_type) if by_type else None,
        by_token_TB=torch.cat(by_token, 1) if by_token else None,
    )


# so that `torch.load` with `weights_only=True` reads masks that were saved
torch.serialization.add_safe_globals([Masks, ModelMasks, WordMasks])
