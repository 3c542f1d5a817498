"""The model card of an export: its code runs, its numbers are those of the weights."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import settings
from tests.sharing.exports import language_model, model_of_ratings, predicted
from vdrop_cli import checkpoint
from vdrop_cli.commands import eval as evaluation
from vdrop_cli.commands import export
from vdrop_cli.errors import ConfigError
from vdrop_cli.sharing.card import is_unedited, measurements, render, to_measurements, without_places
from vdrop_cli.sinks import read_result

pytest.importorskip("safetensors")
RATED_TEXT = "good1 bad2 good1 . good3 bad0 bad1 never"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_code(run: Path, monkeypatch: pytest.MonkeyPatch, old: str = "", new: str = "") -> dict[str, Any]:
    """Exports a run, runs the code of the card in the folder, with a change, and returns the code's names."""
    export.run(settings(f"checkpoint={run}", "folder=shared", command="export"))
    (code,) = re.findall(r"```python\n(.*?)```", Path("shared/README.md").read_text(), re.DOTALL)
    assert old in code and len(code.splitlines()) <= 20
    names: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.chdir("shared")
        exec(compile(code, "README.md", "exec"), names)
        exec(compile(code.replace(old, new), "README.md", "exec"), names)
    return names


@pytest.mark.parametrize(
    "model",
    [
        [],
        ["model=gru_small", "model.hidden_size=8"],
        ["model=gru_small", "model.hidden_size=8", "model.reset_after=true", "model.layers=1"],
        ["model.embedding_size=6"],
        ["model.tie_embeddings=true"],
        ["model.tie_embeddings=true", "model.embedding_size=6"],
        ["model.lower_sizes=[6]"],
        ["model.residual=true"],
        ["dropout=moon", "dropout.p_c=0.5"],
        ["dropout=variational_untied", "dropout.p_weight=0.5"],
        ["dropout=naive_word"],
    ],
    ids=[
        *("LSTM", "GRU", "GRU of torch", "smaller embedding", "tied", "tied by a projection", "two sizes"),
        *("residual", "moon", "untied", "naive"),
    ],
)
def test_the_code_gives_the_probabilities_of_vdrop_predict(
    model: list[str], text: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = language_model(text, *model)
    names = run_code(run, monkeypatch, "words[:3]", '["<eos>", "w1", "w7"]')
    words, log_probabilities = names["words"], names["log_probabilities"]
    assert capsys.readouterr().out.splitlines()[-1] == words[log_probabilities[-1].argmax()]
    targets = [words.index(word) for word in ("w1", "w7", "<eos>")]
    nll = -log_probabilities[range(3), targets].mean()
    assert predicted(run, "w1 w7", capsys)["ppl"] == pytest.approx(nll.exp().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "chunk_words"),
    [
        ([], "null"),
        (["model=gru_sentiment", "model.hidden_size=8"], "20"),
        (["model.layers=2", "model.lower_sizes=[6]"], "null"),
        (["model.layers=2", "model.residual=true"], "null"),
        (["dropout=moon", "dropout.p_c=0.5"], "null"),
    ],
    ids=["LSTM", "GRU", "two sizes", "residual", "moon"],
)
def test_the_code_gives_the_rating_of_vdrop_predict(
    model: list[str],
    chunk_words: str,
    rated: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = model_of_ratings(rated, *model, f"task.chunk_words={chunk_words}")
    run_code(run, monkeypatch, "A film to remember .", RATED_TEXT)
    rating = float(capsys.readouterr().out.splitlines()[-1])
    assert predicted(run, RATED_TEXT, capsys, "mc_samples=0")["rating"] == pytest.approx(rating, rel=1e-5)


def test_the_numbers_are_those_of_the_weights_each_with_its_command(text: list[str]) -> None:
    run = language_model(text, "schedule.epochs=2")
    for more in ([], ["mc_samples=2", "seed=3"], ["mc_samples=2", "seed=3", "word_dropout=true"]):
        evaluation.run(settings(f"checkpoint={run}", "stored_data=true", *more, command="eval"))
    newest, older = checkpoint.all_in(run)
    measured = measurements(newest, checkpoint.load(newest))
    result = read_result(run)
    by_training = {one.metric: one.value for one in measured if one.command == "vdrop train"}
    assert by_training == {name: value for name, value in result.items() if "ppl" in name}
    assert [one.command for one in measured if one.metric == "test_ppl_mc2"] == [
        "vdrop eval mc_samples=2 seed=3",
        "vdrop eval mc_samples=2 seed=3 word_dropout=true",
    ]
    assert len({(one.metric, one.value) for one in measured}) == len(measured), "none twice"
    page = render(checkpoint.load(newest), measured)
    for one in measured:
        assert f"| `{one.metric}` | {one.value:.4g} |" in page
    assert measurements(older, checkpoint.load(older)) == [], "these are weights of another epoch"
    (evaluated,) = run.glob("eval-*-standard.json")
    evaluated.write_text("{")
    with pytest.raises(ConfigError, match=rf"^{evaluated} is damaged"):
        measurements(newest, checkpoint.load(newest))


def test_measures_of_the_next_word_have_the_setting_that_computes_them(text: list[str]) -> None:
    run = language_model(text)
    evaluation.run(
        settings(f"checkpoint={run}", "stored_data=true", "mc_samples=2", "calibration=true", command="eval")
    )
    (path,) = checkpoint.all_in(run)
    commands = {one.metric: one.command for one in measurements(path, checkpoint.load(path))}
    assert commands["test_ppl_mc2"] == "vdrop eval mc_samples=2 seed=1"
    assert commands["test_ece_mc2"] == "vdrop eval mc_samples=2 seed=1 calibration=true"


def test_an_epoch_that_was_chosen_on_the_test_part_is_not_on_the_card(rated: list[str]) -> None:
    """The paper's protocol exports the last epoch, and reports the best one on test beside it."""
    run = model_of_ratings(rated, "task.protocol=paper", "schedule.epochs=2")
    (path, *_) = checkpoint.all_in(run)
    names = {one.metric for one in measurements(path, checkpoint.load(path))}
    assert "test_rmse_chosen_on_test" in read_result(run) and "test_rmse" in names
    assert not {name for name in names if "chosen_on_test" in name}


def test_numbers_at_another_temperature_scale_or_without_the_average_are_not_on_the_card() -> None:
    own = ["valid_ppl", "test_ppl", "test_ppl_mc4", "test_rmse_of_ridge", "test_coverage_80_mc4"]
    others = ["valid_ppl_raw", "test_ppl_tempered", "test_ppl_mc4_scaled", "test_rmse_chosen_on_test"]
    numbers = dict.fromkeys([*own, *others, "seconds", "temperature", "dropout_factor"], 2.0)
    assert [one.metric for one in to_measurements(numbers, "vdrop eval")] == own


def test_numbers_of_other_weights_are_not_on_the_card(text: list[str]) -> None:
    """A checkpoint that lies elsewhere, or in the folder of another seed."""
    run, other = language_model(text), language_model(text, "seed=2")
    (path,) = checkpoint.all_in(run)
    snapshot = checkpoint.load(path)
    moved, foreign = Path("moved.pt"), other / path.name
    shutil.copy(path, moved)
    shutil.copy(path, foreign)
    for place in (moved, foreign):
        assert measurements(place, snapshot) == []
    assert "No measurement" in render(snapshot, []) and measurements(path, snapshot)
    renamed = Path(shutil.copytree(run, "renamed"), path.name)
    assert measurements(renamed, snapshot) == measurements(path, snapshot), "the folder's name does not count"


def test_the_card_has_settings_and_checksum_but_no_folders_of_the_machine(
    text: list[str], text_folder: Path, tmp_path: Path
) -> None:
    run = language_model(text, f"outputs={tmp_path}/private", f"data.cache={tmp_path}/private/cache")
    snapshot = checkpoint.load(checkpoint.all_in(run)[0])
    shared = replace(snapshot, config=without_places(snapshot.config))
    page = render(shared, [])
    assert str(text_folder) not in page and "private" not in page and "train.txt" in page
    assert snapshot.corpus in page and "p_word 0.25" in page and "seed 1" in page
    train = shared.train
    assert train.identity(shared.corpus) == snapshot.train.identity(snapshot.corpus)
    config = snapshot.config
    here = Path.cwd().name
    names = {"owner/set": "owner/set", "set": "set", "/a/b/c": "c", "/set": "set", "./set": "set"}
    for name, expected in (names | {str(tmp_path): tmp_path.name, ".": here, "../set": "set"}).items():
        assert without_places(config | {"data": {"name": name}})["data"]["name"] == expected
    assert without_places(config | {"data": {"dir": "/home/x"}})["data"]["dir"] is None


def test_an_edited_card_is_recognised(run: Path) -> None:
    snapshot = checkpoint.load(checkpoint.all_in(run)[0])
    vocabulary = ["half \ud800", *snapshot.learned["vocabulary"][1:]]
    for one in (snapshot, replace(snapshot, learned=snapshot.learned | {"vocabulary": vocabulary})):
        page = render(one, []).encode()
        assert is_unedited(page)
        assert not is_unedited(page.replace(b"trained with vdrop", b"trained by me"))
        assert not is_unedited(page + b"more\n")
    assert not is_unedited(b"") and not is_unedited(b"# My model\n")
