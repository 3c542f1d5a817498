"""Published numbers, from `conf/published/`, and the experiments that train the rows of Table 1."""

from functools import cache
from typing import Any

import yaml

from vdrop_cli import CONF

TABLE_1 = "table1"


def read(name: str) -> dict[str, Any]:
    path = CONF / "published" / f"{name}.yaml"
    content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return dict(content)


@cache
def baselines() -> dict[str, Any]:
    """The content of `conf/published/baselines.yaml`."""
    return read("baselines")


@cache
def sizes() -> dict[str, Any]:
    """The content of `conf/published/table1.yaml`, by size; each row with its title and its source."""
    content = read(TABLE_1)
    for size in content["sizes"].values():
        for name, row in size["rows"].items():
            row["title"] = content["titles"][name]
            if "valid" in row or "test" in row:
                row.setdefault("source", content["source"])
    return dict(content["sizes"])


def experiment(size: str, row: str) -> str:
    """The name of a row's experiment."""
    return f"{TABLE_1}_{size}_{row}"


@cache
def experiments() -> dict[str, dict[str, Any]]:
    """What files of `conf/experiment/` would hold, by the names of the experiments."""
    nodes = {}
    for size, content in sizes().items():
        for name, row in content["rows"].items():
            trained = content["rows"][row["runs_of"]] if "runs_of" in row else row
            defaults = [*content["defaults"], {"override /dropout": trained["dropout"]}, "_self_"]
            nodes[experiment(size, name)] = {
                "defaults": defaults,
                **content["settings"],
                **trained.get("settings", {}),
            }
    return nodes
