"""WeightMatrix in the order that is read fastest give the products that they give otherwise."""

from collections.abc import Iterator
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import settings
from tests.kernels.test_fused import inputs_of, masks_of
from vdrop_cli import kernels
from vdrop_cli.kernels import fused, gates, head, native, native_head, products
from vdrop_cli.kernels.products import WeightMatrices, WeightMatrix, exact_sums, full_precision_sums, mm_into
from vdrop_cli.layers import GRU, LSTM, Recurrent
from vdrop_cli.model import LanguageModel
from vdrop_cli.random_streams import Stream

CELLS: dict[str, Any] = {"lstm": kernels.lstm, "gru": kernels.gru}
MATMUL = torch.backends.cuda.matmul


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_products_are_those_of_the_matrix(
    packed: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed and not products.can_pack():
        pytest.skip("this build of torch cannot pack weights")
    monkeypatch.setattr(products, "can_pack", lambda: packed)
    w, x = torch.randn(33, 17), torch.randn(5, 17)
    expected, start = x.double() @ w.double().T, torch.randn(5, 33)
    weights = WeightMatrix(w.to(dtype), 5)
    assert (weights.packed is not None) == (packed and dtype == torch.bfloat16)
    torch.testing.assert_close(
        weights.product(x.to(dtype)).double(), expected, rtol=tolerance, atol=5 * tolerance
    )
    weights.add_product(out := start.clone(), x.to(dtype))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), start.double() + expected, rtol=tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_products_gate_by_gate(
    packed: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed and not products.can_pack():
        pytest.skip("this build of torch cannot pack weights")
    monkeypatch.setattr(WeightMatrices, "PACKED_FROM", 0 if packed else 10**9)
    w, x = torch.randn(3, 33, 17), torch.randn(3, 5, 17)
    expected, start = x.double() @ w.double().mT, torch.randn(3, 5, 33)
    weights = WeightMatrices(w.to(dtype), 5)
    assert (weights.packed is not None) == (packed and dtype == torch.bfloat16)
    torch.testing.assert_close(
        weights.product(x.to(dtype)).double(), expected, rtol=tolerance, atol=5 * tolerance
    )
    weights.add_product(out := start.clone(), x.to(dtype))
    torch.testing.assert_close(out.double(), start.double() + expected, rtol=tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("packed_from", [0, 10**9])
def test_weights_may_be_a_view(packed_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the backward pass they are the forward weights, transposed. Packing changes no product."""
    monkeypatch.setattr(WeightMatrix, "TRANSPOSED_FROM", packed_from)
    monkeypatch.setattr(WeightMatrices, "PACKED_FROM", packed_from)
    w, x = torch.randn(3, 17, 33).bfloat16(), torch.randn(3, 5, 17).bfloat16()
    expected, within = x.float() @ w.float(), {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(WeightMatrix(w[0].T, 5).product(x[0]).float(), expected[0], **within)
    torch.testing.assert_close(WeightMatrices(w.mT, 5).product(x).float(), expected, **within)


PRODUCTS = [
    *((torch, name) for name in ("mm", "bmm", "addmm")),
    *((Tensor, name) for name in ("__matmul__", "addmm_", "baddbmm_")),
    (torch.nn.functional, "linear"),
]


@pytest.fixture
def product_types(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """The types of the tensors that are multiplied."""
    seen = set[torch.dtype]()

    def record(product: Any) -> Any:
        def recorded(*args: Any, **options: Any) -> Any:
            seen.update(x.dtype for x in args if isinstance(x, Tensor))
            return product(*args, **options)

        return recorded

    for owner, name in PRODUCTS:
        monkeypatch.setattr(owner, name, record(getattr(owner, name)))
    return seen


@pytest.fixture(params=[True, False], ids=["bf16", "no_bf16"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether torch multiplies bf16 on a processor without AMX."""
    monkeypatch.setattr(products, "multiplies_bf16", lambda: request.param)
    for module in (native, native_head):
        monkeypatch.setattr(module, "has_amx", lambda: False)
    return bool(request.param)


@pytest.mark.parametrize("backend", ["reference", "fused", "native"])
@pytest.mark.parametrize("policy", ["variational_no_word", "naive"])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("layers", [LSTM, GRU])
def test_layers_multiply_bf16_where_the_processor_does(
    layers: type[Recurrent],
    layer_norm: bool,
    policy: str,
    backend: str,
    has_bf16: bool,
    product_types: set[torch.dtype],
) -> None:
    """Elsewhere they multiply the rounded numbers in fp32, in the forward and the backward pass."""
    dropout = settings("model=lstm_small", f"dropout={policy}").dropout.to_policy()
    options = {"layer_norm": layer_norm, "backend": backend, "compute_dtype": torch.bfloat16}
    layer = layers(6, 8, dropout=dropout, **options)
    layer(torch.randn(5, 2, 6, requires_grad=True))[0].sum().backward()
    assert product_types and (torch.bfloat16 in product_types) == has_bf16


@pytest.mark.parametrize("backend", ["fused", "native"])
def test_the_head_and_its_projection_do_so_too(
    backend: str, has_bf16: bool, product_types: set[torch.dtype]
) -> None:
    train = settings("model=lstm_small", "model.tie_embeddings=true", "model.embedding_size=4")
    model = LanguageModel(train.model, train.dropout.to_policy(), 11, backend, torch.bfloat16)
    y_TBH = torch.randn(5, 2, train.model.hidden_size, requires_grad=True)
    x_TBE = model.head_input(y_TBH, None)
    assert (torch.bfloat16 in product_types) == has_bf16
    product_types.clear()
    model.nll_of_input(x_TBE, torch.arange(10).view(5, 2)).sum().backward()
    assert product_types and (torch.bfloat16 in product_types) == has_bf16


def test_compiled_code_in_bf16_is_whole_and_the_same() -> None:
    """Whether the processor multiplies bf16 is a constant to the compiler."""
    train = settings("model=lstm_small", "model.tie_embeddings=true", "model.embedding_size=4")
    model = LanguageModel(train.model, train.dropout.to_policy(), 11, "fused", torch.bfloat16)
    model.initialise(0.5, Stream((1,)))
    layer = LSTM(6, train.model.hidden_size, backend="fused", compute_dtype=torch.bfloat16)

    def head_input(x_TBD: Tensor) -> Tensor:
        return model.head_input(layer(x_TBD)[0], None)

    x_TBD = torch.randn(5, 2, 6, requires_grad=True)
    compiled = torch.compile(head_input, fullgraph=True, backend="aot_eager")
    results = [
        (y_TBE := function(x_TBD), *torch.autograd.grad(y_TBE.square().sum(), x_TBD))
        for function in (head_input, compiled)
    ]
    assert all(map(torch.equal, *results))


def test_a_tool_that_watches_operations_sees_the_products() -> None:
    """So weights are not packed under a counter, nor under the tracers of any version of torch."""
    w_GNK, x_GMK = torch.randn(1, 1024, 1024).bfloat16(), torch.randn(1, 20, 1024).bfloat16()
    assert (WeightMatrix(w_GNK[0], 20).packed is not None) == products.can_pack()
    with FlopCounterMode(display=False) as counter:
        WeightMatrix(w_GNK[0], 20).product(x_GMK[0])
        WeightMatrices(w_GNK, 20).product(x_GMK)
    assert counter.get_total_flops() == 2 * (2 * 20 * 1024 * 1024)


def test_rounded_numbers_are_multiplied_exactly_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of their products are not rounded to bf16."""
    monkeypatch.setattr(products, "multiplies_bf16", lambda: False)
    w, x = torch.randn(33, 17).bfloat16(), torch.randn(5, 17).bfloat16()
    exact = (x.double() @ w.double().T).float()
    mm_into(out := torch.empty(5, 33), x, w.T)
    for product in (WeightMatrix(w, 5).product(x), WeightMatrices(w[None], 5).product(x[None])[0], out):
        torch.testing.assert_close(product, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mm_into_writes_or_adds(dtype: torch.dtype) -> None:
    a, b = torch.randn(4, 6).to(dtype), torch.randn(6, 3).to(dtype)
    out = torch.full((4, 3), 7.0)
    expected, within = a.float() @ b.float(), {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    mm_into(out, a, b)
    torch.testing.assert_close(out, expected, **within)
    mm_into(out, a, b, add=True)
    torch.testing.assert_close(out, 2 * expected, **within)


def reduced() -> list[bool]:
    """Whether sums may be rounded to bf16 and to fp16."""
    return [MATMUL.allow_bf16_reduced_precision_reduction, MATMUL.allow_fp16_reduced_precision_reduction]


@pytest.fixture(params=[(True, True), (False, True), (False, False)])
def users_settings(request: pytest.FixtureRequest) -> Iterator[list[bool]]:
    before = reduced()
    MATMUL.allow_bf16_reduced_precision_reduction, MATMUL.allow_fp16_reduced_precision_reduction = (
        request.param
    )
    yield list(request.param)
    MATMUL.allow_bf16_reduced_precision_reduction, MATMUL.allow_fp16_reduced_precision_reduction = before


def test_sums_on_a_gpu_are_of_full_precision_and_the_users_settings_are_restored(
    users_settings: list[bool],
) -> None:
    with exact_sums("cuda"), exact_sums("cuda"):
        assert reduced() == [False, False]
    assert reduced() == users_settings
    with pytest.raises(ZeroDivisionError), exact_sums("cuda"):
        _ = 1 / 0
    assert reduced() == users_settings
    with exact_sums("cpu"):
        assert reduced() == users_settings


def test_what_torch_compile_traces_is_summed_as_the_user_set_it(
    users_settings: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the README says: it cannot trace a change of the setting."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with exact_sums("cuda"):
        assert reduced() == users_settings


def test_packing_is_tried_on_the_processor_whatever_the_default_device_is() -> None:
    packs = products.onednn_packs_bf16.__wrapped__()
    with torch.device("meta"):
        assert products.onednn_packs_bf16.__wrapped__() == packs


def test_threads_that_overlap_restore_the_users_settings(users_settings: list[bool]) -> None:
    """The first one in is the first one out."""
    one_is_in = Barrier(2)
    both_are_in = Barrier(2)
    one_is_out = Barrier(2)
    inside = list[list[bool]]()

    def first() -> None:
        with exact_sums("cuda"):
            one_is_in.wait()
            both_are_in.wait()
        one_is_out.wait()

    thread = Thread(target=first)
    thread.start()
    one_is_in.wait()
    with exact_sums("cuda"):
        both_are_in.wait()
        one_is_out.wait()
        inside.append(reduced())
    thread.join()
    assert inside == [[False, False]] and reduced() == users_settings


@pytest.mark.parametrize("users_settings", [(True, True)], indirect=True)
def test_all_products_of_cells_and_head_are_summed_in_full_precision(
    users_settings: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, as they are on a GPU."""
    seen: list[list[bool]] = []

    def multiply(*operands: Any, **options: Any) -> None:
        seen.append(reduced())
        mm_into(*operands, **options)

    monkeypatch.setattr("vdrop_cli.kernels.autograd.exact_sums", lambda device_type: full_precision_sums())
    for module in (fused, gates, head):
        monkeypatch.setattr(module, "mm_into", multiply)
    x, w, b = (torch.randn(shape, requires_grad=True) for shape in ((6, 5), (9, 5), (9,)))
    outputs = [
        *(
            f(*inputs_of(cell, 3, torch.float32), masks_of(cell, "variational", 3), backend="fused")[0].sum()
            for cell, f in CELLS.items()
        ),
        kernels.linear_cross_entropy(x, w, b, torch.arange(6), backend="fused").sum(),
    ]
    for output in outputs:
        before = len(seen)
        output.backward()
        assert len(seen) > before or output is outputs[-1], "the head makes its gradients in the forward pass"
    assert len(seen) > 6 and not any(map(any, seen)) and reduced() == users_settings
