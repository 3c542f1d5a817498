"""MC passes that can stop and resume; the command is in commands/test_eval.py."""

import errno
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.test_eval import run, train_model
from tests.conftest import settings
from vdrop_cli import files, interruption, provenance
from vdrop_cli.errors import ConfigError
from vdrop_cli.evaluation import load
from vdrop_cli.interruption import Interrupted
from vdrop_cli.mc_passes import PassOptions
from vdrop_cli.partial_evaluation import PartialEvaluation
from vdrop_cli.trained_model import find


@pytest.fixture
def folder(text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return train_model(text)


def test_saved_passes_resume_only_in_batches_of_the_same_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """mc_batch=null is what it comes to on the device; the file of the result is named the same."""
    for first, second, message in (
        ("null", "50", "resuming after"),
        ("50", "null", "resuming after"),
        ("null", "3", "starting over"),
    ):
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="words of MC passes"):
            patch.setattr(interruption, "received", [])
            patch.setattr(PartialEvaluation, "tick", lambda _: interruption.received.append(signal.SIGTERM))
            run(folder, "mc_samples=4", f"mc_batch={first}")
        run(folder, "mc_samples=4", f"mc_batch={second}")
        assert message in capsys.readouterr().err
    assert [path.name for path in folder.glob("eval-*")] == ["eval-0001-mc4-s1.json"]


def test_without_a_checkout_passes_that_were_saved_are_those_of_the_same_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two installed copies of one version can differ."""
    code = tmp_path / "vdrop_cli" / "provenance.py"
    code.parent.mkdir()
    monkeypatch.setattr(provenance, "__file__", str(code))
    for first, second, message in (("a", "a", "resuming after"), ("a", "b", "starting over")):
        code.write_text(first)
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="words of MC passes"):
            patch.setattr(interruption, "received", [])
            patch.setattr(PartialEvaluation, "tick", lambda _: interruption.received.append(signal.SIGTERM))
            run(folder, "mc_samples=4")
        code.write_text(second)
        run(folder, "mc_samples=4")
        assert message in capsys.readouterr().err


def test_passes_that_are_saved_resume_with_other_threads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in another process of a pool, or on another machine of a cluster."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="words of MC passes"):
        patch.setattr(PartialEvaluation, "tick", lambda _: interruption.received.append(signal.SIGTERM))
        run(folder, "mc_samples=4")
    monkeypatch.setattr(interruption, "received", [])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    run(folder, "mc_samples=4")
    assert "resuming after" in capsys.readouterr().err
    (target,) = folder.glob("eval-*.json")
    partial = target.with_suffix(".partial")
    files.write_tensors(partial, {"of": {"torch": "another"}, "passes": {}, "metrics": {}, "seconds": 0.0})
    run(folder, "mc_samples=4")
    assert "is of other settings or code; starting over" in capsys.readouterr().err and not partial.exists()
    partial.write_bytes(b"")

    def unreadable(path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(files, "read_tensors", unreadable)
    with pytest.raises(ConfigError, match=r"mc4-s1\.partial cannot be read \(Stale file handle\)"):
        PartialEvaluation(partial, {}, 5).load(None)
    assert partial.exists()


def test_a_partial_file_of_anything_else_is_damaged_and_the_passes_start_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(PartialEvaluation, "tick", lambda _: interruption.received.append(signal.SIGTERM))
        run(folder, "mc_samples=4")
    monkeypatch.setattr(interruption, "received", [])
    (path,) = folder.glob("*.partial")
    good = files.read_tensors(path)
    loaded, task = load(
        find(str(folder)),
        settings(f"checkpoint={folder}", "stored_data=true", command="eval"),
        torch.device("cpu"),
    )

    options = PassOptions(4, 50, 1, word_dropout=False)

    def is_resumed(content: dict[str, Any]) -> bool:
        files.write_tensors(path, content)
        partial = PartialEvaluation(path, good["of"], 5)
        passes = task.passes([loaded.model], options)
        resumed = partial.load(passes)
        assert resumed or (passes.words, partial.metrics, partial.seconds) == (0, {}, 0.0), (
            "nothing of it is taken over"
        )
        return resumed

    assert is_resumed(good)
    averages = good["passes"]["averages"]
    wrong: list[dict[str, Any]] = [
        {"metrics": []},
        {"metrics": {"test_ppl": float("nan")}},
        {"seconds": None},
        {"seconds": float("inf")},
    ]
    wrong += [
        {"metrics": {"test_ppl": 10**400}},
        {"metrics": {"test_ppl": torch.zeros(2)}},
        {"seconds": 10**400},
        {"seconds": True},
    ]
    wrong += [{"passes": []}, {"passes": {}}]
    for change in (
        {"number": -1},
        {"number": 10**9},
        {"number": "1"},
        {"state": []},
        {"state": [torch.zeros(3)]},
        {"log_p": torch.zeros(2)},
    ):
        wrong.append({"passes": good["passes"] | change})
    wrong.append({"passes": good["passes"] | {"log_p": good["passes"]["log_p"] * float("nan")}})
    for change in (
        {"seen": 4},
        {"seen": 1},
        {"seen": True},
        {"sums": {}},
        {"perplexities": {1: [float("nan")], 2: [], 4: []}},
    ):
        wrong.append({"passes": good["passes"] | {"averages": averages | change}})
    capsys.readouterr()
    for change in wrong:
        assert not is_resumed(good | change), change
        assert "is damaged (" in capsys.readouterr().err
    path.unlink()
    path.mkdir()
    assert not PartialEvaluation(path, good["of"], 5).load(task.passes([loaded.model], options))
    assert "is damaged (it is a folder)" in capsys.readouterr().err
