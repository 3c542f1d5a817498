"""The head, by hand and in C, against the definition: losses and gradients, in chunks and whole."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.kernels.test_fused import both_back_ends, relative_errors
from vdrop_cli.kernels import head, linear_cross_entropy, native_head


def inputs_of(
    rows: int, words: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, 6), (words, 6), (words,)]
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype).requires_grad_()
        for shape in shapes
    ]
    return tensors, torch.randint(words, (rows,), generator=generator)


@both_back_ends
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("even", [True, False], ids=["even upstream", "uneven upstream"])
@pytest.mark.parametrize(("compute_dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("rows", "words"), [(1, 2), (7, 11), (9, 11), (10, 11), (101, 13)])
def test_cross_entropy_in_chunks_is_that_of_the_whole(
    backend: str,
    rows: int,
    words: int,
    compute_dtype: torch.dtype | None,
    tolerance: float,
    even: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nine rows of eleven words fill a chunk here: one chunk, a full one, one row over, many. The losses are
    never rounded.
    """
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 99)
    monkeypatch.setattr(native_head, "LOGITS_AT_ONCE", 99)
    results = []
    for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
        tensors, targets = inputs_of(rows, words, dtype)
        nll = linear_cross_entropy(*tensors, targets, backend=name, compute_dtype=compute_dtype)
        upstream = torch.full((rows,), 0.3) if even else torch.linspace(-1, 2, rows)
        first, second = (
            torch.autograd.grad(nll, tensors, upstream.to(dtype), retain_graph=True) for _ in range(2)
        )
        results.append([nll, *first, *second])
    errors = relative_errors(results[1], results[0])
    assert errors[0] < 1e-5 and max(errors) < tolerance


@pytest.mark.parametrize(
    ("gigabytes", "words", "bound"),
    [(80, 10_000, 2**25), (80, 300_000, 2**25), (4, 10_000, 2**24), (80, 2**26, 2**26)],
)
def test_a_gpu_works_through_a_steps_logits_at_once(
    gigabytes: int, words: int, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """35 steps of 20 sequences with PTB's words; of more words as many rows as fit, but one; the CPU's chunks
    stay in its cache.
    """
    properties = SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    rows, rounded_rows = head.rows_at_once(torch.device("cuda", 0), words)
    assert rows == rounded_rows == max(1, bound // words)
    assert rows >= 35 * 20 or words > 10_000
    assert head.rows_at_once(torch.device("cpu"), 10_000) == (400, 1600)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_cross_entropy_in_one_chunk_is_that_of_the_whole(
    compute_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = head.losses_and_probabilities
    calls: list[int] = []
    monkeypatch.setattr(head, "rows_at_once", lambda device, words: (101, 101))
    monkeypatch.setattr(
        head, "losses_and_probabilities", lambda x, *rest: (calls.append(len(x)), chunk(x, *rest))[1]
    )
    results = []
    for backend, dtype in (("reference", torch.float64), ("fused", torch.float32)):
        tensors, targets = inputs_of(101, 13, dtype)
        nll = linear_cross_entropy(*tensors, targets, backend=backend, compute_dtype=compute_dtype)
        results.append([nll, *torch.autograd.grad(nll.sum(), tensors)])
    errors = relative_errors(results[1], results[0])
    assert errors[0] < 1e-5 and max(errors) < (1e-5 if compute_dtype is None else 2e-2) and calls == [101]


@pytest.mark.parametrize("way", ["softmax_by_probabilities", "softmax_by_logarithms"])
def test_cross_entropy_of_extreme_logits_is_finite_and_right(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, and as on CUDA."""
    monkeypatch.setattr(head, "softmax_by_probabilities", getattr(head, way))
    for dtype, tolerance in ((None, 1e-4), (torch.bfloat16, 2e-2)):
        tensors, targets = inputs_of(50, 11, scale=5.0)  # logits beyond ±80
        logits = tensors[0] @ tensors[1].T
        assert logits.max() > 80 and logits.min() < -80
        nll = linear_cross_entropy(*tensors, targets, backend="fused", compute_dtype=dtype)
        doubles = [t.double() for t in tensors]
        expected = linear_cross_entropy(*doubles, targets, backend="reference")
        torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-4)
        gradients = (
            torch.autograd.grad(loss.sum(), of) for loss, of in ((nll, tensors), (expected, doubles))
        )
        assert max(relative_errors(*map(list, gradients))) < tolerance


def test_the_gradient_of_a_sum_is_even_without_a_look_at_it() -> None:
    """A look would be a wait for a GPU."""
    seen = []
    nll = torch.ones(6, requires_grad=True)
    nll.register_hook(lambda gradient: seen.append((gradient.stride(0), head.is_uniform(gradient))))
    (nll.view(2, 3).sum() / 2).backward()
    assert seen == [(0, True)]
    assert not head.is_uniform(torch.tensor([1.0, 2.0])) and head.is_uniform(torch.tensor([2.0, 2.0]))


@both_back_ends
def test_the_logits_stay_exact_where_torch_would_round_them(backend: str) -> None:
    """Under a user's autocast, which rounds what it multiplies, hidden states included."""
    tensors, targets = inputs_of(50, 11)
    expected = linear_cross_entropy(*tensors, targets, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_cross_entropy(*tensors, targets, backend=backend), expected)
        rounded = linear_cross_entropy(tensors[0].bfloat16(), *tensors[1:], targets, backend=backend)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, expected)


def test_the_forward_logits_are_never_rounded() -> None:
    """With bf16 products the losses are those of fp32 to the bit; only the gradients are rounded."""
    tensors, targets = inputs_of(20, 11)
    losses = [
        linear_cross_entropy(*tensors, targets, backend="fused", compute_dtype=d)
        for d in (None, torch.bfloat16)
    ]
    assert torch.equal(*losses)
    exact, rounded = (torch.autograd.grad(nll.sum(), tensors) for nll in losses)
    assert 1e-4 < max(relative_errors(list(rounded), list(exact))) < 2e-2


def test_without_gradients_the_head_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation pays for the logits alone."""
    tensors, targets = inputs_of(20, 11)
    expected = linear_cross_entropy(*tensors, targets, backend="fused")
    monkeypatch.delattr(head, "mm_into")
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*tensors, targets, backend="fused"), expected)
