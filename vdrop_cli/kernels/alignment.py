"""Pads weights and gates to rows of a multiple of 16 bytes, which cuBLAS's fast programs need.

Rows of 650 or 1,500 bf16 numbers are not a multiple of 16 bytes. The padding is zero and changes no product.

G gates  H hidden size  D input size  R, S sizes of aligned rows, at least H and D
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

ALIGNMENT = 16  # bytes


def aligned_size(size: int, dtype: torch.dtype) -> int:
    """The number of elements of a row for `size` of them."""
    multiple = max(1, ALIGNMENT // dtype.itemsize)
    return -(-size // multiple) * multiple


def pad_weights(w: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """Weights [G·H, D] in the type of the products, as [G·R, S]."""
    rows, columns = aligned_size(hidden, dtype), aligned_size(w.shape[1], dtype)
    if (rows, columns) == (hidden, w.shape[1]):
        return w.to(dtype)
    w_GHD = w.reshape(-1, hidden, w.shape[1])
    w_GRS = w.new_zeros(len(w_GHD), rows, columns, dtype=dtype)
    w_GRS[:, :hidden, : w.shape[1]] = w_GHD
    return w_GRS.flatten(0, 1)


def pad_columns(x: Tensor, dtype: torch.dtype, size: int | None = None) -> Tensor:
    """A tensor in the type of the products, in rows of `size`, by default in aligned ones: [..., S]."""
    columns = x.shape[-1]
    size = aligned_size(columns, dtype) if size is None else size
    if size == columns:
        return x.to(dtype)
    padded = x.new_zeros(*x.shape[:-1], size, dtype=dtype)
    padded[..., :columns] = x
    return padded


def unpad_weights(padded: Tensor, like: Tensor, hidden: int, rows: int) -> Tensor:
    """Removes the padding of a gradient [G·R, S]: returns the gradient of the weights `like`, [G·H, D]."""
    w_GHD = padded.view(-1, rows, padded.shape[1])[:, :hidden, : like.shape[1]]
    return w_GHD.to(like.dtype).reshape(like.shape)


def pad_bias(b: Tensor, hidden: int, rows: int) -> Tensor:
    """A bias [G·H] as [G·R]."""
    return b if rows == hidden else pad(b.reshape(-1, hidden), (0, rows - hidden)).flatten()


def unpad_bias(padded: Tensor, hidden: int, rows: int) -> Tensor:
    """A bias [G·R] as [G·H]."""
    return padded if rows == hidden else padded.view(-1, rows)[:, :hidden].flatten()
