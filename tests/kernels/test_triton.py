"""The back end for CUDA on a machine that has none: its programs interpreted, and compiled; and what is said
where it cannot run.
"""

import builtins
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import ROOT, environment
from vdrop_cli import kernels
from vdrop_cli.device import choose_backend
from vdrop_cli.errors import ConfigError
from vdrop_cli.kernels import Masks
from vdrop_cli.settings.choices import Backend

triton = pytest.importorskip("triton")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PROGRAMS = [
    "lstm_forward",
    "lstm_backward",
    "gru_reset_after",
    "gru_gates",
    "gru_candidate",
    "gru_backward",
    "gru_gates_backward",
]
LOW = {"p_ptr", "inputs_ptr", "da_ptr", "dp_ptr", "grad_h_ptr"}  # of the type that is multiplied in


CELLS = Path(
    "tests/kernels/triton_cells.py"
)  # tests that are run in processes of their own, a part of them in each
CELL_TESTS = re.findall(r"^def (test_\w+)", (ROOT / CELLS).read_text(), re.MULTILINE)
PARTS = 3


def passed_in_interpreter(tests: list[str], marker: str) -> int:
    """How many of these tests ran and passed, in a process that interprets Triton's programs.

    Whether programs are interpreted is settled when Triton is imported.
    """
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-m", marker, *tests]
    variables = {**environment(), "TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and "skipped" not in ran.stdout
    return int(passed[1])


@pytest.mark.parametrize("part", range(PARTS))
def test_the_cells_agree_with_the_definition_in_tritons_interpreter(part: int) -> None:
    tests = [f"{CELLS}::{name}" for name in CELL_TESTS[part::PARTS]]
    assert passed_in_interpreter(tests, "not long") >= len(tests)


@pytest.mark.long
def test_all_cells_agree_with_the_definition_in_tritons_interpreter() -> None:
    assert passed_in_interpreter([str(CELLS)], "long") > 30


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("low", ["fp32", "bf16"])
@pytest.mark.parametrize("masked", [True, False])
def test_programs_compile_for_gpus(name: str, low: str, masked: bool) -> None:
    """To machine code of the Ampere and Hopper generations, as for one sequence of one step, whose sizes
    Triton takes as constants, too.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vdrop_cli.kernels import programs

    program = getattr(programs, name)
    constants: dict[str, Any] = {"GROUPS": 4, "ACC": triton.language.float32, "BLOCK": 128}
    types = {}
    for parameter in (p.name for p in program.params):
        if parameter in constants:
            types[parameter] = "constexpr"
        elif parameter.endswith("_ptr"):
            optional = (
                "mask" in parameter
                or parameter in ("lengths_ptr", "dcells_ptr")
                or (name == "gru_backward" and parameter in ("inner_ptr", "dp_ptr"))
            )
            types[parameter] = (
                "*i64" if parameter == "lengths_ptr" else f"*{low if parameter in LOW else 'fp32'}"
            )
            if optional and not masked:
                types[parameter], constants[parameter] = "constexpr", None
        elif not masked and parameter in ("time", "batch"):
            types[parameter], constants[parameter] = "constexpr", 1
        else:
            types[parameter] = "i32"
    constants = {key: value for key, value in constants.items() if key in types}
    for generation in (80, 90):
        compiled = triton.compile(
            ASTSource(program, types, constants), target=GPUTarget("cuda", generation, 32)
        )
        assert len(compiled.asm["cubin"]) > 1000


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Whether Triton can be used is tried once in a process."""
    caches = (kernels.fastest_available, kernels.triton_import_error, kernels.triton_device_error)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def import_error() -> Exception:
    """As where Triton is not installed."""
    return ImportError("No module named 'triton'")


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch, import_error: Exception) -> None:
    original = builtins.__import__

    def importing(name: str, *arguments: Any) -> Any:
        if name == "vdrop_cli.kernels" and arguments[2:] and "triton" in (arguments[2] or ()):
            raise import_error
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.mark.usefixtures("asked_anew")
def test_on_the_cpu_it_is_an_error_that_says_why() -> None:
    zeros = [torch.zeros(s) for s in ((2, 1, 3), (1, 4), (12, 3), (12, 4), (12,), (12,))]
    with pytest.raises(
        ValueError,
        match=r"backend=triton cannot run on cpu: Triton's programs are for CUDA devices; choose "
        r"backend=fused",
    ):
        kernels.gru(*zeros, Masks(), backend="triton")
    with pytest.raises(ConfigError, match="backend=triton cannot run on cpu"):
        choose_backend(Backend.triton, CPU)
    assert choose_backend(Backend.auto, CPU) in (Backend.native, Backend.fused)


@pytest.mark.usefixtures("asked_anew", "without_triton")
def test_without_triton_auto_says_so_once_and_is_fused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(
        UserWarning,
        match=r"backend=auto is fused on cuda:0, which is slower than triton: Triton cannot be imported",
    ):
        assert kernels.choose("auto", CUDA) == "fused"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.choose("auto", CUDA) == "fused"
    with pytest.raises(
        ValueError,
        match=r"backend=triton cannot run on cuda: Triton cannot be imported \(No module named 'triton'\)",
    ):
        kernels.choose("triton", CUDA)
    kernels.fastest_available.cache_clear()  # as in another process
    assert choose_backend(Backend.auto, CUDA) is Backend.fused
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and stderr.startswith("vdrop: backend=auto is fused on cuda")


@pytest.mark.usefixtures("asked_anew", "without_triton")
@pytest.mark.parametrize(
    "import_error",
    [TypeError("'Tag' object is not iterable"), RuntimeError("operator is registered\nalready")],
)
def test_whatever_importing_triton_raises_auto_is_fused(import_error: Exception) -> None:
    """Torch and Triton of other versions raise by many names."""
    why = rf"{type(import_error).__name__}: {str(import_error).splitlines()[0]}"
    with pytest.warns(UserWarning, match=why):
        assert kernels.choose("auto", CUDA) == "fused"
    with pytest.raises(ValueError, match=why):
        kernels.choose("triton", CUDA)


def test_tags_of_operators_are_a_sequence() -> None:
    """torch 2.11 takes no single one; 2.6 takes none."""
    from vdrop_cli.kernels import operators as module
    from vdrop_cli.kernels import triton  # noqa: F401  # it makes the operators

    tags = list(module.operator.keywords.get("tags", ()))
    assert all(
        tag in getattr(torch.ops.vdrop, name).default.tags
        for tag in tags
        for name in ("lstm", "lstm_backward", "gru")
    )
    assert tags or "tags" not in signature(torch.library.custom_op).parameters


@pytest.mark.usefixtures("asked_anew")
def test_a_device_is_checked_once_by_whatever_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vdrop_cli.kernels import triton as module

    checked: list[torch.device] = []
    monkeypatch.setattr(module, "unavailable_reason", lambda device: checked.append(device) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name in ("cuda", "cuda:1", "cuda", "cuda:0"):
        assert (
            kernels.choose("auto", torch.device(name))
            == kernels.choose("triton", torch.device(name))
            == "triton"
        )
    assert checked == [torch.device("cuda:1"), torch.device("cuda:0")]


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("failure", ["wrong", "no number", "raises"])
def test_a_self_check_that_fails_says_how(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vdrop_cli.kernels import triton as module

    def check(device: torch.device, cell: str) -> float:
        if failure == "raises":
            raise RuntimeError("PTX was compiled with an unsupported toolchain\nand more")
        return {"lstm": 1e-7, "gru": 0.25 if failure == "wrong" else math.nan}[cell]

    monkeypatch.setattr(module, "self_check", check)
    message = {
        "wrong": "the self-check is off by 0.2",
        "no number": "the self-check is off by nan",
        "raises": "RuntimeError: PTX was compiled with an unsupported toolchain",
    }[failure]
    with pytest.raises(ValueError, match=f"{message}; choose backend=fused$"):
        kernels.choose("triton", CUDA)
    with pytest.warns(UserWarning, match=f"{message}$"):
        assert kernels.choose("auto", CUDA) == "fused"


@pytest.mark.usefixtures("asked_anew")
def test_where_the_self_check_passes_auto_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from vdrop_cli.kernels import triton as module

    monkeypatch.setattr(module, "self_check", lambda device, cell: 3e-4)  # as with tf32 products
    assert kernels.choose("auto", CUDA) == kernels.choose("triton", CUDA) == "triton"


def test_importing_the_package_does_not_import_triton() -> None:
    """It takes a second, and is not everywhere."""
    code = "import sys, vdrop_cli.layers; assert 'vdrop_cli.kernels.triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
