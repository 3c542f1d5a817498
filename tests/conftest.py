"""What many tests need: settings as the command line would make them, a small text, the real corpora if they
are here.
"""

import atexit
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from hydra import initialize_config_dir
from omegaconf import DictConfig

from tests import quick_hydra
from tests.fork_server import Popen
from tests.processes import LIMIT, WITHOUT_RECORDS, ForkServer, compiler_error, environment
from vdrop_cli import CONF, interruption
from vdrop_cli.kernels import compiler
from vdrop_cli.kernels.products import multiplies_bf16
from vdrop_cli.settings.choices import Precision
from vdrop_cli.settings.commands import ROOTS
from vdrop_cli.settings.compose import parse, register
from vdrop_cli.studies import records, rows

try:
    compiler.cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=compiler.cache_folder()):
        pass
except (OSError, compiler.CompilerError):  # as with a home that is read-only: one cache for all processes
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="vdrop-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
quick_hydra.install()
torch.set_num_threads(1)  # the tests' products are small, and two test processes share the machine

POLICIES = ("none", "zaremba", "naive", "moon", "moon_word", "variational", "variational_untied")
CELLS_AND_POLICIES = [
    (cell, policy)
    for cell in ("lstm", "gru")
    for policy in POLICIES
    if not (cell == "gru" and "moon" in policy)
]
Vdrop = Callable[..., subprocess.CompletedProcess[str]]
TINY = (
    "model=lstm_small",
    "model.hidden_size=8",
    "task.batch_size=4",
    "task.bptt=5",
    "schedule.epochs=1",
    "data.cache=null",
    "device=cpu",
    "precision=fp32",
)

TINY_SENTIMENT = (
    "task=sentiment",
    "task.protocol=paper",  # the default for the Cornell reviews alone
    "model.hidden_size=8",
    "task.batch_size=8",
    "task.chunk_words=6",
    "schedule.epochs=1",
    "schedule.lr=0.01",
    "device=cpu",
    "precision=fp32",
)


def require_torch_lstm(cell: str, precision: Precision) -> None:
    """Skips a test of a cell that torch cannot run on this processor."""
    if cell == "torch_lstm" and precision is Precision.bf16 and not multiplies_bf16():
        pytest.skip("torch.nn.LSTM cannot run in bf16 on this processor")


TORCHS_OWN_WARNINGS = (
    "Guards may run slower on Python 3.13.0",
    "`torch.jit.script` is deprecated",  # torch.func.hessian of torch 2.14 calls it
    "The .grad attribute of a Tensor that is not a leaf",  # torch.library.opcheck of torch 2.14 reads it
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings are errors during tests, unless a test's own mark says otherwise.

    They are not while pytest starts: plugins that are merely installed may warn then. Where there is no C
    compiler, tests of the back end `native` are skipped, and `auto` may say that it is `fused`. A library
    that fails its self-check is a fault: then these tests fail.
    """
    why = compiler_error()
    for item in items:
        if why:
            item.add_marker(pytest.mark.filterwarnings("ignore:backend=auto is fused on cpu"), append=False)
            if (
                item.path.stem == "test_native"
                or item.get_closest_marker("native")
                or "native" in getattr(item, "callspec", SimpleNamespace(params={})).params.values()
            ):
                item.add_marker(pytest.mark.skip(f"backend=native: {why}"))
        for text in TORCHS_OWN_WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{text}"), append=False)
        item.add_marker(pytest.mark.filterwarnings("error"), append=False)


register_once = cache(register)  # nothing unregisters, and it takes as long as a composition


def composed(*overrides: str, command: str = "train") -> DictConfig:
    """What Hydra makes of a command line."""
    register_once()
    return quick_hydra.compose(command, overrides)


def settings(*overrides: str, command: str = "train") -> Any:
    """The typed configuration of a command line, without running it."""
    return parse(composed(*overrides, command=command), ROOTS[command])


def mark_long(cases: Iterable[Any], short: Container[Any]) -> list[Any]:
    """Cases for parametrize; those that are not in `short` have the marker `long`."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if case in short else pytest.mark.long
        )
        for case in cases
    ]


@contextmanager
def composing_once() -> Iterator[None]:
    """As within a command: further settings can be composed."""
    register_once()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        yield


def examples(count: int, **options: Any) -> hypothesis.settings:
    """Settings of a property test: so many fixed examples; by `make fuzz` many times as many random ones."""
    times = int(os.environ.get("VDROP_FUZZ", "0"))
    return hypothesis.settings(
        max_examples=max(times, 1) * count, derandomize=times == 0, deadline=None, database=None, **options
    )


@pytest.fixture
def composing() -> Iterator[None]:
    with composing_once():
        yield


def write_text(folder: Path, **lines_of_part: int) -> None:
    """Writes train.txt, valid.txt and test.txt of a language with 40 words, in which each word prefers a few
    successors.
    """
    source = random.Random(0)
    for part, lines in lines_of_part.items():
        text = []
        for _ in range(lines):
            word, line = source.randrange(40), []
            for _ in range(source.randrange(3, 15)):
                line.append(f"w{word}")
                word = (3 * word + source.choice((1, 1, 1, 2, 7, 11))) % 40
            text.append(" ".join(line))
        (folder / f"{part}.txt").write_text("\n".join(text) + "\n")


def text_overrides(folder: Path) -> list[str]:
    return ["data=text", *(f"data.{part}={folder}/{part}.txt" for part in ("train", "valid", "test"))]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 730 tokens to train on."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, train=75, valid=30, test=30)
    return folder


@pytest.fixture(scope="session")
def text(text_folder: Path) -> list[str]:
    """The overrides that choose that text."""
    return text_overrides(text_folder)


@pytest.fixture(scope="session")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides that choose a text of twice the length, for tests that need more steps or more words."""
    folder = tmp_path_factory.mktemp("long_text")
    write_text(folder, train=150, valid=40, test=40)
    return text_overrides(folder)


@pytest.fixture(scope="session")
def rated(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides that choose 60 texts of 1 to 20 words; a rating is the share of good words in its
    text.
    """
    source, lines = random.Random(1), ["text,stars"]
    for _ in range(60):
        words = [
            source.choice(("good", "bad")) + str(source.randrange(4)) for _ in range(source.randrange(1, 21))
        ]
        lines.append(f"{' '.join(words)},{sum(word.startswith('good') for word in words) / len(words)}")
    path = tmp_path_factory.mktemp("rated") / "rated.csv"
    path.write_text("\n".join(lines))
    return ["data=text_regression", f"data.csv={path}", "data.column=text", "data.rating_column=stars"]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real corpora."""
    folder = os.environ.get("VDROP_DATA")
    if not folder or not (Path(folder) / "ptb").is_dir():
        pytest.skip("needs the real corpora: set VDROP_DATA to a folder with ptb/ in it")
    return Path(folder)


@pytest.fixture
def no_shipped_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a wheel: reading those of the checkout takes seconds."""
    for module in (records, rows):
        monkeypatch.setattr(module, "RECORDS", None)
    monkeypatch.setenv(WITHOUT_RECORDS, "1")


@pytest.fixture(autouse=True)
def own_library() -> Iterator[None]:
    """What a command chose for fp32 products is not left to the next test."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def own_compilations() -> Iterator[None]:
    """What one test compiled does not count for the next: torch.compile compiles a function only so often."""
    yield
    if "torch._dynamo" in sys.modules:
        with warnings.catch_warnings(action="ignore"):  # its imports use what torch has deprecated
            torch.compiler.reset()


@pytest.fixture(autouse=True)
def not_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that one test sent is not left to the next."""
    monkeypatch.setattr(interruption, "received", [])
    monkeypatch.setattr(interruption, "ctrl_c_received", False)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command sets for Hydra in this process is not left to the next test."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # so that it is put back to what it was
    monkeypatch.delenv("HYDRA_FULL_ERROR")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Freshly allocated memory is NaN, so that nothing can lean on what it happens to hold."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("forks")) as server:
        yield server


@pytest.fixture
def forked_commands(fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server forks what a command of this process starts as `vdrop …`, too."""
    monkeypatch.setattr(Popen, "address", fork_server.address, raising=False)
    monkeypatch.setattr(subprocess, "Popen", Popen)


@pytest.fixture
def vdrop(fork_server: ForkServer, tmp_path: Path) -> Vdrop:
    """Runs the command line as a process, in an empty folder.

    A process with other environment variables is a new one; the others are forked, which saves seconds each.
    """

    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        variables = {key: value for key, value in environment().items() if key != "VDROP_DATA"}
        if not changes:
            return fork_server.run(tmp_path, *arguments, variables=variables)
        return subprocess.run(
            [sys.executable, "-m", "vdrop_cli", *arguments],
            cwd=tmp_path,
            env={**variables, **changes},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )

    return run
