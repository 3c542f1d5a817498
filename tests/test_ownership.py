"""What `force=true` and the commands that write remove and overwrite: vdrop's own files, and nothing of a
user's.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import TINY, settings
from tests.test_survival import training_result
from vdrop_cli import checkpoint, ownership
from vdrop_cli.commands import eval as evaluation
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.lock import Lock
from vdrop_cli.ownership import clear, is_run_file, removal_order
from vdrop_cli.settings.train import Train

SHORT = ("task.batch_size=20", "task.bptt=10", "schedule.epochs=3", "log_every=1")
NAMES = (
    "config.yaml",
    "log.jsonl",
    "result.json",
    "stuck.json",
    "shared_device.txt",
    "checkpoint-0002.pt",
    "eval-0001-standard.json",
    "eval-0001-mc5-s1.partial",
)


@pytest.fixture(scope="module")
def config(text: list[str]) -> Train:
    """Of a short run."""
    run: Train = settings(*TINY, *text, "dropout=variational", *SHORT)
    return run


@pytest.fixture(scope="module")
def made(config: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, with two evaluations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("made"))
        train.run(config)
        (folder,) = (path.parent.absolute() for path in Path().rglob("result.json"))
        for samples in (0, 3):
            evaluation.run(
                settings(
                    f"checkpoint={folder}",
                    f"mc_samples={samples}",
                    "stored_data=true",
                    "device=cpu",
                    command="eval",
                )
            )
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that the same command finds."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, Path(*made.parts[-4:])))


@contextmanager
def in_seconds(seconds: int) -> Iterator[None]:
    """Fails instead of waiting for the other end of a FIFO."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def content(folder: Path) -> dict[str, bytes | str]:
    """Of every file in it, however deep; of a link where it leads."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else "other"
        for path in sorted(folder.rglob("*"))
    }


def forced(config: Train, capsys: pytest.CaptureFixture[str]) -> str:
    """What a run that starts over says; the others of a sweep continue."""
    capsys.readouterr()
    settings = Train(**{**vars(config), "force": True})
    with in_seconds(60):
        assert train.run(settings) == "done"
    return capsys.readouterr().err


def test_all_that_a_run_and_its_evaluations_write_is_its_own(made: Path) -> None:
    names = [path.name for path in made.iterdir()]
    assert {"config.yaml", "log.jsonl", "result.json"} < set(names) and any(
        name.startswith("events.out") for name in names
    )
    assert {"eval-0003-standard.json", "eval-0003-mc3-s1.json"} < set(names)
    assert [name for name in names if not is_run_file(Path(name))] == []
    for name in (
        "eval-0001-00012-mc3-no_word-s7-bf16.json",
        "eval-0001-ensemble10-0123abcd.lock",
        "checkpoint-0001-00812.pt.99.tmp",
    ):
        assert is_run_file(Path(name)), name


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "my.lock",
        "eval-0001-notes.json",
        "result.json.bak",
        "a.tmp",
        "checkpoint-best.pt",
        "lock.txt",
        "1.json",
        "x\n",
    ],
)
def test_what_a_user_may_have_there_is_not_the_runs(name: str) -> None:
    assert not is_run_file(Path(name))


def test_force_leaves_what_is_not_the_runs_and_names_it(
    config: Train, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = {
        "notes.txt": b"mine",
        "my.lock": b"mine",
        "plots/a.png": b"mine",
        "checkpoint-0001.safetensors": b"mine",
    }
    for name, content in theirs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    elsewhere = folder.parents[3] / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "result.json").write_text("mine")
    (folder / "linked").symlink_to(elsewhere)
    os.mkfifo(folder / "fifo")
    errors = forced(config, capsys)
    assert {name: (folder / name).read_bytes() for name in theirs} == theirs
    assert (
        (elsewhere / "result.json").read_text() == "mine"
        and (folder / "linked").is_symlink()
        and (folder / "fifo").is_fifo()
    )
    (line,) = [line for line in errors.splitlines() if "notes.txt" in line]
    assert "my.lock" in line and line.endswith("and 1 more")
    assert not list(folder.glob("eval-*")), "evaluations are of the run that is gone"


def test_a_run_folder_that_is_a_link_loses_only_files_of_the_run(
    config: Train, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = folder.parents[3] / "mine"
    folder.rename(target)
    folder.symlink_to(target.absolute())
    (target / "thesis.tex").write_text("mine")
    (target / "chapters").mkdir()
    (target / "chapters" / "config.yaml").write_text("mine")
    assert "thesis.tex" in forced(config, capsys)
    assert (target / "thesis.tex").read_text() == (
        target / "chapters" / "config.yaml"
    ).read_text() == "mine" and folder.is_symlink()
    assert (target / "result.json").exists()


def test_links_and_special_files_of_the_runs_names_are_removed_and_never_followed(
    config: Train, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = folder.parents[3] / "theirs"
    theirs.mkdir()
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)
    for name in NAMES[:2]:
        (theirs / name).write_text("mine")
        (folder / name).symlink_to(theirs / name)
    (folder / NAMES[2]).symlink_to(theirs)
    os.mkfifo(folder / NAMES[3])
    (folder / NAMES[4]).symlink_to("/dev/zero")
    (folder / NAMES[5]).symlink_to("nowhere")
    forced(config, capsys)
    assert content(theirs) == {name: b"mine" for name in NAMES[:2]}
    assert all(path.is_file() and not path.is_symlink() for path in folder.iterdir())


@pytest.mark.parametrize("name", ["result.json", "checkpoint-0002.pt", "config.yaml"])
def test_nothing_is_removed_where_a_folder_is_in_the_way(name: str, config: Train, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    before = content(folder)
    with pytest.raises(ConfigError, match=rf"{name} is a folder, so nothing was removed"):
        train.run(Train(**{**vars(config), "force": True}))
    assert content(folder) == before


def test_a_removal_that_fails_half_way_names_the_file_and_leaves_no_finished_run(
    config: Train, made: Path, folder: Path
) -> None:
    path = folder / "checkpoint-0002.pt"
    if subprocess.run(["chattr", "+i", path], capture_output=True).returncode:
        pytest.skip("no file can be made immutable here")
    try:
        with pytest.raises(RunError, match=r"checkpoint-0002\.pt cannot be removed \(Operation not"):
            clear(folder)
    finally:
        subprocess.run(["chattr", "-i", path], check=True)
    assert not (folder / "result.json").exists() and path.exists()
    train.run(config)
    assert training_result(folder)[:3] == training_result(made)[:3]


def test_weights_that_were_measured_are_not_trained_again_under_their_name(
    config: Train, folder: Path
) -> None:
    """Without its last checkpoint a run would have an evaluation of other weights than those it then has."""
    for path in checkpoint.all_in(folder):
        path.unlink()
    (folder / "result.json").unlink()
    names = sorted(path.name for path in folder.glob("eval-*.json"))
    with pytest.raises(ConfigError, match=rf"{names[0]} is of weights that .* no longer has; put the check"):
        train.run(config)
    for name in names:
        (folder / name).unlink()
    log = (folder / "log.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"log\.jsonl is of a finished run whose checkpoints are gone"):
        train.run(config)
    assert (folder / "log.jsonl").read_bytes() == log
    train.run(replace(config, force=True))
    assert (folder / "result.json").exists()


def test_a_finished_run_in_the_folder_of_another_is_not_taken_for_it(config: Train, folder: Path) -> None:
    shutil.copytree(folder, folder.with_name(folder.name.replace("-s1", "-s2")))
    with pytest.raises(ConfigError, match=r"-s2 holds a finished run of other settings or of another seed"):
        train.run(replace(config, seed=2))


def test_a_clearing_that_is_cut_off_anywhere_leaves_a_run_that_resumes_to_the_same_or_none(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run whose best epoch is an early one, after which the rate makes it worse, so that it keeps that
    checkpoint and the newest.
    """
    monkeypatch.chdir(tmp_path)
    worse = ["dropout=none", "schedule.lr=8", "schedule.clip=inf", "schedule.epochs=4", "schedule.patience=9"]
    config = settings(*TINY, *text, *SHORT, *worse)
    train.run(config)
    (folder,) = (path.parent for path in Path().rglob("result.json"))
    (folder / "eval-0001-standard.json").write_text("{}")
    assert (
        json.loads((folder / "result.json").read_text())["epoch"] < 3 and len(checkpoint.all_in(folder)) == 3
    )
    whole, expected = Path(shutil.copytree(folder, "whole")), training_result(folder)
    names = [path.name for path in removal_order(folder)]
    assert names[0] == "result.json"
    for removed, name in enumerate(names, 1):
        if name.startswith(("result", "checkpoint")) or removed == len(
            names
        ):  # what is in between changes nothing for training
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            for path in removal_order(folder)[:removed]:
                path.unlink()
            assert not (folder / "result.json").exists()
            if (folder / "log.jsonl").exists() and not checkpoint.all_in(folder):
                with pytest.raises(
                    ConfigError, match=r"log\.jsonl is of a finished run .* or start over with"
                ):
                    train.run(config)
                continue
            train.run(config)
            assert training_result(folder)[:3] == expected[:3], f"after {removed} removals"
    assert not list(folder.glob("eval-*")), "of all files the last is gone, too"


@pytest.mark.filterwarnings("ignore:This process .*multi-threaded:DeprecationWarning")  # from Python 3.12 on
@pytest.mark.parametrize("removals", [1, 3, 6])
def test_a_clearing_that_is_killed_leaves_no_finished_run(
    removals: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL to a real process, which comes after a removal: to its own, so that it never comes too early or
    too late.
    """
    order = [path.name for path in removal_order(folder)]
    unlink, removed = Path.unlink, list[Path]()

    def unlink_and_die(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        removed.append(path)
        if len(removed) == removals:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(Path, "unlink", unlink_and_die)
        try:
            clear(folder)
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert [path.name for path in removal_order(folder)] == order[removals:], (
        "exactly the first ones are removed"
    )
    assert not (folder / "result.json").exists()


def test_a_run_that_is_evaluated_is_not_cleared_whoever_has_made_the_lock(folder: Path) -> None:
    before = content(folder)
    with (
        Lock(folder / "eval-0003-standard.lock", "it"),
        pytest.raises(ConfigError, match=r"eval-0003-standard\.json is in use"),
    ):
        clear(folder)
    assert content(folder) == before
    os.mkfifo(folder / "eval-0003-standard.lock")
    with in_seconds(20):
        clear(folder)
    assert not list(folder.iterdir())


def test_what_is_removed_by_somebody_else_meanwhile_is_no_longer_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an evaluation that ends removes its lock, or a second `force=true` everything."""
    (folder / "eval-0003-standard.lock").touch()
    listed = ownership.entries(folder)
    shutil.copytree(folder, "whole")
    for gone in ("eval-0003-standard.lock", "result.json", "config.yaml"):
        shutil.rmtree(folder)
        shutil.copytree("whole", folder)
        (folder / gone).unlink()
        with monkeypatch.context() as patch:
            patch.setattr(ownership, "entries", lambda _: listed)
            ownership.require_record(folder)
            clear(folder)
        assert not list(folder.iterdir())


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_in_place_of_one_is_an_error_and_is_not_opened(
    name: str, finished: bool, config: Train, folder: Path
) -> None:
    if not finished:
        (folder / "result.json").unlink()
    path = folder / name
    for kind in ("fifo", "endless", "nowhere", "folder"):
        path.unlink(missing_ok=True)
        {
            "fifo": lambda: os.mkfifo(path),
            "endless": lambda: path.symlink_to("/dev/zero"),
            "nowhere": lambda: path.symlink_to("nowhere"),
            "folder": path.mkdir,
        }[kind]()
        before = content(folder)
        with in_seconds(20), pytest.raises(ConfigError, match=rf"{name} is in the way: .*; move it away"):
            train.run(config)
        assert content(folder) == before


def test_a_log_that_is_a_link_is_not_written_through(config: Train, folder: Path) -> None:
    (folder / "result.json").unlink()
    theirs = folder.parents[3] / "theirs"
    shutil.move(folder / "log.jsonl", theirs)
    before = theirs.read_bytes()
    (folder / "log.jsonl").symlink_to(theirs)
    with pytest.raises(ConfigError, match=r"log\.jsonl is in the way"):
        train.run(config)
    assert theirs.read_bytes() == before


def test_a_lock_is_never_a_link_a_fifo_or_a_file_of_somebody_else(config: Train, folder: Path) -> None:
    (folder / "result.json").unlink()
    theirs, lock = folder.parents[3] / "theirs", folder / "lock"
    theirs.write_text("mine")
    for kind in ("link", "nowhere", "fifo", "endless", "folder", "text", "hard link"):
        {
            "link": lambda: lock.symlink_to(theirs),
            "nowhere": lambda: lock.symlink_to("nowhere"),
            "fifo": lambda: os.mkfifo(lock),
            "endless": lambda: lock.symlink_to("/dev/zero"),
            "folder": lock.mkdir,
            "text": lambda: lock.write_text("mine"),
            "hard link": lambda: lock.hardlink_to(theirs),
        }[kind]()
        for force in (False, True):
            with in_seconds(20), pytest.raises(ConfigError, match=r"lock is (in the way|not a lock file)"):
                train.run(Train(**{**vars(config), "force": force}))
        assert theirs.read_text() == "mine" and not Path("nowhere").exists() and os.path.lexists(lock)
        lock.rmdir() if kind == "folder" else lock.unlink()
    lock.write_text("process 1 on another host\n")
    assert train.run(config) == "resumed", "one that a killed process has left does no harm"
    assert not lock.exists()


def test_an_evaluation_of_a_renamed_checkpoint_overwrites_only_an_evaluation(folder: Path) -> None:
    (folder / "checkpoint-0003.pt").rename("mine.pt")
    Path("mine-standard.json").write_text('{"mine": 1}')
    asked = settings("checkpoint=mine.pt", "stored_data=true", "device=cpu", command="eval")
    with pytest.raises(ConfigError, match=r"mine-standard\.json was not written by vdrop"):
        evaluation.run(asked)
    assert Path("mine-standard.json").read_text() == '{"mine": 1}'
    Path("mine-standard.json").unlink()
    for _ in range(2):
        assert evaluation.run(asked) == "done"
