"""Products by halves; the product of bf16 with sums in fp32, which only a GPU has, is stood in for by one of
the same numbers in fp32.
"""

import pytest
import torch
from torch import Tensor

from tests.kernels.test_fused import relative_errors
from vdrop_cli.kernels import halves, head

CPU = torch.device("cpu")


def in_fp32(left_MX: Tensor, right_NX: Tensor) -> Tensor:
    assert left_MX.dtype == right_NX.dtype == torch.bfloat16
    return left_MX.float() @ right_NX.float().T


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "CHECKED", {})


@pytest.mark.parametrize("size", [7, 8, 650])
def test_three_products_of_halves_are_exact_to_16_bits(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, size, generator=generator) for rows in (5, 9))
    left, right = halves.side_by_side(x, halves.LEFT), halves.side_by_side(w, halves.RIGHT)
    assert left.shape[1] == right.shape[1] and left.shape[1] % 24 == 0
    exact = x.double() @ w.double().T
    (error,) = relative_errors([in_fp32(left, right)], [exact])
    (rounded,) = relative_errors([x.bfloat16().float() @ w.bfloat16().float().T], [exact])
    assert error < halves.TOLERANCE < 1e-3 < rounded


def test_a_device_has_them_if_they_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not halves.is_exact_on(CPU), "torch has no such product there"
    for function, is_exact in (
        (in_fp32, True),
        (lambda left, right: in_fp32(left, right).bfloat16().float(), False),
        (lambda left, right: torch.full((len(left), len(right)), torch.nan), False),
    ):
        monkeypatch.setattr(halves, "CHECKED", {})
        monkeypatch.setattr(halves, "product", function)
        assert halves.is_exact_on(CPU) is is_exact
        monkeypatch.setattr(halves, "product", None)
        assert halves.is_exact_on(CPU) is is_exact, "checked once"


def test_a_full_gpu_says_nothing_about_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(left_MX: Tensor, right_NX: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(halves, "product", full)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        halves.is_exact_on(CPU)
    assert not halves.CHECKED


def test_the_check_is_on_its_device_whatever_the_default_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "product", in_fp32)
    with torch.device("meta"):
        assert halves.check(CPU)


def test_a_capture_does_not_contain_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(halves, "check", lambda device: pytest.fail("within a capture"))
    assert not halves.is_exact_on(torch.device("cuda:0")) and not halves.CHECKED


@pytest.mark.parametrize("rows", [127, 128, 300])
def test_the_head_has_exact_losses_by_halves(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without gradients, in chunks; with too few rows, without halves."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in ((rows, 30), (50, 30), (50,))
    )
    targets = torch.randint(50, (rows,), generator=generator)
    products = []

    def product(left_MX: Tensor, right_NX: Tensor) -> Tensor:
        products.append(len(left_MX))
        return in_fp32(left_MX, right_NX)

    monkeypatch.setattr(head, "has_halves", lambda w_VD: True)
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 50 * 100)
    monkeypatch.setattr(halves, "product", product)
    nll = head.linear_cross_entropy(x, w, b, targets, torch.bfloat16)
    gradients = torch.autograd.grad(nll.sum(), [x, w, b])
    with torch.no_grad():
        without_gradients = head.linear_cross_entropy(x, w, b, targets, torch.bfloat16)
    assert sum(products) == (2 * rows if rows >= 128 else 0) and max(products, default=0) <= 100
    doubles = [t.detach().double().requires_grad_() for t in (x, w, b)]
    exact = torch.nn.functional.cross_entropy(
        doubles[0] @ doubles[1].T + doubles[2], targets, reduction="none"
    )
    assert max(relative_errors([nll, without_gradients], [exact, exact])) < 1e-5
    expected = list(torch.autograd.grad(exact.sum(), doubles))
    assert max(relative_errors(list(gradients), expected)) < 1e-2, "those of bf16"
    products.clear()
    head.linear_cross_entropy(x, w, b, targets)
    assert not products, "in fp32 the logits are one product"
