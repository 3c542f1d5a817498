"""Rows of whole 16 bytes: what is added is zero, changes no product, and is taken off again."""

import pytest
import torch

from tests.kernels.test_fused import relative_errors
from vdrop_cli.kernels import head
from vdrop_cli.kernels.alignment import (
    ALIGNMENT,
    aligned_size,
    pad_bias,
    pad_columns,
    pad_weights,
    unpad_bias,
    unpad_weights,
)

TYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES)
def test_an_aligned_row_is_the_shortest_one_of_whole_16_bytes(dtype: torch.dtype) -> None:
    for size in range(1, 50):
        row = aligned_size(size, dtype)
        assert row * dtype.itemsize % ALIGNMENT == 0
        assert size <= row < size + ALIGNMENT // dtype.itemsize


def test_the_published_sizes() -> None:
    assert [aligned_size(size, torch.bfloat16) for size in (200, 650, 1500)] == [200, 656, 1504]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("hidden", "inputs"), [(7, 5), (8, 5), (7, 8), (8, 8)])
def test_products_with_padded_weights_are_those_with_the_weights(
    hidden: int, inputs: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-4, 5, (4 * hidden, inputs), generator=generator).float()  # exact in bf16
    x = torch.randint(-4, 5, (3, inputs), generator=generator).float()
    padded, row = pad_weights(w, hidden, dtype), aligned_size(hidden, dtype)
    assert padded.shape == (4 * row, aligned_size(inputs, dtype))
    product = pad_columns(x, dtype) @ padded.T
    expected = x @ w.T
    assert torch.equal(unpad_bias(product[0], hidden, row), expected[0].to(dtype))
    assert padded.double().abs().sum() == w.double().abs().sum(), "the rest is zero"
    assert torch.equal(unpad_weights(padded, w, hidden, row), w)


def test_weights_of_aligned_sizes_are_not_copied() -> None:
    w = torch.randn(4 * 8, 8)
    assert pad_weights(w, 8, torch.float32).data_ptr() == w.data_ptr() == pad_columns(w, w.dtype).data_ptr()


def test_a_bias_comes_back() -> None:
    b = torch.randn(4 * 7)
    padded = pad_bias(b, 7, 8)
    assert padded.view(4, 8)[:, 7].eq(0).all() and torch.equal(unpad_bias(padded, 7, 8), b)
    assert pad_bias(b, 7, 7) is b is unpad_bias(b, 7, 7)


def test_the_head_gives_the_same_with_padded_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: losses, and gradients of everything."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=generator).requires_grad_() for s in ((6, 7), (11, 7), (11,)))
    targets = torch.arange(6)

    def results() -> list[torch.Tensor]:
        nll = head.linear_cross_entropy(x, w, b, targets, torch.bfloat16)
        return [nll, *torch.autograd.grad(nll.sum(), [x, w, b])]

    expected = results()
    monkeypatch.setattr(head, "pads_columns", lambda side: True)
    assert max(relative_errors(results(), expected)) < 1e-3
