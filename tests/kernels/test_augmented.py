"""The cross-entropy with the augmented loss against its definition in plain operations."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vdrop_cli.kernels import augmented
from vdrop_cli.kernels.augmented import augmented_cross_entropy

FACTOR, TEMPERATURE = 5.0, 3.0


def inputs_of(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Input [N, D] and weights [V, D] and [V] of a head, and word vectors; targets, some twice."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(9, 6), (11, 6), (11,), (11, 4)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    targets_N = torch.tensor([4, 0, 4, 10, 7, 4, 0, 1, 9])
    return [tensor.requires_grad_() for tensor in tensors], targets_N


def distributions(inputs: list[Tensor], targets_N: Tensor) -> tuple[Tensor, Tensor]:
    x_ND, w_VD, b_V, words_VE = inputs
    similarity_NV = torch.softmax(words_VE[targets_N] @ words_VE.T / TEMPERATURE, 1)
    return similarity_NV.detach(), torch.softmax((x_ND @ w_VD.T + b_V) / TEMPERATURE, 1)


@pytest.mark.parametrize("rows", [2, 100])
def test_it_adds_the_divergence_from_the_similarity_of_words(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the entropy of the similarity; the gradient of the logits in it is (ŷ - ỹ) / τ.
    In chunks or whole.
    """
    monkeypatch.setattr(augmented, "rows_at_once", lambda *_: (rows, rows))
    inputs, targets_N = inputs_of(torch.float64)
    (x_ND, w_VD, b_V, _) = inputs
    loss, nll = augmented_cross_entropy(*inputs, targets_N, FACTOR, TEMPERATURE)
    expected_nll = cross_entropy(x_ND @ w_VD.T + b_V, targets_N, reduction="sum")
    torch.testing.assert_close(nll, expected_nll.detach(), rtol=1e-12, atol=0)
    similarity_NV, prediction_NV = distributions(inputs, targets_N)
    divergence = (similarity_NV * (similarity_NV / prediction_NV).log()).sum()
    entropy = -(similarity_NV * similarity_NV.log()).sum()
    expected_loss = expected_nll + FACTOR * (divergence + entropy)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(7 * expected_loss, inputs[:3], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(7 * loss, inputs[:3]), expected, rtol=1e-10, atol=1e-12)
    divergence_grad, *_ = torch.autograd.grad(divergence, x_ND)
    d_logits_NV = (prediction_NV - similarity_NV) / TEMPERATURE
    torch.testing.assert_close(divergence_grad, d_logits_NV @ w_VD, rtol=1e-10, atol=1e-12)


def test_the_loss_alone_has_a_gradient() -> None:
    inputs, targets_N = inputs_of(torch.float64)
    loss, nll = augmented_cross_entropy(*inputs, targets_N, FACTOR, TEMPERATURE)
    assert loss.requires_grad and not nll.requires_grad


def test_words_have_no_gradient_as_targets_and_that_of_the_head_where_they_are_its_weights() -> None:
    (x_ND, w_VD, b_V, words_VE), targets_N = inputs_of(torch.float64)
    augmented_cross_entropy(x_ND, w_VD, b_V, words_VE, targets_N, FACTOR, TEMPERATURE)[0].backward()
    assert words_VE.grad is None and w_VD.grad is not None
    tied_VD, untied_VD = (w_VD.detach().clone().requires_grad_() for _ in range(2))
    for weights_VD, vectors_VD in ((tied_VD, tied_VD), (untied_VD, w_VD)):
        inputs = (x_ND, weights_VD, b_V, vectors_VD, targets_N)
        augmented_cross_entropy(*inputs, FACTOR, TEMPERATURE)[0].backward()
    assert tied_VD.grad is not None and untied_VD.grad is not None
    torch.testing.assert_close(tied_VD.grad, untied_VD.grad)


def test_bf16_rounds_the_products_of_gradients_alone() -> None:
    """The losses are those of fp32, bit for bit."""
    inputs, targets_N = inputs_of(torch.float32)
    exact = augmented_cross_entropy(*inputs, targets_N, FACTOR, TEMPERATURE)
    rounded = augmented_cross_entropy(*inputs, targets_N, FACTOR, TEMPERATURE, torch.bfloat16)
    assert all(map(torch.equal, exact, rounded))
    exact_grads, rounded_grads = (torch.autograd.grad(loss, inputs[:3]) for loss, _ in (exact, rounded))
    for one, other in zip(exact_grads, rounded_grads, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert 0 < (other - one).norm() < 0.01 * one.norm() if one.ndim == 2 else torch.equal(one, other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = augmented_cross_entropy(*inputs, targets_N, FACTOR, TEMPERATURE)
    assert all(map(torch.equal, under_autocast, exact))
