"""Weights in the order that is read fastest give the products that they give otherwise."""

import pytest
import torch

from vdrop_cli.kernels import products
from vdrop_cli.kernels.products import Weights, WeightsByGate, mm_into


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_products_are_those_of_the_matrix(packed: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if packed and not products.packs():
        pytest.skip("this build of torch cannot pack weights")
    monkeypatch.setattr(products, "packs", lambda: packed)
    w, x = torch.randn(33, 17), torch.randn(5, 17)
    expected, start = x.double() @ w.double().T, torch.randn(5, 33)
    weights = Weights(w.to(dtype), 5)
    assert (weights.packed is not None) == (packed and dtype == torch.bfloat16)
    torch.testing.assert_close(weights.product(x.to(dtype)).double(), expected, rtol=tolerance, atol=5 * tolerance)
    weights.add_product(out := start.clone(), x.to(dtype))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), start.double() + expected, rtol=tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_products_gate_by_gate(packed: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if packed and not products.packs():
        pytest.skip("this build of torch cannot pack weights")
    monkeypatch.setattr(WeightsByGate, "PACKED_FROM", 0 if packed else 10**9)
    w, x = torch.randn(3, 33, 17), torch.randn(3, 5, 17)
    expected, start = x.double() @ w.double().mT, torch.randn(3, 5, 33)
    weights = WeightsByGate(w.to(dtype), 5)
    assert (weights.packed is not None) == (packed and dtype == torch.bfloat16)
    torch.testing.assert_close(weights.product(x.to(dtype)).double(), expected, rtol=tolerance, atol=5 * tolerance)
    weights.add_product(out := start.clone(), x.to(dtype))
    torch.testing.assert_close(out.double(), start.double() + expected, rtol=tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("packed_from", [0, 10**9])
def test_weights_may_be_a_view(packed_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way back they are the forward weights, transposed; packed or not, the products are the same."""
    monkeypatch.setattr(Weights, "TRANSPOSED_FROM", packed_from)
    monkeypatch.setattr(WeightsByGate, "PACKED_FROM", packed_from)
    w, x = torch.randn(3, 17, 33).bfloat16(), torch.randn(3, 5, 17).bfloat16()
    torch.testing.assert_close(Weights(w[0].T, 5).product(x[0]), x[0] @ w[0], rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(WeightsByGate(w.mT, 5).product(x), x @ w, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mm_into_writes_or_adds(dtype: torch.dtype) -> None:
    a, b = torch.randn(4, 6).to(dtype), torch.randn(6, 3).to(dtype)
    out = torch.full((4, 3), 7.0)
    mm_into(out, a, b)
    torch.testing.assert_close(out, (a @ b).float())
    mm_into(out, a, b, add=True)
    torch.testing.assert_close(out, 2 * (a @ b).float())
