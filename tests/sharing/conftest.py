"""Two finished runs, which exports read and do not change."""

from pathlib import Path

import pytest

from tests.conftest import TINY, settings
from vdrop_cli.commands import train


@pytest.fixture(scope="session")
def runs(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a language model with seed 1 and one with seed 2."""
    outputs = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        train.run(settings(*TINY, *text, f"seed={seed}", f"outputs={outputs}"))
    first, second = sorted(
        (path.parent for path in outputs.rglob("result.json")), key=lambda path: path.name[-1]
    )
    return first, second


@pytest.fixture
def run(runs: tuple[Path, Path]) -> Path:
    return runs[0]
