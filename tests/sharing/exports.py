"""Runs to export, small and trained in a second."""

import json
from pathlib import Path

import pytest

from tests.conftest import TINY, TINY_SENTIMENT, settings
from vdrop_cli.commands import predict, train


def trained(*overrides: str) -> Path:
    """The folder of a new run in the working folder."""
    before = set(Path().rglob("result.json"))
    train.run(settings(*overrides))
    (result,) = set(Path().rglob("result.json")) - before
    return result.parent


def language_model(text: list[str], *overrides: str) -> Path:
    return trained(*TINY, *text, *overrides)


def model_of_ratings(rated: list[str], *overrides: str) -> Path:
    return trained(*TINY_SENTIMENT, *rated, *overrides)


def predicted(run: Path, text: str, capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, float]:
    """The row that `vdrop predict` prints for a text."""
    capsys.readouterr()
    predict.run(settings(f"checkpoint={run}", f"text={text}", "format=json", *overrides, command="predict"))
    row: dict[str, float] = json.loads(capsys.readouterr().out)
    return row
