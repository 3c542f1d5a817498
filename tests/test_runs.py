"""Runs that are finished, read from disk."""

import json
from pathlib import Path

import pytest

from tests.conftest import TINY, settings
from vdrop_cli import runs
from vdrop_cli.commands import train
from vdrop_cli.config import ConfigError, Published, plain


@pytest.fixture
def folder(text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text, "schedule.epochs=3"))
    return next(Path().rglob("result.json")).parent


def test_a_run_is_read_as_it_was_made(folder: Path, text: list[str]) -> None:
    (found,) = runs.below(Path("outputs"))
    assert found.folder == folder and plain(found.train) == plain(settings(*TINY, *text, "schedule.epochs=3", "backend=fused"))
    assert found.settings["schedule.epochs"] == 3 and [epoch["epoch"] for epoch in found.epochs] == [1, 2, 3]
    assert found.environment["precision"] == "fp32"
    assert found.words_per_second == sorted(epoch["words_per_second"] for epoch in found.epochs)[1]


def test_evaluations_are_those_of_the_epoch_that_is_reported(folder: Path) -> None:
    for name in ("eval-0003-standard.json", "eval-0003-mc10-s1.json", "eval-0002-standard.json", "eval-0003-mc10-s1.partial"):
        (folder / name).write_text(json.dumps({"metrics": {}}))
    found = runs.read(folder)
    assert found is not None
    assert [path.name for path in found.evaluations] == ["eval-0003-mc10-s1.json", "eval-0003-standard.json"]
    assert runs.evaluation(found.evaluations[0]) == {"metrics": {}}
    for damage in ("", "[]", '{"metrics": 3}'):
        found.evaluations[0].write_text(damage)
        with pytest.raises(ConfigError, match=r"mc10-s1\.json is damaged .*; delete it"):
            runs.evaluation(found.evaluations[0])


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
    assert runs.are_one_row(members) == are
    (folder / "eval-0003-ensemble2-0123abcd.json").write_text(json.dumps({"metrics": {}, "members": members}))
    found = runs.read(folder)
    assert found is not None and (runs.evaluation_of(found, Published(row="x", members=2)) is not None) == are


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", None, "is not a run folder"),
        ("config.yaml", "dropout: {strength: 0.5}", r"config\.yaml is of another version of vdrop, or damaged \(.*strength"),
        ("config.yaml", "model: [", r"config\.yaml is of another version of vdrop, or damaged \("),
        ("log.jsonl", None, r"log\.jsonl is damaged, its start or its epochs are not there"),
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
    told = capsys.readouterr().err
    assert str(folder) in told and told.endswith("; left out\n") and told.count("\n") == 1


@pytest.mark.parametrize(("dirty", "mark", "any_did"), [([True, None], "*", True), ([None, False], "?", None), ([False, False], "", False)])
def test_unknown_code_is_marked_and_never_taken_for_that_of_the_commit(dirty: list[bool | None], mark: str, any_did: bool | None) -> None:
    environments = [{"precision": "fp32", "device": "a", "commit": "0123456789", "dirty": each} for each in dirty]
    assert runs.made_in(environments[0])[-1] == f"0123456{mark}"
    assert runs.code_differed(environments) is any_did
    assert runs.made_in({"precision": "fp32", "device": "a"})[-1] == "–"
