"""The augmented loss against its definition in plain operations."""

import pytest
import torch
from torch import Tensor

from vdrop_cli.kernels import augmented
from vdrop_cli.kernels.augmented import augmented_loss

TEMPERATURE = 3.0


def inputs_of(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Input [N, D] and weights [V, D] and [V] of a head, and vectors of words; targets."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(9, 6), (11, 6), (11,), (11, 4)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors], torch.randint(11, (9,), generator=generator)


def distributions(inputs: list[Tensor], targets_N: Tensor) -> tuple[Tensor, Tensor]:
    x_ND, w_VD, b_V, words_VE = inputs
    similarity_NV = torch.softmax(words_VE[targets_N] @ words_VE.T / TEMPERATURE, 1)
    return similarity_NV.detach(), torch.softmax((x_ND @ w_VD.T + b_V) / TEMPERATURE, 1)


@pytest.mark.parametrize("rows", [2, 100])
def test_it_is_the_divergence_from_the_similarity_of_words(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the entropy of the similarity; the gradient of the logits is (ŷ - ỹ) / τ.
    In chunks or whole.
    """
    monkeypatch.setattr(augmented, "rows_at_once", lambda *_: (rows, rows))
    inputs, targets_N = inputs_of(torch.float64)
    loss = augmented_loss(*inputs, targets_N, TEMPERATURE)
    similarity_NV, prediction_NV = distributions(inputs, targets_N)
    divergence = (similarity_NV * (similarity_NV / prediction_NV).log()).sum()
    entropy = -(similarity_NV * similarity_NV.log()).sum()
    torch.testing.assert_close(loss, (divergence + entropy).detach(), rtol=1e-12, atol=0)
    expected = torch.autograd.grad(7 * divergence, inputs[:3])
    torch.testing.assert_close(torch.autograd.grad(7 * loss, inputs[:3]), expected, rtol=1e-10, atol=1e-12)
    d_logits_NV = 7 * (prediction_NV - similarity_NV) / TEMPERATURE
    torch.testing.assert_close(expected[0], d_logits_NV @ inputs[1], rtol=1e-10, atol=1e-12)


def test_words_have_no_gradient_as_targets_and_that_of_the_head_where_they_are_its_weights() -> None:
    (x_ND, w_VD, b_V, words_VE), targets_N = inputs_of(torch.float64)
    augmented_loss(x_ND, w_VD, b_V, words_VE, targets_N, TEMPERATURE).backward()
    assert words_VE.grad is None and w_VD.grad is not None
    tied_VD = w_VD.detach().clone().requires_grad_()
    augmented_loss(x_ND, tied_VD, b_V, tied_VD, targets_N, TEMPERATURE).backward()
    untied_VD = w_VD.detach().clone().requires_grad_()
    augmented_loss(x_ND, untied_VD, b_V, w_VD, targets_N, TEMPERATURE).backward()
    assert tied_VD.grad is not None and untied_VD.grad is not None
    torch.testing.assert_close(tied_VD.grad, untied_VD.grad)


def test_bf16_rounds_the_products_of_gradients_alone() -> None:
    """The loss is that of fp32, bit for bit."""
    inputs, targets_N = inputs_of(torch.float32)
    exact = augmented_loss(*inputs, targets_N, TEMPERATURE)
    rounded = augmented_loss(*inputs, targets_N, TEMPERATURE, torch.bfloat16)
    assert torch.equal(exact, rounded)
    for one, other in zip(*(torch.autograd.grad(loss, inputs[:3]) for loss in (exact, rounded)), strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (other - one).norm() < 0.01 * one.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augmented_loss(*inputs, targets_N, TEMPERATURE), exact)
