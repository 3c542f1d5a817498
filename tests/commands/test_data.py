"""`vdrop data`."""

from pathlib import Path

import pytest

from tests.conftest import settings
from vdrop_cli.commands import data
from vdrop_cli.errors import ConfigError


def test_a_look_says_what_is_there_and_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VDROP_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    data.run(settings(command="data"))
    printed = capsys.readouterr().out
    assert "ptb\n  not here (looked in data/ptb); vdrop data data=ptb fetches it" in printed
    assert "pydoc\n  from    pydoc_data.topics of Python 3." in printed
    for name, folder in (("cornell", "cornell_scale"), ("vader", "vader")):
        assert f"{name}\n  not here (looked in data/{folder}); vdrop data data={name} fetches it" in printed


def test_a_corpus_that_cannot_be_used_is_an_error_after_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VDROP_DATA", str(tmp_path))
    (tmp_path / "ptb").mkdir()
    for part in ("train", "valid", "test"):
        (tmp_path / "ptb" / f"ptb.{part}.txt").write_text("a b\n")
    with pytest.raises(ConfigError, match=r"^ptb cannot be used: .*MD5"):
        data.run(settings(command="data"))
    printed = capsys.readouterr().out
    assert "ptb\n  " in printed and "MD5" in printed and "pydoc\n  from" in printed


def test_penn_treebank_is_printed_with_its_counts(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VDROP_DATA", str(real_data))
    data.run(settings("data=ptb", command="data"))
    printed = capsys.readouterr().out
    for part in (
        f"from    {real_data}/ptb",
        "929,589 tokens",
        "73,760 tokens",
        "82,430 tokens",
        "10,000",
        "agree with Mikolov's",
    ):
        assert part in printed


def test_the_cornell_reviews_are_printed_with_their_counts(
    real_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VDROP_DATA", str(real_data))
    data.run(settings("data=cornell", command="data"))
    printed = capsys.readouterr().out
    for part in (
        "texts       5,006",
        "words   2,153,170",
        "0 to 1, mean 0.581, standard deviation 0.182",
        "agree with the authors'",
    ):
        assert part in printed


def test_a_text_of_ones_own(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data.run(settings(*text, command="data"))
    printed = capsys.readouterr().out
    assert (
        "types          42" in printed
        and printed.count("0.00 % <unk>") == 3
        and "none known for this corpus" in printed
    )
    assert list((tmp_path / "data" / "cache").iterdir())
