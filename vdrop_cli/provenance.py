"""What a log records of the machine, the installed versions and the code."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vdrop_cli import __version__
from vdrop_cli.errors import ConfigError
from vdrop_cli.kernels import compiler, native_library

CODE = ("vdrop_cli", "conf", "pyproject.toml")  # results depend on these alone, not on pages and records
SUFFIXES = ("py", "c", "yaml")  # of the code's files in an installed package
PROCESSOR_NUMBERS = (  # their lines in /proc/cpuinfo, on x86 and on ARM
    {"family": "cpu family", "model": "model"},
    {"implementer": "CPU implementer", "part": "CPU part"},
)
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


def describe(device: torch.device, backend: str, precision: str) -> dict[str, Any]:
    """Returns date, versions, device, back end, precision and code, for a log."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "vdrop": __version__,
        "python": platform.python_version(),
        **{package: version for package in PACKAGES if (version := installed_version(package)) is not None},
        # With the CUDA version of the build, which the package's metadata may lack.
        "torch": str(torch.__version__),
        "device": device_name(device),
        "device_type": device.type,
        **(cuda_versions() if device.type == "cuda" else processor_details()),
        "threads": torch.get_num_threads(),
        "backend": backend,
        **(compiler_details() if backend == "native" else {}),
        "precision": precision,
        "fp32_products": f"torch.set_float32_matmul_precision({torch.get_float32_matmul_precision()!r})",
        **commit(),
    }


def installed_version(package: str) -> str | None:
    """Returns a package's version, None if it is not installed: some are extras."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    """Returns the processor's name, or its architecture where the system does not report a name."""
    return compiler.cpuinfo("model name") or platform.processor() or platform.machine()


def processor_details() -> dict[str, Any]:
    """Returns the processor's model as numbers, empty where the system does not report them.

    A name such as "AMD EPYC" stands for several generations, one of which is twice as fast as another.
    """
    for pairs in PROCESSOR_NUMBERS:
        numbers = {name: compiler.cpuinfo(line) for name, line in pairs.items()}
        if all(numbers.values()):
            return {"processor_model": ", ".join(f"{name} {number}" for name, number in numbers.items())}
    return {}


def cuda_versions() -> dict[str, Any]:
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]


def compiler_details() -> dict[str, Any]:
    """Returns the compiler of the back end `native`, and the processor extensions that it uses."""
    return {
        "compiler": compiler.version(*compiler.compiler()).partition("\n")[0],
        "processor_features": ", ".join(native_library.features()),
    }


def commit() -> dict[str, Any]:
    """Returns the git commit, and whether the code in the working tree differs from it.

    `code` is git's hash of the package in the commit, `dirty` whether the working tree differs, also by code
    that git does not track, and `changes` a digest of the differences. Without a checkout that git can read,
    `files` is a digest of the code's files instead. The commit is then present only if VDROP_COMMIT or the
    installer states it, and `dirty` is None, unknown.
    """
    root, stated = Path(__file__).parent.parent, stated_commit()
    if not (root / ".git").exists():
        return installed_code(root) | stated

    def git(*arguments: str) -> str:
        return (
            subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True)
            .stdout.decode(errors="replace")
            .strip()
        )

    try:
        commit, code = git("rev-parse", "HEAD", f"HEAD:{CODE[0]}").split()
        version = {"commit": commit, "code": code}
        changes = git("diff", "HEAD", "--", *CODE)
        new_code = (f"{CODE[0]}/*.{suffix}" for suffix in SUFFIXES)  # settings of one's own are no code
        for name in git("ls-files", "--others", "--exclude-standard", "-z", "--", *new_code).split("\0"):
            if name:
                changes += f"\n{name} {hashlib.sha256((root / name).read_bytes()).hexdigest()}"
        if not changes:
            return version | {"dirty": False}
        return version | {"dirty": True, "changes": hashlib.sha256(changes.encode()).hexdigest()}
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or the repository has no commit
        return installed_code(root) | stated


def installed_code(root: Path) -> dict[str, Any]:
    """Returns a digest of the code's files, and the commit that pip installed them from, if it did.

    `root` is the folder of the package, such as site-packages. Two installed copies of one version can
    differ.
    """
    digest = hashlib.sha256()
    package = root / CODE[0]
    folders = [package] if (package / "conf").is_dir() else [package, root / "conf"]  # as in a checkout
    paths = (path for folder in folders for suffix in SUFFIXES for path in folder.rglob(f"*.{suffix}"))
    for path in sorted(filter(Path.is_file, paths)):
        digest.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    code: dict[str, Any] = {"files": digest.hexdigest()}
    for distribution in importlib.metadata.distributions(name="vdrop", path=[str(root)]):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if "commit_id" in origin.get("vcs_info", {}):
            code |= {"commit": origin["vcs_info"]["commit_id"], "dirty": None}
    return code


def stated_commit() -> dict[str, Any]:
    """Returns the commit in the environment variable VDROP_COMMIT, empty if it is not set.

    Raises ConfigError unless it is a commit in hexadecimal digits.
    """
    stated = os.environ.get("VDROP_COMMIT", "")
    if stated and not re.fullmatch("[0-9a-fA-F]{7,64}", stated):
        raise ConfigError(
            f"VDROP_COMMIT must be a git commit, 7 to 64 hexadecimal digits, got {stated!r}; correct or "
            "unset it"
        )
    return {"commit": stated.lower(), "dirty": None} if stated else {}
