"""Who may know whom: the table of CONTRIBUTING.md, read from the imports."""

import ast
from pathlib import Path

import pytest

import vdrop_cli

PACKAGE = Path(vdrop_cli.__file__).parent
MAY_IMPORT = {  # module or folder of vdrop_cli: the parts of vdrop_cli it may import
    "cli": {
        "arguments",
        "completion",
        "config",
        "commands",
        "explain",
        "interruption",
        "output",
        "sweeps",
        "CONF",
        "__version__",
    },
    "arguments": {"config", "CONF"},
    "completion": {"arguments", "config"},
    "policies": set(),
    "random_streams": set(),
    "config": {"policies"},
    "explain": {"config"},
    "interruption": set(),
    "output": set(),
    "launchers": {"interruption"},
    "sweeps": {"config", "explain", "files", "interruption", "launchers", "output", "ownership", "stored"},
    "archives": set(),
    "files": {"archives", "config"},
    "lock": {"config", "files"},
    "ownership": {"config", "files", "lock"},
    "learned": {"stored"},
    "kernels": {"kernels"},
    "dropout": {"kernels", "policies", "random_streams"},
    "prefetch": {"dropout", "kernels", "policies"},
    "cells": {"dropout", "kernels", "layers", "policies"},
    "modules": {"cells", "dropout", "policies"},
    "sampling": set(),
    "layers": {"kernels", "dropout", "policies"},
    "model": {"config", "kernels", "dropout", "layers", "policies", "random_streams"},
    "corpora": {"config", "corpora", "files", "ownership"},
    "perplexity": {"interruption", "model", "sinks"},
    "monte_carlo": {"dropout", "layers", "model", "perplexity", "policies", "random_streams"},
    "generation": {"model"},
    "baselines": set(),
    "uncertainty": set(),
    "tasks": {
        *(
            "baselines",
            "config",
            "corpora",
            "dropout",
            "interruption",
            "layers",
            "learned",
            "model",
            "monte_carlo",
            "perplexity",
            "sinks",
            "tasks",
        ),
        *("policies", "random_streams", "uncertainty"),
    },
    "optimizer": {"config"},
    "checkpoint": {"config", "files", "learned"},
    "continuation": {"checkpoint", "config", "files", "ownership", "sinks", "stored", "tasks"},
    "bench": {
        *("bench", "cells", "commands", "config", "corpora", "dropout", "device", "files"),
        *(
            "kernels",
            "layers",
            "model",
            "output",
            "monte_carlo",
            "optimizer",
            "prefetch",
            "provenance",
            "random_streams",
            "tasks",
        ),
    },
    "device": {"config", "kernels", "provenance"},
    "provenance": {"config", "kernels", "__version__"},
    "stored": {"archives", "files"},
    "sinks": {"config", "files", "stored"},
    "stuck_starts": {"config", "files", "stored"},
    "runs": {"config", "explain", "files", "sinks", "stored", "stuck_starts"},
    "pictures": {"config", "files", "ownership", "runs"},
    "experiments": {"arguments", "config", "explain"},
    "markdown": set(),
    "results_page": {"config", "files", "ownership", "runs", "IS_CHECKOUT", "RECORDS", "ROOT"},
    "ratings": {"config", "experiments", "markdown", "pictures", "policies", "runs", "CONF"},
}


def imported(path: Path) -> set[str]:
    """The parts of vdrop_cli that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "vdrop_cli":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vdrop_cli."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("vdrop_cli.")}
    return found


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_what_it_may(part: str) -> None:
    files = (
        [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else list((PACKAGE / part).glob("*.py"))
    )
    assert files
    for path in files:
        assert imported(path) <= MAY_IMPORT[part], path


def test_every_part_is_in_the_table() -> None:
    parts = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__", "__main__", "commands"} == set(MAY_IMPORT)
