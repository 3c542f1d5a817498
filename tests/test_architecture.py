"""Who may know whom: the table of CONTRIBUTING.md, read from the imports."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import vdrop_cli
from tests.processes import ROOT

PACKAGE = Path(vdrop_cli.__file__).parent
MAY_IMPORT = {  # module or folder of vdrop_cli: the parts of vdrop_cli it may import
    "cli": {
        "CONF",
        "__version__",
        "arguments",
        "command_examples",
        "completion",
        "errors",
        "explain",
        "help",
        "output",
        "settings",
        "sweeps",
    },
    "command_examples": set(),
    "arguments": {"CONF", "errors", "policies", "published", "settings"},
    "help": {"CONF", "arguments", "errors", "policies", "settings"},
    "completion": {"arguments", "published", "settings"},
    "policies": set(),
    "random_streams": set(),
    "errors": set(),
    "settings": {"errors", "policies", "published", "settings"},
    "explain": {"arguments", "errors", "settings"},
    "interruption": set(),
    "output": set(),
    "launchers": set(),
    "outcomes": {"errors", "files", "stored"},
    "sweeps": {
        "comparison",
        "errors",
        "explain",
        "files",
        "interruption",
        "launchers",
        "outcomes",
        "output",
        "ownership",
        "runs",
        "settings",
        "stored",
        "text_tables",
    },
    "files": {"errors"},
    "lock": {"errors", "files"},
    "run_files": set(),
    "ownership": {"run_files", "errors", "evaluation_files", "files", "lock"},
    "learned": {"stored"},
    "kernels": {"errors", "kernels"},
    "dropout": {"kernels", "policies", "random_streams"},
    "prefetch": {"dropout", "kernels", "policies"},
    "layer_dropout": {"policies"},
    "state_layout": set(),
    "mask_checks": {"dropout", "kernels", "policies"},
    "time_reversal": {"kernels"},
    "gru_variant": set(),
    "cells": {
        *("dropout", "gru_variant", "kernels", "layer_dropout", "mask_checks", "policies", "state_layout")
    },
    "modules": {"cells", "dropout", "policies"},
    "sampling": set(),
    "layers": {
        *("dropout", "gru_variant", "kernels", "layer_dropout", "mask_checks", "policies", "state_layout"),
        "time_reversal",
    },
    "model": {"dropout", "kernels", "layers", "policies", "random_streams", "settings"},
    "corpora": {"corpora", "errors", "files", "ownership", "settings"},
    "perplexity": {"interruption", "model"},
    "mc_passes": {"assessment", "measured"},
    "monte_carlo": {
        *("assessment", "dropout", "layers", "mc_passes", "measured", "model", "perplexity", "policies"),
        "random_streams",
    },
    "temperature": {"interruption", "model", "perplexity"},
    "scaled_passes": {"mc_passes", "measured", "model", "monte_carlo"},
    "next_word": {
        *("assessment", "dropout", "interruption", "layers", "mc_passes", "measured", "model", "monte_carlo"),
        "perplexity",
    },
    "generation": {"model"},
    "ridge": set(),
    "uncertainty": set(),
    "intervals": {"uncertainty"},
    "selective": set(),
    "assessment": {"intervals", "selective", "uncertainty"},
    "assessment_picture": {"assessment", "intervals", "pictures", "settings"},
    "measured": {"assessment"},
    "evaluation_report": {"assessment", "metric_names", "settings", "text_tables"},
    "text_tables": set(),
    "tasks": {
        "assessment",
        "ridge",
        "corpora",
        "dropout",
        "errors",
        "interruption",
        "intervals",
        "layers",
        "learned",
        "mc_passes",
        "measured",
        "model",
        "monte_carlo",
        "next_word",
        "perplexity",
        "policies",
        "random_streams",
        "scaled_passes",
        "settings",
        "sinks",
        "tasks",
        "temperature",
        "uncertainty",
    },
    "averaging": {"settings"},
    "learning_rate": {"settings"},
    "optimizer": {"settings"},
    "gradient_step": {"dropout", "kernels", "layers", "optimizer", "settings", "tasks"},
    "checkpoint": {"run_files", "errors", "files", "learned", "settings", "stored"},
    "training": {
        "run_files",
        *("averaging", "checkpoint", "continuation", "device", "dropout", "errors", "files", "interruption"),
        *("gradient_step", "learned"),
        *("learning_rate", "optimizer", "prefetch", "provenance", "random_streams", "settings", "sinks"),
        *("stuck_starts", "tasks"),
    },
    "run_summary": {
        *("checkpoint", "continuation", "errors", "metric_names", "output", "policies", "run_files"),
        *("settings", "sinks", "tasks", "training"),
    },
    "trained_model": {"checkpoint", "device", "errors", "files", "learned", "settings", "sharing", "tasks"},
    "evaluation": {
        *("device", "errors", "evaluation_files", "mc_passes", "measured", "metric_names"),
        *("partial_evaluation", "policies", "run_files", "runs", "settings", "sinks", "tasks"),
        *("temperature", "trained_model"),
    },
    "partial_evaluation": {
        *("errors", "files", "interruption", "mc_passes", "settings", "sinks", "stored", "tasks"),
        "trained_model",
    },
    "prediction_inputs": {"corpora", "errors", "files", "settings", "stored"},
    "prediction_rows": {"errors", "prediction_inputs", "settings", "tasks", "text_tables", "trained_model"},
    "rating_noise": {"errors", "evaluation_files", "settings", "tasks", "trained_model", "uncertainty"},
    "prediction": {
        *("errors", "intervals", "learned", "policies", "prediction_inputs", "prediction_rows"),
        *("rating_noise", "settings", "tasks", "trained_model", "uncertainty"),
    },
    "word_prediction": {
        *("device", "errors", "files", "generation", "mc_passes", "metric_names", "next_word", "perplexity"),
        *("policies", "prediction_inputs", "prediction_rows", "settings", "tasks", "trained_model"),
    },
    "continuation": {
        "run_files",
        "checkpoint",
        "errors",
        "files",
        "lock",
        "ownership",
        "settings",
        "sinks",
        "stored",
        "tasks",
    },
    "bench": {
        "bench",
        "cells",
        "corpora",
        "device",
        "dropout",
        "errors",
        "files",
        "gradient_step",
        "kernels",
        "layers",
        "mc_passes",
        "model",
        "monte_carlo",
        "optimizer",
        "output",
        "prefetch",
        "provenance",
        "random_streams",
        "settings",
        "tasks",
        "training",
    },
    "device": {"errors", "kernels", "provenance", "settings"},
    "sharing": {
        *(
            "checkpoint",
            "errors",
            "evaluation_files",
            "files",
            "learned",
            "markdown",
            "metric_names",
            "model",
        ),
        *("ownership", "policies", "runs", "settings", "sharing", "stored", "tasks"),
    },
    "provenance": {"__version__", "errors", "kernels"},
    "stored": {"files"},
    "sinks": {"errors", "files", "run_files", "settings", "sinks", "stored"},
    "stuck_starts": {"run_files", "errors", "files", "settings", "stored"},
    "runs": {
        *("errors", "evaluation_files", "explain", "files", "run_files", "settings", "sinks", "stored"),
        "stuck_starts",
    },
    "comparison": {"evaluation_files", "markdown", "metric_names", "runs", "settings", "text_tables"},
    "pictures": {"errors", "files", "ownership", "policies", "runs", "settings"},
    "evaluation_pictures": {
        *("assessment", "assessment_picture", "evaluation_report", "metric_names", "next_word", "pictures"),
        "settings",
    },
    "markdown": {"metric_names"},
    "metric_names": set(),
    "published": {"CONF"},
    "evaluation_files": {"run_files", "errors", "files", "settings", "stored"},
    "studies": {
        "run_files",
        "CONF",
        "IS_CHECKOUT",
        "RECORDS",
        "ROOT",
        "arguments",
        "checkpoint",
        "continuation",
        "device",
        "errors",
        "evaluation_files",
        "explain",
        "files",
        "interruption",
        "markdown",
        "mc_passes",
        "monte_carlo",
        "ownership",
        "perplexity",
        "pictures",
        "policies",
        "provenance",
        "published",
        "random_streams",
        "runs",
        "settings",
        "sinks",
        "studies",
        "stuck_starts",
        "tasks",
        "training",
    },
}


def imported(path: Path) -> set[str]:
    """The parts of vdrop_cli that a file imports, anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "vdrop_cli":
            parts |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vdrop_cli."):
            parts.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            parts |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("vdrop_cli.")}
    return parts


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


LEAVES = (
    "bench",
    "compare",
    "data",
    "eval",
    "export",
    "predict",
    "reproduce",
    "table",
    "train",
)  # commands, which sweeps.py imports by their names, and nothing else
MAX_LINES = 100


def test_commands_are_short_leaves() -> None:
    for path in PACKAGE.rglob("*.py"):
        imports = modules(path)
        names = [name for name in LEAVES if f"commands.{name}" in imports]
        assert not names, (path, names)
    for name in LEAVES:
        assert len((PACKAGE / "commands" / f"{name}.py").read_text().splitlines()) < MAX_LINES, name


def modules(path: Path) -> set[str]:
    """The modules of vdrop_cli that a file imports by their dotted names, `commands.train` for example."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vdrop_cli"):
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("vdrop_cli.") for name in names}


QUOTED = re.compile("`([^`]+)`")
MAP_ROW = re.compile(r"^\| (`[^|]*(?:\.py|/)`) \|[^|]*\| ([^|]*) \|$", re.MULTILINE)  # of Python files


def names_in_map(path: Path) -> set[str]:
    """What a file imports: modules of its own folder by their dotted names, otherwise parts of vdrop_cli."""
    folder = path.parent.name
    own = {".".join(name.split(".")[:2]) for name in modules(path) if name.startswith(f"{folder}.")}
    return own | (imported(path) & MAY_IMPORT.keys()) - {folder}


def test_the_map_names_what_files_import() -> None:
    """All of it, but for rows with `…`, "the above" or "all"; what these name is imported, too."""
    page = (ROOT / "CONTRIBUTING.md").read_text().split("## The map")[1]
    mapped = set()
    for files, may_import in MAP_ROW.findall(page):
        paths = set()
        for name in QUOTED.findall(files):
            paths |= set((PACKAGE / name).glob("*.py")) if name.endswith("/") else {PACKAGE / name}
        within = {f"{path.parent.name}.{path.stem}" for path in paths}
        imports = set().union(*map(names_in_map, paths)) - within
        names = set(QUOTED.findall(may_import))
        assert names <= imports, files
        assert names == imports or re.search(r"…|\b(above|all)\b", may_import), files
        mapped |= paths
    assert {path for path in PACKAGE.rglob("*.py") if path.stem not in ("__init__", "__main__")} <= mapped


DISTRIBUTIONS = {  # where the name of a package is not that of its distribution, or another one brings it
    "google": "tensorboard",
    "hydra": "hydra-core",
    "mlflow": "mlflow-skinny",
    "sklearn": "scikit-learn",
    "submitit": "hydra-submitit-launcher",
    "yaml": "pyyaml",
}


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [
        *project["dependencies"],
        *(line for name in extras if name != "dev" for line in extras[name]),
    ]
    declared = {re.split(r"[<>=;\[]", line)[0] for line in required}
    imports = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imports |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imports.add(str(node.module).split(".")[0])
    packages = imports - {*sys.stdlib_module_names, "vdrop_cli"}
    assert {DISTRIBUTIONS.get(package, package) for package in packages} == declared - NOT_IMPORTED


NOT_IMPORTED = {"hydra-joblib-launcher"}  # a plugin of Hydra


TESTED_ELSEWHERE = {  # modules without a test file of their name: where their laws are tested
    "tasks/objective": "tasks/test_language_model.py",
    "command_examples": "test_examples.py",
    "layer_dropout": "test_layers.py",  # the parts of a layer, by its laws
    "state_layout": "test_layers.py",
    "mask_checks": "test_layers.py",
    "time_reversal": "test_layers.py",
    "tasks/rated_parts": "tasks/test_sentiment.py",
    "tasks/text_evaluation": "tasks/test_language_model.py",
    "errors": "test_mistakes.py",  # the one line of every error
    "evaluation": "commands/test_eval.py",  # the command is a leaf, and its tests are those of the module
    "explain": "test_mistakes.py",
    "learned": "test_checkpoint.py",
    "prediction_inputs": "commands/test_predict.py",
    "prediction_rows": "commands/test_predict.py",
    "rating_noise": "commands/test_predict.py",
    "prediction": "commands/test_predict.py",  # likewise
    "word_prediction": "commands/test_predict.py",
    "published": "studies/test_table1.py",
    "commands/table": "studies/test_page.py",
    "kernels/autograd": "kernels/test_fused.py",  # what the back ends share, and plain tuples of tensors
    "kernels/backend": "kernels/test_api.py",
    "kernels/contexts": "kernels/test_derivatives.py",
    "kernels/loops": "kernels/triton_cells.py",
    "kernels/masks": "kernels/test_reference.py",
    "kernels/native_head": "kernels/test_head.py",
    "kernels/native_library": "kernels/test_native.py",
    "kernels/normed_native": "kernels/test_normed.py",
    "kernels/operators": "kernels/test_triton.py",
    "kernels/programs": "kernels/test_triton.py",
    "kernels/self_check": "kernels/test_triton.py",
    "kernels/weights": "kernels/test_normed.py",
    "measured": "test_assessment.py",  # a tuple
    "settings/choices": "test_settings.py",  # the settings are tested as one
    "settings/commands": "test_settings.py",
    "settings/compose": "test_settings.py",
    "settings/data": "test_settings.py",
    "settings/data_places": "test_settings.py",
    "settings/fields": "test_settings.py",
    "settings/task": "test_settings.py",
    "settings/train": "test_settings.py",
    "settings/variants": "test_settings.py",
    "sinks/records": "sinks/test_sink_records.py",  # tests/test_records.py is of the shipped records
    "studies/exports": "studies/test_page.py",  # one fixture of runs for page, exports and records
    "studies/records": "studies/test_page.py",
    "studies/study": "studies/test_rows.py",
}


def test_every_module_has_its_tests() -> None:
    """In the file of its name, or in the one that the table names."""
    tests = Path(__file__).parent
    modules = {
        path.relative_to(PACKAGE).with_suffix("")
        for path in PACKAGE.rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    }
    without = {
        module.as_posix()
        for module in modules
        if not (tests / module.parent / f"test_{module.name}.py").exists()
    }
    assert without == set(TESTED_ELSEWHERE)
    for file in TESTED_ELSEWHERE.values():
        assert (tests / file).exists(), file
