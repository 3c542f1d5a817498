"""`vdrop compare`."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.conftest import TINY, TINY_SENTIMENT, settings
from tests.processes import ROOT
from vdrop_cli import comparison, outcomes, runs
from vdrop_cli.commands import compare, train
from vdrop_cli.commands import eval as evaluation
from vdrop_cli.errors import ConfigError
from vdrop_cli.outcomes import Outcome


@pytest.fixture(scope="module")
def trained(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs without dropout, of seed 1, and with it, of seeds 1 and 2."""
    outputs = tmp_path_factory.mktemp("trained") / "outputs"
    for overrides in (["dropout=none"], ["dropout=variational"], ["dropout=variational", "seed=2"]):
        train.run(settings(*TINY, *text, *overrides, "schedule.epochs=2", f"outputs={outputs}"))
    return outputs


@pytest.fixture
def folders(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    shutil.copytree(trained, tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "20")
    return sorted(str(path.parent) for path in Path().rglob("result.json"))


def run(*runs: str, **others: Any) -> None:
    config = settings("runs=[x]", command="compare")
    config.runs = list(runs)
    for name, value in others.items():
        setattr(config, name, value)
    compare.run(config)


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of each line by the first of them; cells are two spaces apart."""
    lines = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {line[0]: line[1:] for line in cells if line}


def test_a_column_per_configuration_where_rows_are_too_wide(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*folders, picture="pictures/curves.png", title="Mine")
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["none", "variational"]
    rows = rows_of(shown)
    assert rows["seeds"] == ["1", "2"] and rows["dropout.p_h"] == ["0.0", "0.25"]
    assert "model.name" not in rows and "seed" not in rows
    without, with_dropout = rows["test_ppl"]
    assert 1 < float(without) < 100 and 1 < float(with_dropout.partition(" ± ")[0]) < 100
    assert (tmp_path / "pictures" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_per_configuration_where_there_is_room(
    folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run(*folders)
    heading, none, variational, *_ = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["seeds", "epoch", "train_ppl"]
    assert none.split()[:2] == ["none", "1"] and variational.split()[:2] == ["variational", "2"]


def test_an_evaluation_made_in_another_way_is_not_shown_as_the_usual_one(folders: list[str]) -> None:
    """Their metrics have the same name: another precision, another word dropout, a second seed."""
    folder = next(Path(name) for name in folders if "variational" in name)
    epoch = runs.read(folder).result["epoch"]
    for how, ppl in (("mc10-s1", 9.0), ("mc10-s1-bf16", 7.0), ("mc10-s2", 6.0), ("mc10-word-s1", 5.0)):
        content = {"metrics": {"test_ppl_mc10": ppl}, "mc": [{"samples": 10, "ppl": ppl}]}
        (folder / f"eval-{epoch:04}-{how}.json").write_text(json.dumps(content))
    (folder / f"eval-{epoch:04}-mc20-word-s1.json").write_text(
        json.dumps({"metrics": {"test_ppl_mc20": 4.0}})
    )
    shown = comparison.metrics(runs.read(folder))
    assert shown["test_ppl_mc10"] == 9.0 and "test_ppl_mc20" not in shown


@pytest.mark.parametrize("name", ["outputs", "outputs/train", "sweep", "running_sweep", "moved/sweep"])
def test_a_folder_of_runs_or_of_a_sweep_stands_for_its_runs(
    name: str, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*folders)
    expected = capsys.readouterr().out
    if "sweep" in name:
        place = tmp_path / name.removeprefix("moved/")
        place.mkdir()
        ended = [Outcome(["seed=9"], "failed", 2), Outcome(["seed=8"], "failed", 2, folder="../refused")]
        ended += [Outcome(["x=1"], "done", folder=f"../{folder}") for folder in folders]
        if name == "running_sweep":  # its jobs have written their outcomes, it has no summary yet
            for number, outcome in enumerate(ended):
                outcomes.write(outcome, outcomes.path_of(place, number))
        else:
            outcomes.write(ended, place / "summary.json")
    if name.startswith("moved"):
        (tmp_path / "moved").mkdir()
        for part in ("sweep", "outputs"):
            (tmp_path / part).rename(tmp_path / "moved" / part)
    run(name)
    assert capsys.readouterr().out == expected


def test_a_sweep_that_names_no_runs_and_an_empty_folder_are_refused(folders: list[str]) -> None:
    Path("sweep").mkdir()
    with pytest.raises(ConfigError, match=r"^sweep is not a run folder"):
        run("sweep")
    outcomes.write([Outcome(["seed=9"], "failed", 2)], Path("sweep/summary.json"))
    with pytest.raises(ConfigError, match=r"^sweep names no run folders"):
        run("sweep")
    Path("sweep/summary.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^sweep/summary\.json is damaged"):
        run("sweep")


def test_csv_and_markdown_hold_the_numbers_and_only_own_files_are_overwritten(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        run(*folders, csv="new/a.csv", markdown="new/a.md")
    Path("link").symlink_to("new/a.csv")
    run(*folders, csv="link")
    assert Path("link").is_symlink()
    none, variational = csv.DictReader(Path("new/a.csv").read_text().splitlines())
    assert (none["configuration"], none["seeds"], none["unfinished"]) == ("none", "1", "0")
    assert none["test_ppl_std"] == "" and none["test_ppl_count"] == "1"
    assert variational["dropout.p_h"] == "0.25" and variational["test_ppl_count"] == "2"
    results = [OmegaConf.load(Path(folder) / "result.json").test_ppl for folder in folders]
    assert float(none["test_ppl"]) == results[0]
    assert float(variational["test_ppl"]) == pytest.approx(sum(results[1:]) / 2)
    assert float(variational["test_ppl_std"]) == pytest.approx(abs(results[1] - results[2]) / 2**0.5)
    page = Path("new/a.md").read_text()
    assert "| variational | 2 |" in page and "| --- |" in page
    Path("mine").write_text("mine")
    Path("outputs/train/x").touch()
    for name in ("csv", "markdown"):
        with pytest.raises(ConfigError, match=r"^mine was not written by vdrop"):
            run(*folders, **{name: "mine"})
        with pytest.raises(ConfigError, match=f"^{name}=outputs/train/x"):
            run(*folders, **{name: "outputs/train/x/file"})


def test_tags_select_runs_and_are_shown(
    folders: list[str], text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, tags in ((1, "a,b"), (2, "b")):
        train.run(
            settings(*TINY, *text, "model.layers=1", f"seed={seed}", f"tags=[{tags}]", "run_name=shallow")
        )
    capsys.readouterr()
    compare.run(settings("tags=[b]", command="compare"))
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["shallow"]
    assert rows_of(shown)["tags"] == ["a, b"] and rows_of(shown)["seeds"] == ["2"]
    compare.run(settings("tags=[a,b]", command="compare"))
    assert rows_of(capsys.readouterr().out)["seeds"] == ["1"]
    with pytest.raises(ConfigError, match=r"^tags: no run"):
        compare.run(settings("tags=[c]", command="compare"))
    run(*folders, "outputs")
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["none", "variational", "layers=2", "shallow"]
    assert "run_name" not in rows_of(shown)


def test_what_an_older_version_left_at_its_default_and_what_was_published_do_not_differ(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(folders[0]) / "config.yaml"
    older = OmegaConf.load(path)
    del older.schedule.optimiser, older.run_name, older.tags
    older.published = {"row": "A row with a name that is longer than a column", "valid": 1.0}
    older.outputs = "a/folder/with/a/name/that/is/longer/than/a/column"
    OmegaConf.save(older, path)
    run(*folders)
    rows = rows_of(capsys.readouterr().out)
    assert "schedule.optimiser" not in rows and not [name for name in rows if name.startswith("published")]
    assert "outputs" not in rows and "dropout.p_h" in rows


def test_metrics_of_mc_dropout_and_speed_are_shown(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation.run(settings(f"checkpoint={folders[1]}", "stored_data=true", "mc_samples=3", command="eval"))
    capsys.readouterr()
    run(*folders)
    rows = rows_of(capsys.readouterr().out)
    none, variational = rows["test_ppl_mc3"]
    assert none == "–" and variational.endswith(" (1)"), "one of the two runs was evaluated"
    assert all(float(value.partition(" ±")[0]) > 0 for value in rows["words_per_second"])
    assert "valid_ppl_as_published" not in rows


def test_runs_of_two_machines_have_no_speed_together(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = Path(shutil.copytree(folders[0], tmp_path / "again"))
    OmegaConf.save({**OmegaConf.load(again / "config.yaml"), "seed": 77}, again / "config.yaml")
    run(folders[0], str(again))
    assert "words_per_second" in rows_of(capsys.readouterr().out), "both of one machine"
    first, *others = (again / "log.jsonl").read_text().splitlines()
    start = json.loads(first)
    start["environment"]["threads"] = 99
    (again / "log.jsonl").write_text("\n".join([json.dumps(start), *others]) + "\n")
    run(folders[0], str(again))
    rows = rows_of(capsys.readouterr().out)
    assert rows["words_per_second"] == ["–"] and rows["test_ppl"] != ["–"]


def test_the_validation_that_compares_with_the_paper_is_shown_for_penn_treebank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    run(*(str(path.parent) for path in (ROOT / "outputs/record/language_model").glob("*/s1/result.json")))
    rows = rows_of(capsys.readouterr().out)
    pairs = list(zip(rows["valid_ppl_as_published"], rows["valid_ppl"], strict=True))
    assert pairs and all(float(as_published) < float(exact) for as_published, exact in pairs)


def test_a_configuration_alone_is_named_by_data_model_and_dropout(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(folders[0])
    assert capsys.readouterr().out.splitlines()[0].strip() == "text lstm_small none"


def test_models_of_ratings_are_compared_by_their_errors_and_tasks_beside_each_other(
    folders: list[str], rated: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for protocol in ("paper", "clean"):
        train.run(settings(*TINY_SENTIMENT, *rated, f"task.protocol={protocol}"))
    ratings = sorted(str(path.parent) for path in Path().rglob("result.json") if "sentiment" in str(path))
    run(*ratings, picture="errors.png", csv="ratings.csv")
    records = list(csv.DictReader(Path("ratings.csv").read_text().splitlines()))
    by_protocol = {record["task.protocol"]: record for record in records}
    assert by_protocol.keys() == {"clean", "paper"}
    assert all(0 < float(record["test_rmse"]) < 1 for record in records)
    assert by_protocol["paper"]["valid_rmse"] == "" == by_protocol["clean"]["test_rmse_chosen_on_test"]
    capsys.readouterr()
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    run(folders[0], *ratings)
    rows = rows_of(capsys.readouterr().out)
    assert rows["test_ppl"][1:] == ["–", "–"] and rows["test_rmse"][0] == "–"
    with pytest.raises(ConfigError, match="a picture is of runs of one task"):
        run(folders[0], ratings[0], picture="both.png")


def test_an_unfinished_run_is_marked(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for folder in folders[:2]:
        (Path(folder) / "result.json").unlink()
    (Path(folders[0]) / "stuck.json").touch()
    (Path(folders[1]) / "log.jsonl").unlink()
    run(*folders)
    shown = capsys.readouterr()
    assert rows_of(shown.out)["seeds"] == ["0 of 1 (1 stuck)", "1 of 2 (1 unfinished)"]
    assert rows_of(shown.out)["test_ppl"][0] == "–"
    assert f"{folders[0]} is stuck" in shown.err and f"{folders[1]} is unfinished" in shown.err
    (Path(folders[2]) / "result.json").unlink()
    with pytest.raises(ConfigError, match="none of these runs is finished"):
        run(*folders)


def test_a_run_and_its_record_count_once(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folders[1], "record/s1")
    run(*folders, "record/s1", folders[0])
    shown = capsys.readouterr()
    assert rows_of(shown.out)["seeds"] == ["1", "2"]
    assert [line for line in shown.err.splitlines() if "left out" in line] == [
        f"vdrop: record/s1 has the settings and the seed of {folders[1]}; left out"
    ]


def test_a_picture_that_cannot_be_drawn_is_named_before_anything_is_written(folders: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^picture must end in \.png, \.svg, \.pdf, got curves\.unknown"):
        run(*folders, csv="runs.csv", picture="curves.unknown")
    assert not Path("runs.csv").exists()
