"""`vdrop compare`."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.conftest import TINY, TINY_SENTIMENT, settings
from tests.processes import ROOT
from vdrop_cli.commands import compare, train
from vdrop_cli.commands import eval as evaluation


@pytest.fixture
def folders(text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for dropout in ("none", "variational"):
        train.run(settings(*TINY, *text, f"dropout={dropout}", "schedule.epochs=2"))
    return sorted(str(path.parent) for path in Path().rglob("result.json"))


def test_differing_settings_results_and_curves(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    compare.main([*folders, "--picture", "pictures/curves.png"])
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["none", "variational"]
    rows = {line.split()[0]: line.split()[1:] for line in told if len(line.split()) == 3}
    assert rows["dropout.p_h"] == ["0.0", "0.25"]
    assert "model.name" not in rows and "seed" not in rows
    assert all(1 < float(value) < 100 for value in rows["test_ppl"])
    assert (tmp_path / "pictures" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_an_older_version_left_at_its_default_and_what_was_published_do_not_differ(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(folders[0]) / "config.yaml"
    older = OmegaConf.load(path)
    del older.schedule.optimiser
    older.published = {"row": "A row with a name that is longer than a column", "valid": 1.0}
    older.outputs = "a/folder/with/a/name/that/is/longer/than/a/column"
    OmegaConf.save(older, path)
    capsys.readouterr()
    compare.main(folders)
    rows = {
        line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.split()
    }
    assert "schedule.optimiser" not in rows and not [name for name in rows if name.startswith("published")]
    assert rows["outputs"] == [older.outputs, "outputs"]


def test_mc_dropout_and_speed_are_told(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (variational,) = (folder for folder in folders if "-variational" in folder)
    evaluation.run(settings(f"checkpoint={variational}", "stored_data=true", "mc_samples=3", command="eval"))
    capsys.readouterr()
    compare.main(sorted(folders))
    rows = {
        line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.split()
    }
    assert rows["test_ppl_mc3"][0] == "–" and 1 < float(rows["test_ppl_mc3"][1]) < 100
    assert all(int(value) > 0 for value in rows["words_per_second"])
    assert "valid_ppl_as_published" not in rows


def test_the_validation_that_compares_with_the_paper_is_told_of_penn_treebank(
    capsys: pytest.CaptureFixture[str],
) -> None:
    compare.main(
        [
            str(path.parent)
            for path in sorted((ROOT / "outputs/record/language_model").glob("*/s1/result.json"))
        ]
    )
    rows = {
        line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.split()
    }
    pairs = zip(rows["valid_ppl_as_published"], rows["valid_ppl"], strict=True)
    assert all(float(as_published) < float(exact) for as_published, exact in pairs)


def test_a_run_alone_has_the_name_of_its_folder(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    compare.main(folders[:1])
    assert capsys.readouterr().out.splitlines()[0].strip() == folders[0].removeprefix("outputs/train/")


def test_models_of_ratings_are_compared_by_their_errors(
    folders: list[str], rated: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for protocol in ("paper", "clean"):
        train.run(settings(*TINY_SENTIMENT, *rated, f"task.protocol={protocol}"))
    ratings = sorted(str(path.parent) for path in Path().rglob("result.json") if "sentiment" in str(path))
    capsys.readouterr()
    compare.main([*ratings, "--picture", "errors.png"])
    rows = {
        line.split()[0]: line.split()[1:]
        for line in capsys.readouterr().out.splitlines()
        if len(line.split()) == 3
    }
    assert sorted(rows["task.protocol"]) == ["clean", "paper"] and all(
        0 < float(value) < 1 for value in rows["test_rmse"]
    )
    paper = rows["task.protocol"].index("paper")
    assert rows["valid_rmse"][paper] == "–" and rows["test_rmse_chosen_on_test"][1 - paper] == "–"
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        compare.main([folders[0], ratings[0], "--picture", "both.png"])
    assert "a picture is of runs of one task" in capsys.readouterr().err


def test_an_unfinished_run_is_left_out_and_said_so(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(folders[0]) / "result.json").unlink()
    capsys.readouterr()
    compare.main(folders)
    assert f"{folders[0]} is not finished, left out" in capsys.readouterr().err
    (Path(folders[1]) / "result.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        compare.main(folders)
    assert stopped.value.code == 2


def test_a_picture_that_cannot_be_written_is_named(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare.main([*folders, "--picture", "curves.unknown"])
    assert (
        stopped.value.code == 2 and "the picture curves.unknown cannot be written" in capsys.readouterr().err
    )
