"""The machine a run is on: the device that was asked for, and what to write down of the rest."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from vdrop_cli import __version__
from vdrop_cli.config import ConfigError

PACKAGES = ("torch", "hydra-core", "omegaconf", "datasets", "tqdm", "tensorboard")


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


def describe(on: torch.device, backend: str) -> dict[str, Any]:
    """Versions, device, back end and code, for a log."""
    return {
        "vdrop": __version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else processor(),
        "device_type": on.type,
        "threads": torch.get_num_threads(),
        "backend": backend,
        **commit(),
    }


def processor() -> str:
    """The processor's name where the system tells it."""
    told = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in told.read_text().splitlines() if line.startswith("model name")] if told.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> dict[str, Any]:
    """The git commit of the code, and whether files differ from it; nothing where the code is not a checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return {}

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):  # no git here, or no commit yet
        return {}
