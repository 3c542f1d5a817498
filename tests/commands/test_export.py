"""`vdrop export`: which settings belong together, and what it prints."""

from pathlib import Path

import pytest

from tests.conftest import Vdrop, settings
from tests.sharing.exports import language_model
from vdrop_cli.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([], "checkpoint"),
        (["checkpoint=a", "file=b", "folder=c"], "folder"),
        (["checkpoint=a", "file=b", "push=me/c"], "push"),
        (["checkpoint=a", "push=c"], "push"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} must be "):
        settings(*overrides, command="export")


def test_the_command_line_writes_a_folder(
    text: list[str], tmp_path: Path, vdrop: Vdrop, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    run = language_model(text)
    done = vdrop("export", str(run), "folder=my models/first")
    assert done.returncode == 0 and done.stdout.startswith("my models/first: ") and not done.stderr
    assert len(list(Path("my models/first").iterdir())) == 4
    refused = vdrop("export", str(run), f"folder={run}")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and f"folder={run}" in refused.stderr
