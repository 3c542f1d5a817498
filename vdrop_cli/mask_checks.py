"""Whether masks that are passed to layers or cells fit them; messages name the mask.

T time  B batch
"""

import torch
from torch import Tensor

from vdrop_cli.dropout import MaskShape, ModelMasks
from vdrop_cli.kernels.masks import check_sizes, is_broadcastable
from vdrop_cli.policies import Cell


def check_type(masks: object, example: str) -> None:
    """Raises TypeError for anything but the masks of a model; `example` is a call that draws them."""
    if not isinstance(masks, ModelMasks):
        raise TypeError(f"masks must be a ModelMasks, such as {example}, got {type(masks).__name__}")


def check_layer_masks(masks: ModelMasks, x_TBD: Tensor, shape: MaskShape) -> None:
    """Raises TypeError or ValueError for masks that do not fit the input of layers of these sizes.

    The kernels check the sizes of the layers' masks.
    """
    check_type(masks, "layer.masks(time, batch)")
    time, batch, _ = x_TBD.shape
    layers = len(shape.input_sizes) * shape.directions
    if len(masks.layers) != layers:
        raise ValueError(f"masks must be for {layers} layers, got {len(masks.layers)}")
    if masks.batch not in (None, batch):
        raise ValueError(f"masks must be for {batch} sequences like the input, got masks for {masks.batch}")
    if masks.time not in (None, time):
        raise ValueError(
            f"masks that are new at every step must be for {time} steps like the input, got masks for "
            f"{masks.time}"
        )
    if masks.word is not None:
        raise ValueError(
            "masks.word must be None: the input of a layer has no words; multiply the embedding by "
            "masks.word.keep(ids)"
        )
    if masks.head is not None:
        raise ValueError("masks.head must be None: a layer has no head")
    if masks.weights is not None:
        check_weight_masks(masks.weights, x_TBD.device, shape)
    if masks.out is not None:
        expected = (time, batch, shape.output_size)
        if masks.out.dtype != x_TBD.dtype or masks.out.device != x_TBD.device:
            raise ValueError(
                f"masks.out must be {x_TBD.dtype} on {x_TBD.device} like the input, got "
                f"{masks.out.dtype} on {masks.out.device}"
            )
        if not is_broadcastable(masks.out.shape, expected):
            raise ValueError(
                f"masks.out must be broadcastable to {list(expected)}, got {list(masks.out.shape)}"
            )


def check_weight_masks(weights: list[Tensor | None], device: torch.device, sizes: MaskShape) -> None:
    """Raises ValueError for masks that do not fit the recurrent weights."""
    shapes = [
        [sizes.gates * sizes.cell_size(layer), sizes.state_size(layer)]
        for layer in range(len(sizes.input_sizes))
        for _ in range(sizes.directions)
    ]
    if len(weights) != len(shapes):
        raise ValueError(f"masks.weights must be for {len(shapes)} layers, got {len(weights)}")
    for mask, shape in zip(weights, shapes, strict=True):
        if mask is not None and (list(mask.shape) != shape or mask.device != device):
            raise ValueError(
                f"masks.weights must be {shape} on {device} like the weights, got "
                f"{list(mask.shape)} on {mask.device}"
            )


def check_cell_masks(masks: ModelMasks, cell: Cell, shape: MaskShape) -> None:
    """Raises ValueError for masks that do not fit a step of a cell of these sizes."""
    batch = shape.batch
    if len(masks.layers) != 1 or masks.batch not in (None, batch) or masks.time not in (None, 1):
        raise ValueError(
            f"masks must be for one layer and {batch} sequences, held over time; use cell.masks({batch})"
        )
    if masks.word is not None or masks.out is not None or masks.head is not None:
        raise ValueError(
            "masks.word, masks.out and masks.head must be None: a cell uses none of them; use "
            "WordDropout and LockedDropout"
        )
    if masks.weights is not None:
        raise ValueError("masks.weights must be None: a cell drops no weights; use a layer")
    if (masks.layers[0].c is not None or masks.cell_scales is not None) and cell is Cell.gru:
        raise ValueError("masks.c must be None: a GRU has no cell state")
    hidden = shape.cell_size(0)
    check_sizes(masks.layers[0], 1, shape.gates, batch, shape.input_sizes[0], hidden, hidden)
