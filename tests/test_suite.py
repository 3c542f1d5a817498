"""How these tests themselves are run: on machines with other plugins, and what make does for them."""

import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import settings
from tests.processes import ROOT, environment
from vdrop_cli.settings.choices import BenchCell, BenchPart, BenchSize, Precision

NOISY_PLUGIN = """
import warnings

warnings.warn("imported", DeprecationWarning)

def pytest_configure(config):
    warnings.warn("configured", UserWarning)

def pytest_sessionstart(session):
    warnings.warn("started", UserWarning)

def pytest_collection_modifyitems(items):
    warnings.warn("collected", UserWarning)

def pytest_sessionfinish(session):
    warnings.warn("finished", UserWarning)
"""
TESTS = """
import warnings

import pytest

def test_quiet():
    pass

def test_that_warns():
    warnings.warn("of a test", UserWarning)

@pytest.mark.filterwarnings("ignore")
def test_that_may_warn():
    warnings.warn("of a test", UserWarning)
"""


def test_a_plugin_that_is_merely_installed_may_warn_and_a_test_may_not(tmp_path: Path) -> None:
    """With the configuration and conftest of these tests, in a process of its own."""
    (tmp_path / "noisy_plugin.py").write_text(NOISY_PLUGIN)
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(ROOT / "pyproject.toml"),
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-rA",
    ]
    python_path = os.pathsep.join((str(tmp_path), environment()["PYTHONPATH"]))
    ran = subprocess.run(
        [*command, "-p", "noisy_plugin", "-p", "tests.conftest", str(tmp_path / "test_some.py")],
        cwd=ROOT,
        env=environment(PYTHONPATH=python_path, PYTEST_ADDOPTS=""),
        capture_output=True,
        text=True,
    )
    outcomes = {
        line.split("::")[1].split()[0]: line.split()[0]
        for line in ran.stdout.splitlines()
        if line.startswith(("PASSED", "FAILED"))
    }
    expected = {"test_quiet": "PASSED", "test_that_may_warn": "PASSED", "test_that_warns": "FAILED"}
    assert outcomes == expected and ran.returncode == 1, ran.stdout + ran.stderr


def recipe(target: str, *given: str) -> list[list[str]]:
    """The commands of a target, as make would run them, as words."""
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", target, *given]
    printed = subprocess.run(
        command, cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True
    ).stdout
    return [shlex.split(line) for line in printed.replace("\\\n", " ").splitlines()]


def test_long_forms_run_only_by_their_own_target(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\ndef test_short():\n    pass\n\n@pytest.mark.long\ndef test_long():\n    pass\n"
    )
    for target, name in (("test", "test_short"), ("test-long", "test_long")):
        (words,) = [words for words in recipe(target) if "pytest" in words]
        options = words[words.index("auto") + 1 :]  # behind `-m pytest -n auto`
        command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), *options, "-rA"]
        ran = subprocess.run(
            [*command, "-p", "no:cacheprovider", str(tmp_path / "test_some.py")],
            cwd=ROOT,
            env=environment(PYTEST_ADDOPTS="", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"),
            capture_output=True,
            text=True,
        )
        passed = [line.split("::")[1] for line in ran.stdout.splitlines() if line.startswith("PASSED")]
        assert passed == [name] and ran.returncode == 0, ran.stdout + ran.stderr


def test_the_short_look_at_a_gpu_measures_five_cells_once() -> None:
    commands = recipe("test-gpu")
    (tests,) = [words for words in commands if "pytest" in words]
    assert tests[tests.index("-m", 2) + 1] == "gpu" and tests[tests.index("-n") + 1] == "8"
    (bench,) = [words for words in commands if words[0].endswith("vdrop")]
    chosen = settings(*bench[2:], command="bench")
    assert (
        chosen.sizes == [BenchSize.medium, BenchSize.large]
        and chosen.parts == [BenchPart.step]
        and chosen.precisions == [Precision.bf16]
    )
    ours = [BenchCell.variational, BenchCell.variational_untied, BenchCell.none]
    assert (
        chosen.cells == [*ours, BenchCell.torch_lstm, BenchCell.cell_loop]
        and chosen.starts == 1
        and chosen.device == "cuda"
    )


def test_the_long_one_is_apart_and_measures_everything() -> None:
    (bench,) = [words for words in recipe("bench-gpu") if words[0].endswith("vdrop")]
    chosen = settings(*bench[2:], command="bench")
    assert (
        chosen.cells is None
        and chosen.starts > 1
        and set(chosen.parts) == {BenchPart.step, BenchPart.layer, BenchPart.mc}
    )
    assert not any("pytest" in words for words in recipe("bench-gpu"))


def minimums() -> dict[str, str]:
    """The oldest version that pyproject.toml allows of each package, of those that a user installs and of
    pytest.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("plot", "parallel", "slurm", "export", "baselines", "triton", "dev")
    declared = [
        *project["dependencies"],
        *(name for extra in extras for name in project["optional-dependencies"][extra]),
    ]
    bounds = [name.partition(";")[0].split(",")[0].split(">=") for name in declared if ">=" in name]
    return {name.strip(): bound.strip() for name, bound in bounds}


def test_the_oldest_versions_are_tested_and_are_the_declared_ones() -> None:
    lines = [
        line
        for line in (ROOT / "constraints-oldest.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    constrained = dict(line.split("==") for line in lines)
    assert lines == sorted(lines)

    def parts(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    for name, bound in minimums().items():
        assert parts(constrained[name])[: len(parts(bound))] == parts(bound), f"{name} is to be {bound}"
    assert any({"install", "constraints-oldest.txt"} <= set(words) for words in recipe("test-oldest"))
    assert not any("constraints" in word for words in recipe("test-newest") for word in words)


@pytest.mark.parametrize("age", ["oldest", "newest"])
def test_other_versions_have_an_environment_of_their_own(age: str) -> None:
    commands = recipe(f"test-{age}")
    assert any(words[0] == f".venv-{age}/bin/pip" and "install" in words for words in commands)
    assert any(words[0] == f".venv-{age}/bin/python" and "pytest" in words for words in commands)
    if (ROOT / ".git").exists():
        ignored = subprocess.run(["git", "check-ignore", "-q", f".venv-{age}/"], cwd=ROOT)
        assert ignored.returncode in (0, 128), "128: git reads no checkout of another user"
