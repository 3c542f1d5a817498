"""The page of the API: every public name is on it, and it is what the docstrings say."""

import importlib.util
import re
from types import ModuleType

import pytest

from tests.processes import ROOT
from vdrop_cli import cells, layers, modules, sampling

PAGE = (ROOT / "docs" / "api.md").read_text()


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_api", ROOT / "docs" / "write_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        *layers.__all__,
        *(
            name for name in modules.__all__ if name != "DropoutOnWeights"
        ),  # the parametrization of WeightDrop
        *(cell.__name__ for cell in (cells.LSTMCell, cells.GRUCell)),
        *(item.__name__ for item in (sampling.mc_dropout, sampling.predict_mc, sampling.Prediction)),
    ],
)
def test_every_public_name_has_a_section(name: str) -> None:
    assert re.search(rf"^### {name}$", PAGE, re.MULTILINE)


def test_the_page_is_current(writer: ModuleType) -> None:
    assert writer.page() == PAGE, "run `make docs-api`"
