"""Runs that are finished, read from disk."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, settings
from tests.processes import ROOT
from vdrop_cli import evaluation_files, files, kernels, pictures, runs
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.run_files import SHARED_DEVICE
from vdrop_cli.settings.fields import plain


@pytest.fixture
def folder(text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text, "schedule.epochs=3"))
    return next(Path().rglob("result.json")).parent


def test_a_run_is_read_as_it_was_made(folder: Path, text: list[str]) -> None:
    (run,) = runs.below(Path("outputs"))
    assert run.folder == folder and plain(run.train) == plain(
        settings(*TINY, *text, "schedule.epochs=3", f"backend={kernels.choose('auto', torch.device('cpu'))}")
    )
    assert run.settings["schedule.epochs"] == 3 and [epoch["epoch"] for epoch in run.epochs] == [1, 2, 3]
    assert run.environment["precision"] == "fp32"
    assert run.words_per_second == sorted(epoch["words_per_second"] for epoch in run.epochs)[1]
    assert run.hours == run.result["seconds"] / 3600
    (folder / SHARED_DEVICE).write_text("six others")
    assert run.words_per_second is None, "it says nothing about this run"


@pytest.mark.parametrize(
    ("name", "value"),
    [("device", "another"), ("processor_model", "another"), ("threads", 99), ("date", "later")],
)
def test_a_run_that_was_resumed_on_another_machine_has_no_speed(
    name: str, value: object, folder: Path
) -> None:
    (run,) = runs.below(Path("outputs"))
    first = next(record for record in run.log if record["kind"] == "start")
    run.log.insert(2, first | {"environment": first["environment"]})
    assert run.words_per_second is not None, "on the same machine"
    run.log[2] = first | {"environment": first["environment"] | {name: value}}
    assert (run.words_per_second is None) == (name != "date")


@pytest.fixture(scope="module")
def trained(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("outputs")
    train.run(settings(*TINY, *text, "schedule.epochs=3", f"outputs={outputs}"))
    return next(outputs.rglob("result.json")).parent


RESULTS: dict[str, Any] = {
    "test_ppl": "9.0",
    "valid_ppl": None,
    "epochs": 3.5,
    "epoch": 0,
    "seconds": [1],
    "train_ppl": {"a": 1},
}


def nested_alias(level: int) -> str:
    """A line of YAML whose value is nine times that of the line before."""
    return f"a{level + 1}: &a{level + 1} [{f'*a{level}, ' * 9}]\n"


DAMAGES: list[tuple[str, Callable[[str], str]]] = [
    *(
        ("result.json", lambda text, name=name: json.dumps(json.loads(text) | {name: RESULTS[name]}))
        for name in RESULTS
    ),  # type: ignore[misc]
    ("result.json", lambda text: text.replace('"test_ppl": ', '"test_ppl": NaN, "a": ')),
    ("result.json", lambda text: text.replace('"test_ppl": ', '"test_ppl": 1.0, "test_ppl": ')),
    ("result.json", lambda text: "[" * 100_000),
    ("result.json", lambda text: ""),
    ("log.jsonl", lambda text: ""),
    ("log.jsonl", lambda text: text[: text.index('"epoch": 3')]),
    ("log.jsonl", lambda text: "".join(text.splitlines(keepends=True)[1:])),
    ("log.jsonl", lambda text: "".join(text.splitlines(keepends=True)[::-1])),
    ("log.jsonl", lambda text: re.sub(r'("kind": "epoch".*"train_loss": )', r"\g<1>1", text)),
    ("log.jsonl", lambda text: text.replace('"environment": {', '"environment": 3, "a": {', 1)),
    ("log.jsonl", lambda text: text.replace('"device": "', '"no_device": "')),
    ("log.jsonl", lambda text: f"{text}{'[' * 100_000}\n"),
    ("config.yaml", lambda text: "a: &a [*a]"),
    ("config.yaml", lambda text: "a0: &a0 [x, x]\n" + "".join(nested_alias(n) for n in range(20))),
    ("config.yaml", lambda text: text.replace("hidden_size: 8", f"hidden_size: 1{'0' * 26}")),
    ("config.yaml", lambda text: text.replace("seed: 1", "seed: [1]")),
    ("config.yaml", lambda text: re.sub(r"\blr: .*", f"lr: 1{'0' * 400}", text)),
    ("config.yaml", lambda text: "[" * 100_000),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_damage_is_named_in_one_line_and_never_read(
    name: str, damage: Callable[[str], str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    content = (folder / name).read_text()
    (folder / name).write_text(damage(content))
    assert (folder / name).read_text() != content
    assert runs.below(tmp_path) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder / name) in line and line.endswith("; left out") and len(line) < 500


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "result.json"])
@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "loop"])
def test_what_stands_in_place_of_a_file_is_named_in_one_line(
    kind: str, name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    path = folder / name
    path.unlink()
    made: dict[str, Callable[[], None]] = {
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(name),
    }
    made[kind]()
    assert runs.below(tmp_path) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and line.endswith("; left out")


def test_a_run_whose_log_begins_late_is_read_but_has_no_curve(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a run that resumed after its log was lost."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    start, *others = (folder / "log.jsonl").read_text().splitlines()
    first = next(n for n, line in enumerate(others) if '"kind": "epoch"' in line)
    begin = json.loads(start) | {"epoch": 1, "step": json.loads(others[first])["step"]}
    late = [
        record for line in others[first + 1 :] if (record := json.loads(line)).pop("chain", "") is not None
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (begin, *late)))
    (run,) = runs.below(tmp_path)
    assert not run.has_whole_log and run.words_per_second > 0
    capsys.readouterr()
    figure = pictures.learning_curves({"whole": runs.below(trained)[0], "late": run}, training=True)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "whole",
        "validation",
        "training, dropout on",
    ]
    assert "lacks the epochs before 2" in capsys.readouterr().err


def test_what_older_versions_logged_is_read_by_its_present_name(folder: Path) -> None:
    """`train_ppl` of an epoch was with dropout on."""
    new = runs.read(folder)
    log = folder / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        if record["kind"] == "epoch":
            record["train_ppl"] = record.pop("train_ppl_dropout")
            del record["chain"]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    old = runs.read(folder)
    assert old is not None and new is not None and old.result == new.result
    assert old.log == [
        {name: value for name, value in record.items() if name != "chain"} for record in new.log
    ]
    assert "train_ppl" in new.result and all("train_ppl" not in epoch for epoch in new.epochs)
    record = runs.read(ROOT / "outputs/record/language_model/lstm_small-none/s1")
    assert (
        record is not None
        and {"valid_ppl_as_published", "train_ppl_dropout"} <= set(record.epochs[0])
        and "valid_ppl_as_published" in record.result
    )


def test_evaluations_are_those_of_the_epoch_that_is_reported(folder: Path) -> None:
    for name in (
        "eval-0003-standard.json",
        "eval-0003-mc10-s1.json",
        "eval-0002-standard.json",
        "eval-0003-mc10-s1.partial",
        "eval-0003-00050-mc10-s1.json",  # of a checkpoint in the fourth epoch
    ):
        (folder / name).write_text(json.dumps({"metrics": {}}))
    run = runs.read(folder)
    assert run is not None
    assert [path.name for path in run.evaluations] == ["eval-0003-mc10-s1.json", "eval-0003-standard.json"]
    assert evaluation_files.read(run.evaluations[0]) == {"metrics": {}} and run.passes == {10}


@pytest.mark.parametrize(
    ("members", "are"),
    [
        (["a/0f-s1/checkpoint-0003.pt", "b/0f-s2/checkpoint-0002.pt"], True),
        (["a/0f-s2/checkpoint-0003.pt", "b/0f-s1/checkpoint-0002.pt"], True),
        (["a/0f-s1/checkpoint-0003.pt", "b/0f-s3/checkpoint-0002.pt"], False),
        (["a/0f-s1/checkpoint-0003.pt", "b/0e-s2/checkpoint-0002.pt"], False),
        (["a/0f-s1/checkpoint-0003.pt", "b/0f-s2/checkpoint-0002-00050.pt"], False),
    ],
)
def test_an_ensemble_of_a_row_is_of_its_seeds(members: list[str], are: bool, folder: Path) -> None:
    assert evaluation_files.are_seeds_of_one_run(members, [1, 2]) == are
    assert not evaluation_files.are_seeds_of_one_run(members, [2, 4])
    (folder / "eval-0003-ensemble2-0123abcd.json").write_text(json.dumps({"metrics": {}, "members": members}))
    run = runs.read(folder)
    assert run is not None and (runs.evaluation_of(run, Evaluation(members=2), [1, 2]) is not None) == are


def test_an_ensemble_of_a_row_has_the_epochs_that_its_runs_report(folder: Path) -> None:
    """It may have been made while another member was still in training."""
    members = [f"outputs/{folder.name}/checkpoint-0003.pt"]
    other = folder.parent / folder.name.replace("-s1", "-s2")
    shutil.copytree(folder, other)
    for epoch, counts in ((2, False), (3, True)):
        names = [*members, f"outputs/{other.name}/checkpoint-{epoch:04}.pt"]
        path = folder / "eval-0003-ensemble2-0123abcd.json"
        path.write_text(json.dumps({"metrics": {}, "members": names}))
        evaluation = runs.evaluation_of(runs.read(folder), Evaluation(members=2), [1, 2])
        assert (evaluation is not None) == counts
    (other / "result.json").unlink()
    assert runs.evaluation_of(runs.read(folder), Evaluation(members=2), [1, 2]) is None, "still in training"


def test_runs_behind_links_are_read_once_and_unreadable_folders_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "other_disk" / folder.name
    shutil.move(folder, moved)
    folder.symlink_to(moved)
    (folder.parent / "again").symlink_to(moved)
    (moved / "loop").symlink_to(folder.parent.resolve())
    assert [run.folder.resolve() for run in runs.below(Path("outputs"))] == [moved]
    assert not capsys.readouterr().err
    locked = folder.parent / "locked"
    locked.mkdir()
    scan = os.scandir

    def refuse(place: str) -> object:  # root may read everything
        if Path(place) == locked:
            raise PermissionError(13, "Permission denied", place)
        return scan(place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        assert len(runs.below(Path("outputs"))) == 1
    assert f"vdrop: {locked} cannot be read (Permission denied); left out" in capsys.readouterr().err
    assert runs.below(tmp_path / "nowhere") == []


def test_a_run_counts_by_its_own_path_rather_than_by_that_of_a_link(folder: Path) -> None:
    Path("outputs/train/a_link").symlink_to(folder.resolve())
    assert [run.folder for run in runs.below(Path("outputs"))] == [folder]


def test_an_average_does_not_count_after_a_member_was_trained_again(folder: Path) -> None:
    other = folder.parent / folder.name.replace("-s1", "-s2")
    shutil.copytree(folder, other)
    paths = [one / "checkpoint-0003.pt" for one in (folder, other)]
    for number, path in enumerate(paths):
        files.write_tensors(path, {"weight": number})
    content = {
        "metrics": {},
        "members": [f"outputs/{path.parent.name}/{path.name}" for path in paths],
        "checksums": [files.checksum(path) for path in paths],
    }
    (folder / "eval-0003-ensemble2-0123abcd.json").write_text(json.dumps(content))

    def counts() -> bool:
        return runs.evaluation_of(runs.read(folder), Evaluation(members=2), [1, 2]) is not None

    assert counts()
    files.write_tensors(paths[1], {"weight": 9})
    assert not counts()
    paths[1].unlink()
    assert counts(), "a record has no checkpoints"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", None, "is not a run folder"),
        (
            "config.yaml",
            "dropout: {strength: 0.5}",
            r"config\.yaml is of another version of vdrop, or damaged \(.*strength",
        ),
        ("config.yaml", "model: [", r"config\.yaml is of another version of vdrop, or damaged \("),
        ("log.jsonl", None, r"log\.jsonl is damaged: its start is missing"),
        ("result.json", "{}", r"result\.json is damaged"),
    ],
)
def test_a_folder_that_cannot_be_read_is_an_error_and_left_out_of_many(
    name: str, content: str | None, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / name
    path.write_text(content) if content is not None else path.unlink()
    with pytest.raises(ConfigError, match=message):
        runs.read(folder)
    capsys.readouterr()
    assert runs.below(Path("outputs")) == []
    stderr = capsys.readouterr().err
    assert str(folder) in stderr and stderr.endswith("; left out\n") and stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("dirty", "mark", "any_did"),
    [([True, None], "*", True), ([None, False], "?", None), ([False, False], "", False)],
)
def test_unknown_code_is_marked_and_never_taken_for_that_of_the_commit(
    dirty: list[bool | None], mark: str, any_did: bool | None
) -> None:
    environments = [
        {"precision": "fp32", "device": "a", "commit": "0123456789", "dirty": each} for each in dirty
    ]
    assert runs.environment_cells(environments[0])[-1] == f"0123456{mark}"
    assert runs.code_differed(environments) is any_did
    assert runs.environment_cells({"precision": "fp32", "device": "a"})[-1] == "–"
