"""The device, back end and precision that settings ask for, and how a process is configured for speed."""

import ctypes
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vdrop_cli import kernels, provenance
from vdrop_cli.errors import ConfigError, require
from vdrop_cli.kernels import compiler
from vdrop_cli.kernels.graphs import Graphs
from vdrop_cli.kernels.operators import use_graphs
from vdrop_cli.settings.choices import Backend, Precision

COMPUTE_DTYPES = {Precision.fp32: None, Precision.bf16: torch.bfloat16}  # the kernels' argument
MC_BATCH = {"cpu": 50, "cuda": 500}  # default number of MC passes in a batch, by device
# options of mallopt(3)
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4


def choose_device(name: str) -> torch.device:
    """Returns the device of that name; `auto` is CUDA if the machine has a GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name} is not a device; choose auto, cpu, cuda or cuda:N") from None
    available = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if f"{device.type}:{device.index or 0}" not in ("cpu:0", *available[1:]):
        raise ConfigError(f"device={name} is not on this machine; choose auto, {' or '.join(available)}")
    return device


def choose_precision(setting: Precision, device: torch.device) -> Precision:
    """Returns the precision; `auto` is bf16 if the device multiplies bf16 matrices faster than fp32."""
    if setting is not Precision.auto:
        return setting
    if device.type == "cuda":
        # by the rule of torch.cuda.is_bf16_supported, which asks the current device instead of this one
        is_fast = torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8
        return Precision.bf16 if is_fast else Precision.fp32
    return Precision.bf16 if {"avx512_bf16", "amx_bf16", "bf16"} & set(processor_flags()) else Precision.fp32


def choose_mc_batch(setting: int | None, device: torch.device, p_weight: float) -> int:
    """Returns how many MC passes share a batch.

    A GPU needs many, since every batch adds a wait to every step. `p_weight` is the probability of dropping
    an element of the recurrent weights. Where it is above 0, a batch is one pass, and a larger `setting`
    raises ConfigError.
    """
    if p_weight > 0:  # a batch has one mask on its weights
        require(setting in (None, 1), "mc_batch", f"1 or null with dropout.p_weight={p_weight:g}", setting)
        return 1
    return MC_BATCH[device.type] if setting is None else setting


def choose_backend(setting: Backend, device: torch.device) -> Backend:
    """Returns the back end; prints why `auto` did not take the fastest one."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            backend = Backend[kernels.choose(setting.name, device)]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for warning in caught:
        print(f"vdrop: {warning.message}", file=sys.stderr)
    return backend


def configure_process(device: torch.device) -> None:
    """Makes steps on the CPU faster by settings of the whole process, which only commands may change."""
    provenance.stated_commit()  # raises ConfigError for a malformed VDROP_COMMIT before any work
    retain_freed_memory()
    # "medium" selects oneDNN instead of MKL, and MKL is slow on AMD's processors. On CUDA, "medium" would
    # multiply in less than fp32.
    use_onednn = (
        device.type == "cpu"
        and compiler.cpuinfo("vendor_id") == "AuthenticAMD"
        and products_are_exact("medium")
    )
    torch.set_float32_matmul_precision("medium" if use_onednn else "highest")


def products_are_exact(setting: str) -> bool:
    """Returns whether matrix products stay in fp32 under a value of `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    try:
        torch.set_float32_matmul_precision(setting)
        product = (a @ a).double()
    finally:
        torch.set_float32_matmul_precision(before)
    return is_exact(product, a.double() @ a.double())


def is_exact(product: torch.Tensor, exact: torch.Tensor) -> bool:
    """Returns whether the relative error is that of fp32, 5e-7; that of tf32 is 3e-4, that of bf16 3e-3."""
    return bool((product - exact).norm() < 1e-5 * exact.norm())


def retain_freed_memory() -> None:
    """Keeps freed memory in glibc's allocator: fresh pages for 28 MB of logits cost a fifth of a step."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0), (M_TOP_PAD, 64 * 2**20)):
        mallopt(option, value)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def memory_returned(device: torch.device) -> Iterator[None]:
    """At the end of the context, a GPU gets back the memory that this process holds and does not use.

    That is the memory of the graphs of loops within the context, and what torch's allocator keeps.
    """
    with use_graphs(Graphs()):
        yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_megabytes(device: torch.device) -> float:
    """Returns the peak memory of this process in MiB, on a GPU that of the GPU; 0 if the system hides it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def processor_flags() -> list[str]:
    """Returns the processor's extensions, by the Linux kernel's names; none if the system hides them."""
    return (compiler.cpuinfo("flags") or compiler.cpuinfo("Features")).split()
