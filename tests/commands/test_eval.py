"""`vdrop eval`: what it writes, and that it needs nothing but the checkpoint. The command line of it is in
test_cli.
"""

import hashlib
import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, TINY_SENTIMENT, settings
from tests.test_checkpoint import at_epoch
from vdrop_cli import checkpoint, corpora, files, interruption, runs
from vdrop_cli.commands import eval as evaluation
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.interruption import Interrupted
from vdrop_cli.measured import Measured
from vdrop_cli.model import LanguageModel
from vdrop_cli.partial_evaluation import PartialEvaluation
from vdrop_cli.random_streams import Stream
from vdrop_cli.settings.fields import plain
from vdrop_cli.sharing.card import measurements
from vdrop_cli.tasks import LanguageModelling
from vdrop_cli.tasks.sentiment import RatingPasses


def train_model(text: list[str]) -> Path:
    """The folder of a run on this text."""
    train.run(settings(*TINY, *text, "dropout=variational_untied", "model=gru_small", "model.hidden_size=8"))
    return next(Path().rglob("result.json")).parent


@pytest.fixture
def folder(text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return train_model(text)


def run(folder: Path, *overrides: str) -> None:
    stored = (
        []
        if any(override.startswith(("data.", "stored_data", "file=")) for override in overrides)
        else ["stored_data=true"]
    )
    evaluation.run(settings(f"checkpoint={folder}", "device=cpu", *stored, *overrides, command="eval"))


def test_passes_with_masks_on_weights_are_read_one_by_one(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger batch is refused before anything is read; without one, passes differ."""
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text, "dropout.p_weight=0.5", "model.lower_sizes=[7]"))
    folder = next(Path().rglob("result.json")).parent
    for more in ([], ["calibration=true"]):
        with pytest.raises(
            ConfigError, match=r"^mc_batch must be 1 or null with dropout\.p_weight=0\.5, got 3"
        ):
            run(folder, "mc_samples=4", "mc_batch=3", *more)
    assert not list(folder.glob("eval-*.json"))
    run(folder, "mc_samples=4")
    (path,) = folder.glob("eval-*.json")
    table = json.loads(path.read_text())["mc"]
    assert table[0]["samples"] == 1 and table[0]["deviation"] > 0


@pytest.mark.native
def test_reloading_gives_the_same_numbers(folder: Path) -> None:
    run(folder)
    result = json.loads((folder / "eval-0001-standard.json").read_text())
    trained = json.loads((folder / "result.json").read_text())
    assert result["metrics"] == {
        name: trained[name] for name in ("valid_ppl", "valid_ppl_batched", "test_ppl")
    }
    assert result["environment"]["backend"] == "native" and result["epoch"] == 1


def test_a_checkpoint_of_another_run_is_passed_over_in_a_run_folder(
    folder: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest one; where the best epoch is reported and its file is of another run, that is an error."""
    train.run(settings(*TINY, *text, "seed=7", "schedule.epochs=2"))
    train.run(settings(*TINY, *text, "seed=8", "schedule.epochs=2"))
    run, other = (next(Path().glob(f"outputs/train/*/*-s{seed}")) for seed in (7, 8))
    shutil.copy(other / "checkpoint-0002.pt", run / "checkpoint-0002.pt")
    assert checkpoint.find(str(run)) == run / "checkpoint-0001.pt"
    message = capsys.readouterr().err
    assert f"its settings are not those of {run / 'config.yaml'}, so it is of another run" in message
    assert f"vdrop: {run / 'checkpoint-0001.pt'} is used instead" in message
    for seed in (7, 8):
        train.run(settings(*TINY, *text, f"seed={seed}", "schedule.epochs=2", "schedule.patience=5"))
    run, other = (
        path.parent
        for seed in (7, 8)
        for path in Path().glob(f"outputs/train/*/*-s{seed}/checkpoint-0002.pt")
        if checkpoint.load(path).train.schedule.patience
    )
    checkpoint.save(replace(checkpoint.load(run / "checkpoint-0002.pt"), best_epoch=1), run)
    assert checkpoint.find(str(run)) == run / "checkpoint-0001.pt"
    shutil.copy(other / "checkpoint-0001.pt", run / "checkpoint-0001.pt")
    with pytest.raises(
        ConfigError, match=r"checkpoint-0001.pt cannot be used: its settings are not those of"
    ):
        checkpoint.find(str(run))


def test_a_checkpoint_that_is_replaced_before_the_folder_is_locked_is_not_evaluated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results would be filed under the run that replaced it."""
    describe = evaluation.describe

    def replace_run(*arguments: Any) -> Any:
        content = (folder / "checkpoint-0001.pt").read_bytes()
        files.replace(folder / "checkpoint-0001.pt", content)
        return describe(*arguments)

    monkeypatch.setattr(evaluation, "describe", replace_run)
    with pytest.raises(ConfigError, match=r"checkpoint-0001\.pt was removed or replaced meanwhile"):
        run(folder)
    assert not list(folder.glob("eval-*.json"))
    monkeypatch.setattr(evaluation, "describe", describe)
    run(folder)
    assert list(folder.glob("eval-*.json"))


def test_precision_is_that_of_the_training_unless_it_is_set(folder: Path) -> None:
    results = {}
    for precision, name in (("null", "standard"), ("fp32", "standard"), ("bf16", "standard-bf16")):
        run(folder, f"precision={precision}")
        results[precision] = json.loads((folder / f"eval-0001-{name}.json").read_text())
    assert [t["environment"]["precision"] for t in results.values()] == ["fp32", "fp32", "bf16"]
    assert results["null"]["metrics"] == results["fp32"]["metrics"] != results["bf16"]["metrics"]
    assert results["bf16"]["metrics"]["test_ppl"] == pytest.approx(
        results["fp32"]["metrics"]["test_ppl"], rel=1e-2
    )


def test_mc_by_number_of_samples_with_its_spread(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "mc_samples=5")
    result = json.loads((folder / "eval-0001-mc5-s1.json").read_text())
    assert [row["samples"] for row in result["mc"]] == [1, 2, 5]
    assert result["metrics"]["test_ppl_mc5"] == result["mc"][-1]["ppl"] and result["mc"][0]["deviation"] > 0
    assert "MC samples" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^interval is for ratings, .* is a language model"):
        run(folder, "interval=conformal")


def test_every_setting_of_it_changes_something(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed and word dropout the numbers, the batching of passes how they run, the back end what is written of
    it.
    """
    run(folder, "mc_samples=4")
    base = json.loads((folder / "eval-0001-mc4-s1.json").read_text())
    run(folder, "mc_samples=4", "seed=2")
    run(folder, "mc_samples=4", "word_dropout=true")
    other_seed, words = (
        json.loads((folder / f"eval-0001-mc4-{name}.json").read_text()) for name in ("s2", "word-s1")
    )
    for other in (other_seed, words):
        assert other["metrics"]["test_ppl_mc4"] != base["metrics"]["test_ppl_mc4"]
        assert other["metrics"]["test_ppl"] == base["metrics"]["test_ppl"]
    batches: list[int] = []
    zero_state = LanguageModel.zero_state
    monkeypatch.setattr(
        LanguageModel, "zero_state", lambda model, batch: batches.append(batch) or zero_state(model, batch)
    )
    run(folder, "mc_samples=4", "mc_batch=3", "backend=reference")
    assert batches.count(3) == 1 and batches[-2:] == [1, 0], "three passes, the fourth, and no more"
    again = json.loads((folder / "eval-0001-mc4-s1.json").read_text())
    assert again["metrics"] == pytest.approx(base["metrics"], rel=1e-5)
    assert again["environment"]["backend"] == "reference"


def test_word_dropout_is_of_models_that_were_trained_with_it(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text, "dropout=zaremba"))
    folder = next(Path().rglob("result.json")).parent
    with pytest.raises(
        ConfigError, match=r"^word_dropout must be false or null, .* was trained without it, got true"
    ):
        run(folder, "mc_samples=2", "word_dropout=true")
    run(folder, "mc_samples=2", "word_dropout=false")
    assert (folder / "eval-0001-mc2-s1.json").exists()


@pytest.mark.parametrize(
    ("dropout", "kinds"), [(["dropout.p_word=0"], "nothing"), ([], "words alone, which these passes keep")]
)
def test_passes_that_are_all_the_same_are_reported(
    dropout: list[str],
    kinds: str,
    text: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text, "dropout.p_x=0", "dropout.p_h=0", "dropout.p_out=0", *dropout))
    folder = next(Path().rglob("result.json")).parent
    run(folder, "mc_samples=2")
    said = f"checkpoint-0001.pt drops {kinds}; mc_samples=0 is enough"
    assert said in capsys.readouterr().err
    metrics = json.loads((folder / "eval-0001-mc2-s1.json").read_text())["metrics"]
    assert metrics["test_ppl_mc2"] == pytest.approx(metrics["test_ppl"], rel=1e-5)


def test_members_are_averaged_and_named(
    folder: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(settings(*TINY, *text, "dropout=none", "model=lstm_small", "model.hidden_size=16"))
    other = next(path.parent for path in Path().rglob("result.json") if path.parent != folder)
    run(folder, f"members=[{other}]")
    (written,) = folder.glob("eval-0001-ensemble2-*.json")
    result = json.loads(written.read_text())
    assert result["members"] == [str(where / "checkpoint-0001.pt") for where in (folder, other)]
    assert result["checksums"] == [files.checksum(where / "checkpoint-0001.pt") for where in (folder, other)]
    alone = [json.loads((where / "result.json").read_text())["test_ppl"] for where in (folder, other)]
    assert 1 < result["metrics"]["test_ppl"] < (alone[0] * alone[1]) ** 0.5, "Jensen"
    assert all(result["metrics"]["test_ppl"] != pytest.approx(one, rel=1e-4) for one in alone)
    assert result["metrics"].keys() == {"valid_ppl", "test_ppl"}
    epochs = [f"{where}/checkpoint-0001.pt: epoch 1\n" for where in (folder, other)]
    said = capsys.readouterr().err
    assert all(epoch in said for epoch in epochs) and "is not finished" not in said
    (other / "result.json").rename(other / "moved.json")
    run(folder, f"members=[{other}]")
    assert f"vdrop: {other} is not finished, so this average is of an epoch" in capsys.readouterr().err
    (other / "moved.json").rename(other / "result.json")
    with pytest.raises(ConfigError, match="got one twice"):
        run(folder, f"members=[{folder}]")
    with pytest.raises(ConfigError, match=r"^members must be empty with mc_samples, \S+ is a language model"):
        run(folder, f"members=[{other}]", "mc_samples=3")


def test_other_members_are_another_result(folder: Path, text: list[str]) -> None:
    others = []
    for seed in (2, 3):
        train.run(settings(*TINY, *text, f"seed={seed}"))
        others.append(next(Path().rglob(f"*-s{seed}")))
        run(folder, f"members=[{others[-1]}]")
    run(folder, f"members=[{others[0]}]")
    assert len(list(folder.glob("eval-0001-ensemble2-*.json"))) == 2
    next(others[0].glob("checkpoint-*.pt")).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="holds no checkpoint that can be used"):
        run(folder, f"members=[{others[0]}]")
    with pytest.raises(ConfigError, match="is damaged or not a checkpoint"):
        run(folder, f"members=[{others[0]}/checkpoint-0001.pt]")


def test_what_a_checkpoint_says_of_files_and_folders_is_used_only_where_that_is_allowed(
    folder: Path, text: list[str], tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"data\.train='\S+', .*give data\.train=… data\.valid=… data\.test=…, or stored_data=true",
    ):
        run(folder, "stored_data=false")
    with pytest.raises(ConfigError, match=r"give data\.test=…, or"):
        run(folder, *text[1:3])
    run(folder, *text[1:])
    assert (folder / "eval-0001-standard.json").exists()
    path = checkpoint.find(str(folder))
    original = checkpoint.load(path)
    config = original.config | {"data": original.config["data"] | {"cache": "chosen", "train": "a\x1b[31mb"}}
    files.write_tensors(path, {"format": checkpoint.FORMAT, **vars(replace(original, config=config))})
    with pytest.raises(ConfigError) as refused:
        run(folder, "stored_data=false")
    assert str(refused.value).isprintable() and r"\x1b" in str(refused.value)
    run(folder, *text[1:])
    assert not Path("chosen").exists() and Path("data/cache").exists()


def test_what_does_not_fit_or_overflows_is_one_line_and_writes_nothing(folder: Path) -> None:
    path = checkpoint.find(str(folder))
    original = checkpoint.load(path)
    larger = original.config | {"model": original.config["model"] | {"hidden_size": 10**9}}
    deeper = original.config | {"model": original.config["model"] | {"layers": 10**12}}
    renamed = {f"{name}_": weight for name, weight in original.model.items()}
    for change in ({"model": renamed}, {"config": larger}, {"config": deeper}):
        files.write_tensors(path, {"format": checkpoint.FORMAT, **vars(replace(original, **change))})
        with pytest.raises(ConfigError, match=r"checkpoint-0001\.pt cannot be used: "):
            run(path)
    bias_V = original.model["head_bias"]
    huge = original.model | {"head_bias": torch.where(torch.arange(len(bias_V)) % 2 == 0, 3e38, -3e38)}
    files.write_tensors(path, {"format": checkpoint.FORMAT, **vars(replace(original, model=huge))})
    with pytest.raises(RunError, match="are not those of a model that works"):
        run(folder)
    assert not list(folder.glob("eval-*.json"))


def test_members_must_know_the_same_words(folder: Path, text: list[str]) -> None:
    train.run(settings(*TINY, *text, "data.min_count=17"))
    other = next(path.parent for path in Path().rglob("result.json") if path.parent != folder)
    with pytest.raises(ConfigError, match="average models of the same words"):
        run(folder, f"members=[{other}]")


def test_the_corpus_may_lie_elsewhere_now(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that was trained on Penn Treebank in a folder that is gone; the evaluation itself is not
    the matter here.
    """
    monkeypatch.chdir(tmp_path)
    config = settings("model=lstm_small", "model.hidden_size=2", "data.dir=gone", "data.cache=null")
    fingerprint = corpora.load_text(replace(config.data, dir=str(real_data / "ptb"))).fingerprint
    model = LanguageModel(config.model, config.dropout.to_policy(), 10_000)
    model.initialise(0.1, Stream((1,)))
    trained_checkpoint = replace(
        at_epoch(1), config=plain(config), corpus=fingerprint, model=dict(model.state_dict())
    )
    checkpoint.save(trained_checkpoint, tmp_path)

    def count(task: LanguageModelling, model: LanguageModel) -> Measured:
        return Measured({"test_ppl": float(len(task.streams["test"]))}, {})

    monkeypatch.setattr(LanguageModelling, "evaluate", count)
    with pytest.raises(ConfigError, match=r"data\.dir='gone'.* give data\.dir=…, or stored_data=true"):
        run(tmp_path, "stored_data=false")
    with pytest.raises(ConfigError, match=r"data\.dir=gone has no ptb\.train\.txt"):
        run(tmp_path)
    run(tmp_path, f"data.dir={real_data}/ptb")
    assert "82430.00" in capsys.readouterr().out


def test_conformal_intervals_take_a_validation_part(
    rated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY_SENTIMENT, *rated, "task.protocol=paper"))
    (folder,) = (path.parent for path in Path().rglob("result.json"))
    with pytest.raises(ConfigError, match=r"^interval must be gaussian, .*; train with task\.protocol=clean"):
        run(folder, "interval=conformal")
    capsys.readouterr()
    run(folder, "interval=quantile")
    assert "no validation part that training has not seen" in capsys.readouterr().err
    assert "conformal_scores" not in json.loads((folder / "eval-0001-standard.json").read_text())


def test_a_model_of_ratings_is_evaluated_by_the_same_command(
    rated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard, as an ensemble, and by passes, which are stopped and resume to the same numbers; the text
    has moved by then.
    """
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        train.run(settings(*TINY_SENTIMENT, *rated, "task.protocol=clean", f"seed={seed}"))
    first, second = sorted(path.parent for path in Path().rglob("result.json"))
    moved = tmp_path / "moved.csv"
    moved.write_bytes(Path(rated[1].removeprefix("data.csv=")).read_bytes())

    def result_named(name: str) -> dict[str, Any]:
        return dict(json.loads((first / f"eval-0001-{name}.json").read_text()))

    run(first, f"data.csv={moved}")
    trained = json.loads((first / "result.json").read_text())
    assert (
        result_named("standard")["metrics"]
        == {name: trained[name] for name in result_named("standard")["metrics"]}
        and trained["test_rmse"] > 0
    )
    assert "quantile" in capsys.readouterr().out
    run(first, f"data.csv={moved}", "interval=conformal", f"picture={tmp_path}/ratings.svg")
    assert (tmp_path / "ratings.svg").stat().st_size > 10_000
    shown = capsys.readouterr()
    assert "quantile" not in shown.out and "conformal intervals of 95 % need 19" in shown.err
    standard = result_named("standard")
    assert len(standard["conformal_scores"]) == 6, "one for each validation text"
    assert "quantile" in standard["tables"]["calibration"][0]
    run(first, f"members=[{second}]")
    ensemble = next(first.glob("eval-0001-ensemble2-*.json"))
    averaged = json.loads(ensemble.read_text())["metrics"]
    trained_alone = result_named("standard")["metrics"]
    beside = {name: value for name, value in trained.items() if name.startswith("test_rmse_of_")}
    assert beside and averaged == averaged | beside
    assert set(averaged) - {"test_aurc"} == set(trained_alone) - {"train_rmse"}, "the spread gives one more"
    run(first, f"members=[{second}]", "mc_samples=3")
    pooled = next(first.glob("eval-0001-ensemble2-*-mc3-s1.json"))
    results = json.loads(pooled.read_text())
    assert pooled.name == f"{ensemble.stem}-mc3-s1.json"
    assert results["members"] == [str(where / "checkpoint-0001.pt") for where in (first, second)]
    assert results["metrics"] == results["metrics"] | {
        name: value for name, value in averaged.items() if name != "noise"
    }, "dropout off, as without passes"
    assert [row["samples"] for row in results["mc"]] == [1, 2, 5, 6], "of all members"
    assert len(results["conformal_scores"]) == 6 and results["metrics"]["noise_mc3"] > 0
    assert results["metrics"]["test_rmse_mc3"] == results["mc"][-1]["rmse"]
    train.run(settings(*TINY_SENTIMENT, *rated, "task.protocol=clean", "task.split_seed=1"))
    other = next(path.parent for path in Path().rglob("result.json") if path.parent not in (first, second))
    with pytest.raises(ConfigError, match=r"was trained on another corpus than .*, or another split of it"):
        run(first, f"members=[{other}]")
    run(first, "mc_samples=6", "word_dropout=false")
    run(first, "mc_samples=6")
    whole = result_named("mc6-s1")
    assert (
        whole["word_dropout"] is True
        and whole["metrics"]["test_rmse_mc6"] != result_named("mc6-no_word-s1")["metrics"]["test_rmse_mc6"]
    )
    assert {"test_rmse", "test_log_likelihood_mc6", "test_coverage_80_mc6", "noise_mc6"} <= set(
        whole["metrics"]
    )
    (first / "eval-0001-mc6-s1.json").unlink()
    with monkeypatch.context() as patch:
        counts = iter([False, False, True])
        patch.setattr(interruption, "received", [])
        passes_run = RatingPasses.run

        def stopping(passes: RatingPasses) -> Any:
            for words in passes_run(passes):
                if next(counts, False):
                    interruption.received.append(signal.SIGTERM)
                yield words

        patch.setattr(RatingPasses, "run", stopping)
        with pytest.raises(Interrupted, match=r"saved after [\d,]+ of [\d,]+ words of MC passes"):
            run(first, "mc_samples=6")
    run(first, "mc_samples=6")
    assert result_named("mc6-s1")["metrics"] == whole["metrics"] and not list(first.glob("*.partial"))


def test_calibration_is_measured_with_and_without_passes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that an evaluation without it has is there, too; the numbers of the passes agree but for
    rounding.
    """

    def result_of(*overrides: str) -> dict[str, Any]:
        for path in folder.glob("eval-*"):
            path.unlink()
        run(folder, *overrides)
        (path,) = folder.glob("eval-*.json")
        return dict(json.loads(path.read_text()))

    added = {"test_entropy", "test_accuracy", "test_ece"}
    without, standard = result_of(), result_of("calibration=true")
    assert set(standard["metrics"]) - set(without["metrics"]) == added
    assert standard["metrics"] == standard["metrics"] | without["metrics"]
    assert list(standard["tables"]) == ["reliability", "positions", "frequencies"] and "tables" not in without
    without, both = result_of("mc_samples=5"), result_of("mc_samples=5", "calibration=true", "mc_batch=2")
    averaged = {f"{name}_mc5" for name in (*added, "test_mutual_information")}
    assert set(both["metrics"]) - set(without["metrics"]) == added | averaged
    assert {name: both["metrics"][name] for name in without["metrics"]} == pytest.approx(
        without["metrics"], rel=1e-5
    )
    assert {name: both["metrics"][name] for name in added} == {
        name: standard["metrics"][name] for name in added
    }
    assert list(both["tables"]) == [*standard["tables"], *(f"{name}_mc" for name in standard["tables"])]
    assert [row["samples"] for row in both["mc"]] == [1, 2, 5]
    tokens = {sum(row["tokens"] for row in rows) for rows in both["tables"].values()}
    assert len(tokens) == 1, "every table is of the whole text"
    printed = capsys.readouterr().out
    assert "test_mutual_information_mc5" in printed and "position in the sentence, MC samples" in printed


def test_an_evaluation_without_calibration_leaves_that_of_an_earlier_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If its other numbers are the same; if they are not, it says that they are gone."""
    for samples in ([], ["mc_samples=3"]):
        run(folder, *samples, "calibration=true")
        (path,) = folder.glob("eval-*.json")
        measured = json.loads(path.read_text())
        run(folder, *samples)
        again = json.loads(path.read_text())
        assert again["metrics"] == pytest.approx(measured["metrics"], rel=1e-5)
        assert again["tables"] == measured["tables"]
        measured["metrics"]["test_ppl"] *= 1.01
        path.write_text(json.dumps(measured))
        assert "calibration" not in capsys.readouterr().err
        run(folder, *samples)
        again = json.loads(path.read_text())
        assert "test_ece" not in again["metrics"] and "tables" not in again
        assert "is of other numbers and was removed; calibration=true measures" in capsys.readouterr().err
        path.unlink()


def test_calibration_that_is_stopped_resumes_to_the_same_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And never from passes without it."""
    run(folder, "mc_samples=4", "calibration=true")
    (path,) = folder.glob("eval-*.json")
    whole = json.loads(path.read_text())
    path.unlink()
    for first, second, message in (
        ("true", "true", "resuming after"),
        ("true", "false", "starting over"),
        ("false", "true", "starting over"),
    ):
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="words of MC passes"):
            patch.setattr(interruption, "received", [])
            patch.setattr(PartialEvaluation, "tick", lambda _: interruption.received.append(signal.SIGTERM))
            run(folder, "mc_samples=4", f"calibration={first}")
        run(folder, "mc_samples=4", f"calibration={second}")
        assert message in capsys.readouterr().err
        if second == "true":
            again = json.loads(path.read_text())
            assert again["metrics"] == whole["metrics"] and again["tables"] == whole["tables"]


def test_calibration_is_of_one_language_model(
    rated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY_SENTIMENT, *rated))
    folder = next(Path().rglob("result.json")).parent
    with pytest.raises(ConfigError, match=r"^calibration is for language models, .*; leave it out"):
        run(folder, "calibration=true")
    with pytest.raises(ConfigError, match=r"^members must be empty with calibration"):
        run(folder, "calibration=true", "members=[a]")
    with pytest.raises(ConfigError, match=r"^tempered is for language models, .*; leave it out"):
        run(folder, "tempered=true")
    with pytest.raises(ConfigError, match=r"^dropout_factors are for language models, .*; leave them out"):
        run(folder, "dropout_factors=[1]", "mc_samples=2")


def test_a_temperature_is_chosen_on_validation_and_its_result_stands_beside_the_plain_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder)
    plain = (folder / "eval-0001-standard.json").read_bytes()
    capsys.readouterr()
    run(folder, "tempered=true")
    assert "chosen on validation" in capsys.readouterr().out
    tempered = json.loads((folder / "eval-0001-tempered.json").read_text())["metrics"]
    assert set(tempered) == {"temperature", "valid_ppl_tempered", "test_ppl_tempered"}
    assert tempered["valid_ppl_tempered"] < json.loads(plain)["metrics"]["valid_ppl"]
    assert (folder / "eval-0001-standard.json").read_bytes() == plain
    for other in ("mc_samples=3", "members=[a]", "calibration=true", "picture=a.png"):
        with pytest.raises(
            ConfigError, match=rf"^tempered must be false with {other.partition('=')[0]}, got"
        ):
            run(folder, "tempered=true", other)


def test_a_factor_on_dropout_is_chosen_on_validation_and_its_result_stands_beside_the_plain_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, "mc_samples=4")
    plain = (folder / "eval-0001-mc4-s1.json").read_bytes()
    capsys.readouterr()
    run(folder, "mc_samples=4", "dropout_factors=[0.5,1]")
    assert "by the factor on dropout probabilities" in capsys.readouterr().out
    results = json.loads((folder / "eval-0001-mc4-s1-scaled_0.5_1.json").read_text())
    assert results["metrics"]["dropout_factor"] in (0.5, 1) and "test_ppl_mc4" not in results["metrics"]
    assert [row["factor"] for row in results["tables"]["factors"]] == [0.5, 1]
    assert (folder / "eval-0001-mc4-s1.json").read_bytes() == plain
    for others, message in (
        (["mc_samples=0"], "dropout_factors must be empty without mc_samples"),
        (["mc_samples=4", "calibration=true"], "dropout_factors must be empty with calibration"),
        (["mc_samples=4", "dropout_factors=[1,1]"], "dropout_factors must be factors that differ"),
        (["mc_samples=4", "dropout_factors=[0]"], "dropout_factors must be above 0, and finite, got 0.0"),
        (["mc_samples=4", "dropout_factors=[9]"], r"dropout_factors: p_x must be in \[0, 1\), got 2.25"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            run(folder, "dropout_factors=[0.5,1]", *others)


def result_of(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


def test_another_text_is_read_as_the_test_part_is(
    folder: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The test part itself, from another file, has the numbers of the test part. Another text has its own, in
    a file of its own and under other names. No corpus is read.
    """
    test = Path(next(one for one in text if one.startswith("data.test=")).partition("=")[2])
    how = ["mc_samples=4", "calibration=true"]
    run(folder, *how)
    own = result_of(folder, "eval-0001-mc4-s1")
    run(folder, *how, f"file={test}")
    digest = hashlib.sha256(test.read_bytes()).hexdigest()
    same = result_of(folder, f"eval-0001-mc4-s1-file_{digest[:8]}")
    assert same["metrics"] == {
        name.replace("test_", "file_"): value
        for name, value in own["metrics"].items()
        if not name.startswith("valid_")
    }
    tables = {name: rows for name, rows in own["tables"].items() if not name.startswith("frequencies")}
    assert same["tables"] == tables and same["mc"] == own["mc"]
    corpus = corpora.load_text(checkpoint.load(checkpoint.find(str(folder))).train.data)
    assert same["file"] == {
        "path": str(test),
        "sha256": digest,
        "tokens": len(corpus.test_N),
        "unknown_share": pytest.approx(corpora.unknown_share(corpus.test_N, corpus)),
    }
    copy = Path("copy.txt")
    copy.write_bytes(b"\xef\xbb\xbf" + test.read_text().replace("\n", "\r\n").encode())
    run(folder, f"file={copy}")
    (standard,) = (path for path in folder.glob("eval-0001-standard-file_*.json"))
    assert result_of(folder, standard.stem)["metrics"] == {"file_ppl": own["metrics"]["test_ppl"]}
    other = Path("other.txt")
    other.write_text("w1 unheard-of W2\n\nw3")
    capsys.readouterr()
    run(folder, f"file={other}", *how, "picture=passes.svg")
    output = capsys.readouterr()
    assert "file=other.txt: 7 tokens, 28.6 % of them <unk>" in output.err
    assert "file=other.txt that the model knows in lower case only: 1; they are read as <unk>" in output.err
    assert "file_ppl" in output.out and re.search(r"\btest(_|\b)", output.out) is None
    assert "the file's tokens by their position" in output.out
    assert "the file's perplexity" in Path("passes.svg").read_text()
    name = f"eval-0001-mc4-s1-file_{hashlib.sha256(other.read_bytes()).hexdigest()[:8]}"
    results = result_of(folder, name)
    assert results["metrics"]["file_ppl_mc4"] != same["metrics"]["file_ppl_mc4"]
    assert len(results["warnings"]) == 2, "no word of training is <unk>"
    assert result_of(folder, "eval-0001-mc4-s1") == own, "untouched"
    run(folder, f"file={other}", "mc_samples=4")
    assert result_of(folder, name)["tables"] == results["tables"]


def test_results_of_another_text_are_none_of_the_run(folder: Path, text: list[str]) -> None:
    """Neither a table, a record nor a comparison takes them for those of the test part."""
    Path("other.txt").write_text("w1 w2 w3\n" * 9)
    run(folder, "mc_samples=4", "file=other.txt")
    assert runs.read(folder).evaluations == [] and runs.read(folder).passes == set()
    run(folder, "mc_samples=4")
    finished = runs.read(folder)
    assert finished.passes == {4} and [path.name for path in finished.evaluations] == [
        "eval-0001-mc4-s1.json"
    ]
    counted = runs.evaluation_of(finished, Evaluation(samples=4))
    assert counted is not None and "test_ppl_mc4" in counted["metrics"]
    path = checkpoint.find(str(folder))
    card = measurements(path, checkpoint.load(path))
    assert {one.metric for one in card} >= {"test_ppl", "test_ppl_mc4"}
    assert not any(one.metric.startswith("file_") for one in card)


def test_passes_over_another_text_resume(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And another text of the same name has a result of its own."""
    Path("other.txt").write_text("w1 w2 w3\n" * 60)
    how = ["mc_samples=6", "mc_batch=2", "file=other.txt"]
    run(folder, *how)
    (path,) = folder.glob("eval-*-file_*.json")
    whole = json.loads(path.read_text())["metrics"]
    path.unlink()
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="words of MC passes"):
        patch.setattr(interruption, "received", [])
        patch.setattr(PartialEvaluation, "tick", lambda _: interruption.received.append(signal.SIGTERM))
        run(folder, *how)
    assert len(list(folder.glob("eval-*-file_*.partial"))) == 1
    capsys.readouterr()
    run(folder, *how)
    assert "resuming after" in capsys.readouterr().err
    assert json.loads(path.read_text())["metrics"] == whole
    Path("other.txt").write_text("w3 w2 w1\n" * 60)
    run(folder, *how)
    assert len(list(folder.glob("eval-*-file_*.json"))) == 2


def test_members_read_another_text_together(folder: Path, text: list[str]) -> None:
    Path("other.txt").write_text("w1 w2 w3\n" * 50)
    before = set(Path().rglob("result.json"))
    train.run(settings(*TINY, *text, "dropout=variational", "seed=2"))
    (member,) = (path.parent for path in set(Path().rglob("result.json")) - before)
    run(folder, f"members=[{member}]", "file=other.txt")
    (ensemble,) = folder.glob("eval-0001-ensemble2-*-file_*.json")
    together = json.loads(ensemble.read_text())["metrics"]
    alone = []
    for one in (folder, member):
        run(one, "file=other.txt")
        (path,) = one.glob("eval-0001-standard-file_*.json")
        alone.append(json.loads(path.read_text())["metrics"]["file_ppl"])
    assert together.keys() == {"file_ppl"} and min(alone) * 0.9 < together["file_ppl"] < max(alone)
    assert all(together["file_ppl"] != pytest.approx(one, rel=1e-4) for one in alone)


def test_a_text_that_cannot_be_evaluated_is_one_line(folder: Path, text: list[str], rated: list[str]) -> None:
    Path("short.txt").write_text("w1")
    Path("blank.txt").write_text("\n\n")
    Path("binary.txt").write_bytes(b"\xff\x00")
    for name, message in (
        ("nowhere.txt", r"^file=nowhere\.txt cannot be read \(No such file"),
        ("blank.txt", r"^file=blank\.txt is empty; it needs words"),
        ("binary.txt", r"^file=binary\.txt is not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(folder, f"file={name}")
    assert not list(folder.glob("eval-*"))
    run(folder, "file=short.txt")  # the word and the end of its line
    for more, message in (
        ("tempered=true", r"^tempered must be false with file"),
        ("dropout_factors=[1]", r"^dropout_factors must be empty with file"),
        ("stored_data=true", r"^stored_data must be false with file, which needs no corpus"),
        (text[-1], r"^data\.\w+ must be null with file, which needs no corpus"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(folder, "file=short.txt", "mc_samples=2" if "factors" in more else "mc_samples=0", more)
    train.run(settings(*TINY_SENTIMENT, *rated))
    critic = next(path.parent for path in Path().rglob("sentiment-*/*/result.json"))
    with pytest.raises(ConfigError, match=r"^file is for language models, .* is a model of ratings"):
        run(critic, "file=short.txt")


def test_a_picture_is_drawn_of_the_results(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^picture of a language model needs mc_samples=…, calibration"):
        run(folder, "picture=a.svg")
    run(folder, "picture=a.svg", "mc_samples=3", "calibration=true")
    drawn = Path("a.svg").read_text()
    assert "standard approximation" in drawn and "share of tokens" in drawn
