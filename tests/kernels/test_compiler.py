"""The library is compiled once, for this processor, and what stands in the way of that is said in one
line.
"""

import math
import os
import pwd
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import mark_long
from tests.processes import ROOT, environment
from vdrop_cli import kernels
from vdrop_cli.kernels import compiler, native
from vdrop_cli.kernels.compiler import CompilerError

CPU = torch.device("cpu")
TINY = """#include <omp.h>
int answer(void) {
    int threads = 0;
#pragma omp parallel num_threads(2)
#pragma omp single
    threads = omp_get_num_threads();
    return 40 + threads;
}
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one function, and a cache folder that does not yet exist; a compiler's calls are counted
    in `calls`.
    """
    source, wrapper = tmp_path / "tiny.c", tmp_path / "counting-cc"
    source.write_text(TINY)
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) echo link >> {tmp_path}/calls;; esac\nexec cc "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setattr(compiler, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(wrapper))
    compiler.library.cache_clear()
    yield tmp_path
    compiler.library.cache_clear()


@pytest.fixture
def start(tiny: Path) -> Start:
    """A process that calls the function of the library and prints its answer."""
    code = (
        "import sys; from pathlib import Path; from vdrop_cli.kernels import compiler; "
        f"compiler.SOURCE = Path({str(tiny / 'tiny.c')!r}); "
        "sys.stdout.write(str(compiler.library().answer()))"
    )

    def process(**variables: str) -> "subprocess.Popen[str]":
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", code], env={**environment(), **variables}, **pipes)

    return process


def libraries(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "vdrop").glob("*.so"))


def linked(folder: Path) -> int:
    """How often a library was made."""
    return len((folder / "calls").read_text().splitlines())


def test_a_library_is_compiled_once_and_loaded_again(tiny: Path) -> None:
    for _ in range(2):
        assert compiler.library().answer() == 42
        compiler.library.cache_clear()
    assert len(libraries(tiny)) == 1 and linked(tiny) == 1


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[: len(content) // 2], lambda content: b"", lambda c: c[:99] + b"?" + c[100:]],
)
def test_a_damaged_library_is_built_again(tiny: Path, damage: Callable[[bytes], bytes]) -> None:
    compiler.find_or_build(compiler.compiler(), compiler.cache_folder())
    (path,) = libraries(tiny)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert compiler.library().answer() == 42
    assert compiler.is_undamaged(path) and linked(tiny) == 2


@pytest.mark.parametrize("count", mark_long([2, 4], [2]))
def test_processes_that_start_at_once_build_one_library(count: int, tiny: Path, start: Start) -> None:
    processes = [start() for _ in range(count)]
    assert [process.communicate()[0] for process in processes] == ["42"] * count
    assert len(libraries(tiny)) == 1 and linked(tiny) == 1


def test_a_library_is_of_one_source_compiler_and_processor(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home folder may be shared by machines with different processors."""
    command = compiler.compiler()
    names = [compiler.library_name(command)]
    monkeypatch.setattr(compiler, "processor", lambda: "another")
    names.append(compiler.library_name(command))
    names.append(compiler.library_name([*command, "-O1"]))
    (tiny / "tiny.c").write_text(f"{TINY}\n")
    names.append(compiler.library_name(command))
    assert len(set(names)) == 4


def test_a_cache_folder_that_cannot_be_written_costs_a_compilation_and_a_line(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny / "cache").write_text("a file\n")
    assert compiler.library().answer() == 42
    stderr = capsys.readouterr().err
    assert (
        stderr.startswith(f"vdrop: the compiled kernels cannot be stored in {tiny}/cache/vdrop (")
        and stderr.count("\n") == 1
    )


def test_without_a_home_folder_too(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user has no entry in the list of users."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert compiler.library().answer() == 42
    why = "the user has no home folder; set XDG_CACHE_HOME"
    assert f"cannot be stored in ~/.cache/vdrop ({why}); each process" in capsys.readouterr().err


def test_a_full_disk_costs_a_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(command: list[str], path: Path) -> None:
        if path.is_relative_to(tiny):
            raise CompilerError("cc failed: No space left on device")
        original(command, path)

    original = compiler.build
    monkeypatch.setattr(compiler, "build", full)
    assert compiler.library().answer() == 42
    assert "No space left on device" in capsys.readouterr().err and libraries(tiny) == []


def test_without_any_folder_to_write_to_there_is_no_library(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny / "cache").write_text("a file\n")
    monkeypatch.setattr(tempfile, "tempdir", str(tiny / "nowhere"))
    with pytest.raises(
        CompilerError,
        match=r"^the compiled kernels can be stored neither in .*/cache/vdrop \(.*nor in a temporary folder",
    ):
        compiler.library()


def test_a_file_that_cannot_be_written_whole_is_not_left_behind(tiny: Path) -> None:
    """The size of files is limited below that of the library, as a disk that is full would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = compiler.cache_folder()
    name = compiler.library_name(compiler.compiler())
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(CompilerError, match="failed"):
            compiler.find_or_build(compiler.compiler(), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in folder.iterdir()) == [f"{name.removesuffix('.so')}.lock"]


@pytest.fixture
def asked_anew() -> None:
    """Whether the library can be built is determined once in a process."""
    for function in (native.unavailable_reason, kernels.fastest_available):
        function.cache_clear()
    yield
    for function in (native.unavailable_reason, kernels.fastest_available):
        function.cache_clear()


@pytest.mark.usefixtures("tiny", "asked_anew")
@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"CC": "", "PATH": ""}, r"no C compiler \(cc, gcc or clang\) can be found; install one, or set CC"),
        (
            {"CC": "no-such-compiler"},
            "the C compiler of the environment variable CC, no-such-compiler, cannot be found",
        ),
        ({"CC": "false"}, "the C compiler false failed: exit code 1"),
    ],
)
def test_without_a_compiler_auto_is_fused_with_a_line_and_native_an_error(
    variables: dict[str, str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(native, "feature_bits", compiler.library)
    with pytest.warns(
        UserWarning, match=f"^backend=auto is fused on cpu, which is slower than native: {why}$"
    ):
        assert kernels.choose("auto", CPU) == "fused"
    with pytest.raises(ValueError, match=f"^backend=native cannot run on cpu: {why}; choose backend=fused$"):
        kernels.choose("native", CPU)


@pytest.mark.native
@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize(("error", "said"), [(0.25, "off by 0.2"), (math.nan, "off by nan")])
def test_a_library_that_computes_something_else_is_not_used(
    error: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "largest_error", lambda cell, *_: error if cell == "gru" else 1e-7)
    why = f"the self-check of the compiled kernels in torch.float32 is {said}"
    with pytest.warns(UserWarning, match=f"slower than native: {why}$"):
        assert kernels.choose("auto", CPU) == "fused"
    with pytest.raises(ValueError, match=f"^backend=native cannot run on cpu: {why}; choose backend=fused$"):
        kernels.choose("native", CPU)


SELF_CHECK = """
import sys
from pathlib import Path
from vdrop_cli.kernels import compiler, native
compiler.SOURCE, compiler.FLAGS = Path(sys.argv[1]), (*compiler.FLAGS, "-O1")
print(native.unavailable_reason())
"""


@pytest.mark.native
@pytest.mark.parametrize(
    ("right", "wrong", "dtype"),
    [
        ("j < BLOCK; j++) { __VA_ARGS__ }", "j < BLOCK - 1; j++) { __VA_ARGS__ }", "float32"),
        (
            "(part * high + row) * from_row, row < there",
            "(part * high + row) * from_row, row + 1 < there",
            "bfloat16",
        ),
    ],
    ids=["whole blocks of units", "bf16"],
)
def test_the_self_check_runs_all_code_of_a_step(right: str, wrong: str, dtype: str, tmp_path: Path) -> None:
    source = compiler.SOURCE.read_text()
    assert source.count(right) == 1
    (tmp_path / "native.c").write_text(source.replace(right, wrong))
    command = [sys.executable, "-c", SELF_CHECK, str(tmp_path / "native.c")]
    variables = environment(XDG_CACHE_HOME=str(tmp_path / "cache"))
    ran = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert f"compiled kernels in torch.{dtype} is off by" in ran.stdout, ran.stderr


def test_the_compilers_first_error_is_named(tiny: Path) -> None:
    (tiny / "tiny.c").write_text("int answer(void) { return unknown; }\n")
    with pytest.raises(CompilerError, match=r"counting-cc failed: .*tiny\.c:1:.*error: .unknown. undeclared"):
        compiler.library()


def test_a_compiler_for_another_openmp_is_named_without_a_second_try(tiny: Path) -> None:
    """Clang's calls are LLVM's, which GNU's runtime does not have."""
    source = "void __kmpc_barrier(void);\nint answer(void) { __kmpc_barrier(); return 42; }\n"
    (tiny / "tiny.c").write_text(source)
    with pytest.raises(CompilerError, match=r"is for LLVM's OpenMP, and torch has loaded GNU's; .*CC=gcc$"):
        compiler.library()
    assert linked(tiny) == 1


def test_a_runtime_in_a_folder_with_a_space_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a mapped file whose name is not UTF-8."""
    lines = (
        b"7f01-7f02 r--p 00000000 00:00 0\n"
        b"7f02-7f03 r--p 00000000 fe:00 41    /caf\xe9\n"
        b"7f00-7f01 r-xp 00000000 fe:00 42    /a folder/torch/lib/libgomp.so.1\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda path, errors="strict": lines.decode(errors=errors))
    assert compiler.torch_openmp() == "/a folder/torch/lib/libgomp.so.1"


@pytest.mark.native
def test_there_is_one_openmp_runtime_whose_threads_are_torchs() -> None:
    """In a process of its own, as other libraries bring runtimes of their own. There a second thread starts
    with the first work for two, and takes torch's part, too.
    """
    program = (
        "import os, torch; from vdrop_cli import kernels; from pathlib import Path\n"
        "def threads():\n    return len(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads(1)\n"
        "assert kernels.choose('native', torch.device('cpu')) == 'native'\n"
        "before, shapes = threads(), ((9, 8, 7), (8, 6), (18, 7), (18, 6), (18,), (18,))\n"
        "torch.set_num_threads(2)\n"
        "assert threads() == before\n"
        "kernels.gru(*map(torch.ones, shapes), kernels.Masks(), backend='native')\n"
        "assert threads() == before + 1\n"
        "torch.ones(10**6).exp()\n"
        "assert threads() == before + 1\n"
        "files = {line.split()[-1] for line in Path('/proc/self/maps').read_text().splitlines()}\n"
        "print(*(name for name in files if Path(name).name.startswith(('libgomp', 'libomp', 'libiomp5'))), "
        "sep='\\n')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], check=True, env=environment(), capture_output=True, text=True
    )
    assert len(ran.stdout.split()) == 1, ran.stdout


@pytest.mark.native
def test_the_name_of_a_library_says_nothing_of_the_machine() -> None:
    name = compiler.library_name(compiler.compiler())
    assert name.startswith("native-") and len(name) == len("native-.so") + 24


@pytest.mark.parametrize(
    ("stated", "folder"), [("/x", "/x/vdrop"), ("relative", "~/.cache/vdrop"), ("", "~/.cache/vdrop")]
)
def test_the_cache_is_the_users(stated: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", stated)
    assert str(compiler.cache_folder()) == os.path.expanduser(folder)
