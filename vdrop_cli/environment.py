"""The machine a run is on: device and precision that were asked for, what makes it fast, and what to write
down of the rest.
"""

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vdrop_cli import __version__, kernels
from vdrop_cli.config import Backend, ConfigError, Precision
from vdrop_cli.kernels import compiler, native

CODE = ("vdrop_cli", "conf", "pyproject.toml")  # what results depend on; pages and records are none of it
PACKAGES = (
    "torch",
    "triton",
    "hydra-core",
    "omegaconf",
    "datasets",
    "tqdm",
    "tensorboard",
    "numpy",
    "scikit-learn",
)


def device(name: str) -> torch.device:
    """`auto` is CUDA where there is a device, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name} is not a device; choose auto, cpu, cuda or cuda:N") from None
    there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if f"{wanted.type}:{wanted.index or 0}" not in (f"{there[0]}:0", *there[1:]):
        raise ConfigError(f"device={name} is not on this machine; choose auto or one of {', '.join(there)}")
    return wanted


COMPUTE_DTYPES = {Precision.fp32: None, Precision.bf16: torch.bfloat16}  # as the kernels take it


def precision(wanted: Precision, on: torch.device) -> Precision:
    """`auto` is bf16 where the processor, or the GPU, multiplies matrices of it faster than of fp32."""
    if wanted is not Precision.auto:
        return wanted
    if on.type == "cuda":
        return Precision.bf16 if torch.cuda.is_bf16_supported(including_emulation=False) else Precision.fp32
    return Precision.bf16 if {"avx512_bf16", "amx_bf16", "bf16"} & set(processor_flags()) else Precision.fp32


MC_BATCH = {"cpu": 50, "cuda": 500}


def mc_batch(wanted: int | None, on: torch.device) -> int:
    """Passes of MC evaluation that run together: a GPU is idle with few, and waits for each step of the text
    once a batch of them.
    """
    return MC_BATCH[on.type] if wanted is None else wanted


def backend(wanted: Backend, on: torch.device) -> Backend:
    """What `auto` comes to on a device; says so where that is not what was to be expected there."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            chosen = Backend[kernels.choose(wanted.name, on)]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for warning in caught:
        print(f"vdrop: {warning.message}", file=sys.stderr)
    return chosen


def make_ready(on: torch.device) -> None:
    """Settings of this process that a step is faster with on the CPU; the commands make them, an import
    changes nothing.
    """
    stated_commit()  # a mistake in it is an error before any work
    keep_memory()
    # "medium" is oneDNN instead of MKL, which is slow on these processors; on CUDA it would be less than
    # fp32.
    quick = on.type == "cpu" and processor_vendor() == "AuthenticAMD" and products_are_exact("medium")
    torch.set_float32_matmul_precision("medium" if quick else "highest")


def products_are_exact(setting: str) -> bool:
    """Whether fp32 products are those of fp32 under a setting of `torch.set_float32_matmul_precision` that
    allows less.
    """
    before = torch.get_float32_matmul_precision()
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    try:
        torch.set_float32_matmul_precision(setting)
        product = (a @ a).double()
    finally:
        torch.set_float32_matmul_precision(before)
    return is_exact(product, a.double() @ a.double())


def is_exact(product: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether a product errs no more than one in fp32: 5e-7; bf16 errs by 3e-3, tf32 by 3e-4."""
    return bool((product - exact).norm() < 1e-5 * exact.norm())


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of mallopt(3)


def keep_memory() -> None:
    """Has the allocator, where it is glibc's, keep what it was given back: fresh pages for 28 MB of logits
    cost a fifth of a step.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0), (M_TOP_PAD, 64 * 2**20)):
        mallopt(option, value)


def cuda_versions() -> dict[str, Any]:
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]


def describe(on: torch.device, backend: str, precision: str) -> dict[str, Any]:
    """Date, versions, device, back end, precision and code, for a log."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "vdrop": __version__,
        "python": platform.python_version(),
        **{package: version for package in PACKAGES if (version := installed(package)) is not None},
        "torch": str(
            torch.__version__
        ),  # with the CUDA version that it was built for, which the package's metadata may lack
        "device": device_name(on),
        "device_type": on.type,
        **(cuda_versions() if on.type == "cuda" else {}),
        "threads": torch.get_num_threads(),
        "backend": backend,
        **(compiled() if backend == "native" else {}),
        "precision": precision,
        "fp32_products": f"torch.set_float32_matmul_precision({torch.get_float32_matmul_precision()!r})",
        **commit(),
    }


def compiled() -> dict[str, Any]:
    """What the library of the back end `native` was compiled with, and which of the processor's extensions it
    uses.
    """
    return {
        "compiler": compiler.version(*compiler.compiler()).partition("\n")[0],
        "processor_features": ", ".join(native.features()),
    }


def installed(package: str) -> str | None:
    """Its version, None where it is not there: some are extras."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def processor() -> str:
    """The processor's name where the system tells it."""
    return compiler.cpuinfo("model name") or platform.processor() or platform.machine()


def wait_for(device: torch.device) -> None:
    """Until everything that was asked of it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_megabytes(device: torch.device) -> float:
    """The most memory that this process ever held, on a GPU of its own; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def processor_vendor() -> str:
    return compiler.cpuinfo("vendor_id")


def processor_flags() -> list[str]:
    """Its extensions, by the names of the Linux kernel; none where the system does not tell."""
    return (compiler.cpuinfo("flags") or compiler.cpuinfo("Features")).split()


def commit() -> dict[str, Any]:
    """The git commit, git's number for the code in it, and whether that differs.

    Where the code is not a checkout, or git cannot read it, the commit is that of VDROP_COMMIT, and `dirty`
    is None, unknown; nothing where that is not set.
    """
    root, stated = Path(__file__).parent.parent, stated_commit()
    if not (root / ".git").exists():
        return stated

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit, code = git("rev-parse", "HEAD", f"HEAD:{CODE[0]}").split()
        return {
            "commit": commit,
            "code": code,
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", *CODE)),
        }
    except (OSError, subprocess.CalledProcessError):  # no git here, or no commit yet
        return stated


def stated_commit() -> dict[str, Any]:
    """What the environment variable VDROP_COMMIT says of the code. Raises ConfigError unless that is a commit
    in hexadecimal digits.
    """
    stated = os.environ.get("VDROP_COMMIT", "")
    if stated and not re.fullmatch("[0-9a-fA-F]{7,64}", stated):
        raise ConfigError(
            f"VDROP_COMMIT must be a git commit, 7 to 64 hexadecimal digits, got {stated!r}; correct or "
            "unset it"
        )
    return {"commit": stated.lower(), "dirty": None} if stated else {}
