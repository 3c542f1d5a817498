"""The rated snippets: fetched with pip where it can reach a package index, and every way of not having
them.
"""

import subprocess
import sys
import venv
from pathlib import Path
from statistics import fmean

import pytest

from vdrop_cli import corpora
from vdrop_cli.corpora import vader
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.data import VaderSnippets


@pytest.fixture(autouse=True)
def nowhere(elsewhere: Path) -> None:
    pass


def test_the_real_snippets_are_fetched_verified_and_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is skipped where pip cannot fetch the package, and for no other reason."""
    download, failures = vader.download, list[str]()

    def recorded(folder: Path) -> Path:
        try:
            return download(folder)
        except OSError as error:
            failures.append(str(error))
            raise

    monkeypatch.setattr(vader, "download", recorded)
    try:
        first = corpora.load_rated(VaderSnippets())
    except ConfigError as error:
        if not failures or "DO NOT MATCH THE HASHES" in failures[0]:
            raise
        pytest.skip(f"needs a package index: {error}")
    assert "downloaded with vaderSentiment 3.3.2" in first.origin and len(first.texts) == 10_605
    assert (
        -4 <= min(first.ratings) < -3.8 and 3.9 < max(first.ratings) <= 4 and abs(fmean(first.ratings)) < 0.01
    )
    assert first.texts[2] == ["effective", "but", "too", "tepid", "biopic"]
    again = corpora.load_rated(VaderSnippets())
    assert again.origin == "data/vader" and again.fingerprint == first.fingerprint
    (Path("data/vader") / vader.FILE).open("a").close()
    with (Path("data/vader") / vader.FILE).open("a") as file:
        file.write("\n1\t2\tmore")
    with pytest.raises(
        ConfigError, match=r"data/vader/movieReview.* is not that of vaderSentiment 3\.3\.2: SHA-256"
    ):
        corpora.load_rated(VaderSnippets())


def test_when_there_is_no_index_the_ways_out_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(ConfigError) as caught:
        vader.read(VaderSnippets())
    for way in ("data.dir=", "VDROP_DATA=", "data/vader", "with pip: ERROR"):
        assert way in str(caught.value)
    assert not Path("data").exists()


def test_without_pip_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    with pytest.raises(
        ConfigError, match="pip is missing in this environment; install it, with uv by uv pip"
    ):
        corpora.load_rated(VaderSnippets())


def test_an_index_that_does_not_answer_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("pip", timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(ConfigError, match="no answer within 300 seconds"):
        vader.read(VaderSnippets())
