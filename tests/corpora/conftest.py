"""What tests of corpora need."""

from pathlib import Path

import pytest


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No corpus in sight, unless a test brings it."""
    monkeypatch.delenv("VDROP_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path
