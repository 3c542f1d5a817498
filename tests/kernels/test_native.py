"""What the compiled cells owe besides agreeing with the definition (`test_fused.py`): numbers at the edges,
threads, forks, types.
"""

import os
import platform
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_fused import double, inputs_of, masks_of, outputs_and_gradients, relative_errors
from tests.processes import ROOT, environment
from vdrop_cli import kernels
from vdrop_cli.device import processor_flags
from vdrop_cli.kernels import (
    Masks,
    compiler,
    gru,
    linear_cross_entropy,
    lstm,
    native,
    native_head,
    native_library,
)

CPU = torch.device("cpu")
CELLS = {"lstm": lstm, "gru": gru}
VARIANTS: list[tuple[str, dict[str, Any]]] = [("lstm", {}), ("gru", {}), ("gru", {"reset_after": True})]


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype).requires_grad_()


def tensors(cell: str, time: int, batch: int, inputs: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    gates, states = {"lstm": (4, 2), "gru": (3, 1)}[cell]
    shapes = [
        (time, batch, inputs),
        *[(batch, hidden)] * states,
        (gates * hidden, inputs),
        (gates * hidden, hidden),
        *[(gates * hidden,)] * 2,
    ]
    return [random(*shape, dtype=dtype, scale=hidden**-0.5) for shape in shapes]


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("cell", "option"), VARIANTS)
@pytest.mark.parametrize(
    ("time", "batch", "inputs", "hidden"),
    [(1, 1, 1, 1), (2, 33, 17, 16), (3, 20, 31, 50), (2, 70, 64, 33), (5, 7, 3, 15)],
)
def test_sizes_at_the_edges_of_blocks(
    cell: str,
    option: dict[str, bool],
    time: int,
    batch: int,
    inputs: int,
    hidden: int,
    compute_dtype: torch.dtype | None,
) -> None:
    """One unit, one over a block of 16, rows beyond one block of 32, columns that fill no tile."""
    gates = 4 if cell == "lstm" else 3
    masks = Masks(random(1, gates, batch, inputs).detach(), random(time, 1, batch, hidden).detach())
    expected = outputs_and_gradients(
        partial(CELLS[cell], masks=double(masks), backend="reference", **option),
        tensors(cell, time, batch, inputs, hidden, torch.float64),
    )
    actual = outputs_and_gradients(
        partial(CELLS[cell], masks=masks, backend="native", compute_dtype=compute_dtype, **option),
        tensors(cell, time, batch, inputs, hidden, torch.float32),
    )
    assert max(relative_errors(actual, expected)) < (1e-5 if compute_dtype is None else 3e-2)


@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1, 5, 17), (900, 650, 1000), (1000, 650, 900), (40, 1700, 70), (450, 800, 33)],
)
def test_products_of_tiles_are_exact_sums_of_what_was_rounded(rows: int, depth: int, columns: int) -> None:
    """Of matrices that are worked on in several parts, in their depth and across, and of some with incomplete
    blocks.
    """
    if not native_library.has_amx():
        pytest.skip("this processor has no AMX")
    x, w = random(rows, depth).detach(), random(columns, depth).detach()
    x_high, x_low = native_library.split_bf16(x)
    w_high, w_low = (packed.flatten(1, 2) for packed in native_library.pack_bf16(w, 1, rest=True))
    rounded = x.bfloat16().double() @ w.bfloat16().double().T
    actual = torch.full((rows, columns), torch.nan)
    native_library.gemm(actual, [(x_high, w_high)])
    native_library.gemm(actual, [(x_high, w_high)], add=True)
    assert max(relative_errors([actual], [2 * rounded])) < 1e-6
    native_head.logits_by_halves(actual, x_high, x_low, w_high, w_low)
    assert max(relative_errors([actual], [x.double() @ w.double().T])) < 1e-5
    summed, upstream = torch.full((columns, depth), torch.nan), random(rows, columns).detach().bfloat16()
    native_library.gemm(
        summed,
        [(native_library.transposed_rows(upstream), native_library.packed_rows(x_high, depth))],
        transposed=True,
    )
    assert max(relative_errors([summed], [upstream.double().T @ x.bfloat16().double()])) < 1e-6


def test_products_over_no_rows_are_zero() -> None:
    """As of a batch of empty sequences; also what was not initialised."""
    nothing, out = torch.empty(1, 0, 32, dtype=torch.bfloat16), torch.full((17, 5), torch.nan)
    native_library.gemm(out, [(nothing, nothing)], transposed=True)
    assert not out.any()
    native_library.gemm(out.fill_(3.0), [(nothing, nothing)], add=True, transposed=True)
    assert (out == 3).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.float64, 1e-15)])
def test_gates_are_exact_over_the_whole_range(dtype: torch.dtype, tolerance: float) -> None:
    """σ and tanh alone, by an LSTM of one step: relative errors, near zero and at saturation, too."""
    a = torch.cat(
        [torch.linspace(-20, 20, 4001, dtype=torch.float64), torch.logspace(-30, 0, 301, dtype=torch.float64)]
    ).to(dtype)
    units, zeros = len(a), torch.zeros(1, len(a), dtype=dtype)
    weights = (torch.zeros(4 * units, 1, dtype=dtype), torch.zeros(4 * units, units, dtype=dtype))
    for gate, expected in ((2, a.double().tanh()), (0, a.double().sigmoid())):
        bias = torch.full((4, units), 1000.0, dtype=dtype)  # open gates
        bias[gate] = a
        _, _, c_BH = lstm(
            zeros[:, None, :1],
            zeros,
            zeros,
            *weights,
            bias.flatten(),
            torch.zeros_like(bias.flatten()),
            Masks(),
            backend="native",
        )
        errors = ((c_BH[0].double() - expected) / expected)[expected != 0].abs()
        assert errors.max() < tolerance


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("cell", "option"), VARIANTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-42, 1e38])
def test_numbers_that_are_none_come_out_as_they_do_from_the_definition(
    cell: str, option: dict[str, bool], value: float, compute_dtype: torch.dtype | None
) -> None:
    """And denormal and huge ones; in the input of one sequence at one step."""
    results = []
    for backend in ("reference", "native"):
        x, *others = inputs_of(cell, 4, torch.float32)
        x = x.detach().clone()
        x[1, 1, 2] = value
        function = partial(CELLS[cell], masks=Masks(), backend=backend, compute_dtype=compute_dtype, **option)
        with torch.no_grad():
            results.append(function(x, *others))
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(
            ours,
            expected,
            rtol=1e-5 if compute_dtype is None else 2e-2,
            atol=1e-6 if compute_dtype is None else 2e-2,
            equal_nan=True,
        )


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 200.0, -1e30])
def test_logits_that_are_none_come_out_as_they_do_from_the_definition(
    value: float, compute_dtype: torch.dtype | None
) -> None:
    results = []
    for backend in ("reference", "native"):
        x = random(5, 6)
        w = random(11, 6)
        b = random(11)
        with torch.no_grad():
            b[3] = value
        nll = linear_cross_entropy(
            x, w, b, torch.tensor([0, 3, 5, 3, 10]), backend=backend, compute_dtype=compute_dtype
        )
        results.append([nll, *torch.autograd.grad(nll.sum(), (x, w, b))])
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(
            ours,
            expected,
            rtol=1e-5 if compute_dtype is None else 3e-2,
            atol=1e-4 if compute_dtype is None else 3e-2,
            equal_nan=True,
        )


@pytest.mark.parametrize("target", [-1, -100, 11])
def test_a_target_that_is_no_word_is_an_error(target: int) -> None:
    with pytest.raises(IndexError, match=f"^target {target} is out of bounds: .* 11 words$"):
        linear_cross_entropy(
            random(2, 6), random(11, 6), random(11), torch.tensor([0, target]), backend="native"
        )


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_threads_share_units_and_rows(
    threads: int, compute_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs are the same to the bit; sums over rows, gradients of weights and biases, may differ in
    their last places.
    """
    results = []
    for number in (1, threads):
        for module in (native, native_head, native_library):
            monkeypatch.setattr(module, "threads", lambda number=number: number)
        for cell, option in VARIANTS:
            function = partial(
                CELLS[cell], masks=Masks(), backend="native", compute_dtype=compute_dtype, **option
            )
            results.append(outputs_and_gradients(function, tensors(cell, 3, 40, 9, 37, torch.float32)))
    for alone, together in zip(results[:3], results[3:], strict=True):
        assert torch.equal(alone[0], together[0])
        assert max(relative_errors(together, alone)) < 1e-5


FORK = """
import os, torch
from vdrop_cli.layers import LSTM
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)
torch.manual_seed(0)
layer, x = LSTM(20, 40, backend="native"), torch.randn(6, 8, 20)
expected = layer(x)[0]
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # torch's own threads are lost, too
    y = layer(x)[0]
    y.sum().backward()
    os._exit(0 if torch.equal(y, expected) else 1)
status = os.waitpid(child, 0)[1]
assert torch.equal(layer(x)[0], expected)
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({}, id="threads"),
        pytest.param({"OMP_NUM_THREADS": "1"}, id="one thread", marks=pytest.mark.long),
    ],
)
def test_a_fork_after_the_first_call_works(variables: dict[str, str]) -> None:
    """The threads of OpenMP are not in a forked process: its cells use one."""
    env = {name: value for name, value in environment().items() if name != "OMP_NUM_THREADS"} | variables
    ran = subprocess.run([sys.executable, "-c", FORK], env=env, capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["0"], ran.stderr


@pytest.mark.filterwarnings("ignore:This process .*multi-threaded:DeprecationWarning")  # from Python 3.12 on
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_forked_process_is_noticed() -> None:
    compiler.library()  # another test may have cleared its cache since the back end was checked
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        os._exit(0 if native_library.threads() == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_without_kernels_are_fuseds_or_an_error(dtype: torch.dtype) -> None:
    inputs = inputs_of("lstm", 2, dtype)
    same = [lstm(*inputs, Masks(), backend=backend)[0] for backend in ("auto", "fused")]
    assert torch.equal(*same)
    with pytest.raises(
        ValueError, match=rf"^backend=native has no kernels for {dtype} with products in {dtype}; use float32"
    ):
        lstm(*inputs, Masks(), backend="native")


def test_native_is_for_the_cpu() -> None:
    with pytest.raises(
        ValueError, match=r"^backend=native cannot run on meta: it is for the CPU; choose backend=fused$"
    ):
        kernels.choose("native", torch.device("meta"))


@pytest.mark.parametrize(("cell", "option"), VARIANTS)
def test_the_operators_keep_torchs_rules(cell: str, option: dict[str, bool]) -> None:
    for lengths, needs_dx in ((None, True), (torch.tensor([2, 0, 3]), True), (None, False)):
        states, others = inputs_of(cell, 3, torch.float32)[1:-4], inputs_of(cell, 3, torch.float32)
        layer = (
            others[0].requires_grad_(needs_dx),
            *others[-4:],
            *masks_of(cell, "variational_untied", 3),
            lengths,
            torch.float32,
            False,
            cell == "lstm",
            *option.values(),
        )
        if cell == "gru" and not option:
            layer = (*layer, False)
        torch.library.opcheck({"lstm": native.apply_lstm, "gru": native.apply_gru}[cell], (*states, *layer))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 0, 3])], ids=["whole", "lengths"])
@pytest.mark.parametrize(("cell", "option"), VARIANTS)
def test_the_gradient_of_data_is_not_computed(
    cell: str,
    option: dict[str, bool],
    lengths: Tensor | None,
    compute_dtype: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the other gradients are the same."""
    inputs = inputs_of(cell, 3, torch.float32)
    masks = Masks(*masks_of(cell, "variational_untied", 3))
    function = {"lstm": kernels.lstm, "gru": kernels.gru}[cell]
    gradients = []
    for needs_dx in (True, False):
        inputs[0].requires_grad_(needs_dx)
        y, *_ = function(
            *inputs, masks, lengths=lengths, compute_dtype=compute_dtype, backend="native", **option
        )
        if not needs_dx:
            monkeypatch.setattr(native.Gradients, "inputs", None)
        gradients.append(torch.autograd.grad(y.square().sum(), inputs[1:]))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_compile_takes_the_cells_whole(compute_dtype: torch.dtype | None) -> None:
    def model(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
        return lstm(x, h, c, *weights, Masks(), backend="native", compute_dtype=compute_dtype)[0].sin()

    inputs = inputs_of("lstm", 3, torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model, compiled):
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(map(torch.equal, *results))


OTHER_PROCESSORS = {
    "x86-64": set(),
    "haswell": {"avx2", "fma"},
    "skylake-avx512": {"avx512f", "avx512bw"},
    "cooperlake": {"avx512_bf16"},
}
AS_ANOTHER = """
import sys
import pytest
from vdrop_cli.kernels import compiler, native_library
compiler.processor_flag = lambda: f"-march={sys.argv[1]}"
print(*native_library.features(), sep=",")
chosen = "sizes or (tied and native) or numbers_that_are_none or logits_that_are_none"
files = ["tests/kernels/test_native.py", "tests/kernels/test_fused.py"]
sys.exit(pytest.main(["-n", "0", "-p", "no:cacheprovider", "--durations=0", "-k", chosen, *files]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="it compiles for x86-64")
@pytest.mark.parametrize(
    "processor",
    [pytest.param(name, marks=() if name == "haswell" else (pytest.mark.long,)) for name in OTHER_PROCESSORS],
)
def test_it_is_right_as_compiled_for_other_processors(processor: str) -> None:
    """With vectors of other widths, with and without bf16 in hardware, without AMX; tests of this file and of
    `test_fused.py`.
    """
    lacking = OTHER_PROCESSORS[processor] - set(processor_flags())
    if lacking:
        pytest.skip(f"this processor lacks {', '.join(sorted(lacking))}")
    command = [sys.executable, "-c", AS_ANOTHER, processor]
    ran = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout
    used = set(ran.stdout.splitlines()[0].split(","))
    assert "AMX" not in used and ("AVX-512" in used) == (
        "avx512f" in OTHER_PROCESSORS[processor] or processor == "cooperlake"
    )


def test_the_library_says_what_it_uses() -> None:
    """Of what the processor has the most; the system may forbid the use of AMX."""
    flags = set(processor_flags())
    assert ("AVX-512" in native_library.features()) == ("avx512f" in flags)
    assert ("AVX2" in native_library.features()) == ("avx2" in flags and "avx512f" not in flags)
    assert native_library.has_amx() <= ("amx_bf16" in flags) and (
        "bf16 products" in native_library.features()
    ) >= ("avx512_bf16" in flags)
