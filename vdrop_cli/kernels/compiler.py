"""The library of `native.c`: compiled on first use by the system's C compiler, and stored in a cache.

The file's name is a digest of the source, the compiler's version, its flags and the processor, so a library
for another processor is not loaded. The file ends in a digest of its content; a damaged one is built again.
The library uses torch's OpenMP runtime.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native.c")
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
)
DIGEST = 32  # bytes, at the end of a library
TIMEOUT = 300  # seconds for the compiler


class CompilerError(Exception):
    """Why there is no library, in one line."""


class OtherOpenMP(CompilerError):
    """The compiler is for another OpenMP runtime than torch's."""


def compiler() -> list[str]:
    """The C compiler's command: the environment variable CC, or the first of cc, gcc and clang.

    Raises CompilerError where none is installed.
    """
    if os.name != "posix":
        raise CompilerError(f"it is compiled on POSIX systems only, not on {platform.system()}")
    cc = shlex.split(os.environ.get("CC", ""))
    if cc:
        if shutil.which(cc[0]) is None:
            raise CompilerError(f"the C compiler of the environment variable CC, {cc[0]}, cannot be found")
        return cc
    command = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if command is None:
        raise CompilerError("no C compiler (cc, gcc or clang) can be found; install one, or set CC")
    return [command]


def run(*command: str) -> str:
    """The output of a command. Raises CompilerError where it fails."""
    env = {**os.environ, "LC_ALL": "C"}  # its messages are parsed
    try:
        finished = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            stdin=subprocess.DEVNULL,
            env=env,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"the C compiler {command[0]} cannot run: {error}") from None
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
        line = next((line for line in lines if "error:" in line.lower()), lines[0])
        raise CompilerError(f"the C compiler {command[0]} failed: {line.strip()}")
    return finished.stdout


@lru_cache
def version(*command: str) -> str:
    """The version text of a compiler."""
    return run(*command, "--version")


def cpuinfo(name: str) -> str:
    """The value of a line of /proc/cpuinfo, for the first processor; empty where the line is missing."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == name), "")


def processor_flag() -> str:
    """The flag that allows all extensions of this processor."""
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"


def processor() -> str:
    """Name and extensions of the processor, as far as the system reports them."""
    properties = map(cpuinfo, ("model name", "flags", "Features", "CPU part", "CPU implementer"))
    return "\n".join([platform.machine(), platform.system(), platform.processor(), *properties])


def library_name(command: list[str]) -> str:
    """The file's name, which changes with everything that the library depends on."""
    parts = (
        SOURCE.read_bytes(),
        version(*command).encode(),
        " ".join((*command, *flags())).encode(),
        processor().encode(),
    )
    digest = hashlib.sha256(b"|".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    return f"native-{digest[:24]}.so"


def flags() -> tuple[str, ...]:
    return (*FLAGS, processor_flag())


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/vdrop, by default ~/.cache/vdrop. Raises CompilerError without a home folder."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()) / "vdrop"
    except RuntimeError:
        raise CompilerError("the user has no home folder; set XDG_CACHE_HOME") from None


def is_undamaged(path: Path) -> bool:
    """Whether the content of a library matches the digest at its end."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) > DIGEST and hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def build(command: list[str], path: Path) -> None:
    """Compiles the source beside `path` and renames the library into place.

    Raises CompilerError, or OSError where the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        compiled, linked = f"{folder}/native.o", f"{folder}/native.so"
        run(*command, *flags(), "-c", str(SOURCE), "-o", compiled)
        # Linked without -fopenmp: a second OpenMP runtime in the process would have threads of its own.
        undefined = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
        run(*command, "-shared", *undefined, compiled, "-lm", "-o", linked)
        content = Path(linked).read_bytes()
        with open(linked, "ab") as file:
            file.write(hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(linked, path)


def find_or_build(command: list[str], folder: Path) -> Path:
    """The path of the library in a folder, which is built unless an undamaged one is there.

    Of several processes one builds and the others wait.
    """
    import fcntl  # not on Windows

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / library_name(command)
    if is_undamaged(path):
        return path
    with open(folder / f"{path.stem}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_undamaged(path):
            build(command, path)
    return path


def torch_openmp() -> str:
    """The file of the OpenMP runtime that torch has loaded. Raises CompilerError where torch has none."""
    maps = Path("/proc/self/maps")
    mapped = (
        {
            line.split(maxsplit=5)[-1]
            for line in maps.read_text(errors="surrogateescape").splitlines()  # any file may be mapped
            if "/" in line
        }
        if maps.exists()
        else set()
    )
    in_torch = {str(path) for path in (Path(torch.__file__).resolve().parent / "lib").glob("lib*omp*")}
    runtimes = sorted(
        path for path in mapped or in_torch if Path(path).name.startswith(("libgomp", "libomp", "libiomp5"))
    )
    if not runtimes:
        raise CompilerError("torch has loaded no OpenMP runtime (libgomp, libomp or libiomp5)")
    return next((path for path in runtimes if path in in_torch), runtimes[0])


def load(path: Path) -> ctypes.CDLL:
    try:
        # Torch has loaded it; RTLD_GLOBAL makes its symbols visible to the library.
        ctypes.CDLL(torch_openmp(), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except OSError as error:
        if "__kmpc" in str(error):
            raise OtherOpenMP(
                "the C compiler is for LLVM's OpenMP, and torch has loaded GNU's; install gcc and set CC=gcc"
            ) from None
        raise CompilerError(f"the compiled library cannot be loaded: {error}") from None


@lru_cache(1)
def library() -> ctypes.CDLL:
    """The loaded library, which is compiled first if necessary. Raises CompilerError."""
    command, cache = compiler(), "~/.cache/vdrop"
    try:
        cache = str(cache_folder())
        return load(find_or_build(command, Path(cache)))
    except OtherOpenMP:
        raise
    except (OSError, CompilerError) as error:
        why = error
    try:
        # A loaded library remains when its file is removed.
        with tempfile.TemporaryDirectory(prefix="vdrop-") as folder:
            loaded = load(find_or_build(command, Path(folder)))
    except OSError as error:
        raise CompilerError(
            f"the compiled kernels can be stored neither in {cache} ({why}) nor in a temporary "
            f"folder ({error})"
        ) from None
    print(
        f"vdrop: the compiled kernels cannot be stored in {cache} ({why}); each process compiles them again",
        file=sys.stderr,
    )
    return loaded
