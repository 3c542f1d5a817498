"""`vdrop train`: resuming, force, divergence, what is written; the loop is in tests/test_training.py."""

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
from tests.test_training import start
from vdrop_cli import checkpoint, corpora, files, interruption, runs, training
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.interruption import Interrupted
from vdrop_cli.learning_rate import LearningRate
from vdrop_cli.lock import Lock
from vdrop_cli.ownership import LOCK
from vdrop_cli.sinks import Step, read_log
from vdrop_cli.tasks import LanguageModelling
from vdrop_cli.training import Run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_an_interrupted_run_resumes_and_its_log_holds_every_step_once(
    text: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(*TINY, *text, "schedule.epochs=3", "log_every=1")

    class Interruption(training.Progress):
        """Who sends a signal in the middle of the third epoch, to a process that listens."""

        def __call__(self, record: Any) -> None:
            if isinstance(record, Step) and record.epoch == 3 and record.step % 5 == 0:
                signal.raise_signal(signal.SIGTERM)

    with (
        monkeypatch.context() as patch,
        pytest.raises(Interrupted, match=r"saved after (step \d+ of epoch 3) in") as stopped,
    ):
        patch.setattr(training, "Progress", Interruption)
        with interruption.listening():
            train.run(config)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    monkeypatch.setattr(interruption, "received", [])
    capsys.readouterr()
    assert train.run(config) == "resumed"
    (place,) = re.findall(r"step \d+ of epoch 3", str(stopped.value))
    assert f"resuming after {place}\n" in capsys.readouterr().err, "as it was said when it was saved"
    log = read_log(next(Path().rglob("log.jsonl")))
    steps = [record["step"] for record in log if record["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert [record["epoch"] for record in log if record["kind"] == "epoch"] == [1, 2, 3]
    starts = [record for record in log if record["kind"] == "start"]
    assert [record["epoch"] for record in starts] == [0, 2]
    assert starts[1]["step"] % 5 == 0 and 2 * len(steps) // 3 < starts[1]["step"] < len(steps), (
        "in the middle of an epoch"
    )
    assert log[-1]["kind"] == "result"


def test_force_starts_over(text: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    train.run(settings(*TINY, *text))
    folder = next(Path().rglob("result.json")).parent
    changed = json.loads((folder / "result.json").read_text()) | {"test_ppl": 1.0}
    (folder / "result.json").write_text(json.dumps(changed))
    train.run(settings(*TINY, *text))
    assert json.loads((folder / "result.json").read_text()) == changed, "finished is finished"
    train.run(settings(*TINY, *text, "force=true"))
    assert json.loads((folder / "result.json").read_text())["test_ppl"] > 2
    assert [record["epoch"] for record in read_log(folder / "log.jsonl") if record["kind"] == "start"] == [0]


def test_an_unfinished_run_on_another_back_end_is_named_where_a_new_one_begins(
    text: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`auto` may be another one in another shell, and then it is another run."""
    config = settings(*TINY, *text, "backend=reference")
    train.run(config)
    (folder,) = (path.parent for path in Path().rglob("result.json"))
    said = f"vdrop: {folder} is this run with backend=reference, not finished; backend=reference resumes it"

    def train_fused(*more: str) -> str:
        """What a new run on another back end prints."""
        capsys.readouterr()
        train.run(settings(*TINY, *text, "backend=fused", *more))
        for path in list(Path().rglob("config.yaml")):
            if path.parent != folder:
                shutil.rmtree(path.parent)
        return capsys.readouterr().err

    assert said not in train_fused(), "it is finished"
    (folder / "result.json").unlink()
    assert said in train_fused()
    assert said not in train_fused("seed=2") and said not in train_fused("dropout=none"), "other settings"
    assert said not in train_fused("force=true")
    with Lock(folder / LOCK, "it"):
        assert said not in train_fused(), "it is trained now"
    (folder / LOCK).touch()
    assert said in train_fused(), "its process was killed"


def test_tags_of_a_finished_run_stay_and_that_is_said(
    text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(settings(*TINY, *text, "tags=[one]"))
    for tags, message in (
        ("tags=[one]", ""),
        ("tags=[]", ""),
        ("tags=[one,two]", "vdrop: tags=[one,two] is not applied: the run has tags=[one]\n"),
        ("run_name=mine", "vdrop: run_name=mine is not applied: the run has no run_name\n"),
    ):
        capsys.readouterr()
        assert train.run(settings(*TINY, *text, tags)) == "skipped"
        printed = capsys.readouterr().err
        assert ("is not applied" in printed) == bool(message) and printed.endswith(message)
    folder = next(Path().rglob("result.json")).parent
    assert runs.read(folder).train.tags == ["one"]
    (folder / "log.jsonl").unlink()
    (folder / "config.yaml").write_text("damaged: {")
    assert train.run(settings(*TINY, *text, "tags=[other]")) == "skipped", "the result is enough"


def test_a_run_that_is_evaluated_is_not_started_over(text: list[str]) -> None:
    train.run(settings(*TINY, *text))
    folder = next(Path().rglob("result.json")).parent
    before = sorted(folder.iterdir())
    with (
        Lock(folder / "eval-0001-standard.lock", "it"),
        pytest.raises(ConfigError, match=r"eval-0001-standard\.json is in use by process"),
    ):
        train.run(settings(*TINY, *text, "force=true"))
    assert sorted(folder.iterdir()) == before


def test_force_has_had_its_effect_when_the_earlier_run_is_gone(text: list[str]) -> None:
    train.run(settings(*TINY, *text))
    folder = next(Path().rglob("result.json")).parent

    def killed() -> None:
        assert [path.name for path in folder.iterdir()] == [LOCK]
        raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train.run(settings(*TINY, *text, "force=true"), killed)
    train.run(settings(*TINY, *text), killed)


def test_a_newest_checkpoint_that_is_damaged_costs_no_best_epoch(text: list[str]) -> None:
    """The third epoch is the new best; what the checkpoint before it names as the best, the first, is needed
    again.
    """
    config = settings(*TINY, *text, "backend=fused", "dropout=none", "schedule.epochs=4", "log_every=1")
    run = start(config)
    validations = iter([5.0, 6.0, 4.0])
    for _ in range(3):
        for step in run.train_epoch():
            if step.step % run.task.batches_an_epoch == 10:
                run.save()
        run.finish_epoch()
        ppl = next(validations)
        progress = run.progress
        progress.best_epoch, progress.best = (progress.epoch, ppl) if ppl < 5.5 else (1, 5.0)
        run.save()
    checkpoint.path_of(run.folder, 3).write_bytes(b"damaged")
    again = start(config)
    assert (again.progress.epoch, again.progress.batch, again.progress.best_epoch) == (2, 10, 1)


def test_a_checkpoint_that_does_not_fit_the_run_is_reported_and_the_one_before_it_used(
    text: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights, an optimiser without its moments, a state of another model: with them training would go
    wrong without a word.
    """
    config = settings(
        *TINY, *text, "backend=fused", "schedule.epochs=3", "schedule.optimiser=adam", "schedule.lr=0.01"
    )
    run = start(config)
    for _ in range(2):
        list(run.train_epoch())
        run.finish_epoch()
        run.save()
    path = checkpoint.path_of(run.folder, 2)
    good = checkpoint.load(path)
    moments = good.optimiser["state"]
    wrong: dict[str, list[Any]] = {
        "model": [
            {f"{name}_": weight for name, weight in good.model.items()},
            good.model | {"head_bias": torch.zeros(3)},
        ],
        "optimiser": [
            *(
                {},
                {"state": {}, "param_groups": good.optimiser["param_groups"]},
                {"state": moments, "param_groups": []},
            ),
            good.optimiser | {"state": moments | {0: {"step": torch.tensor(1.0)}}},
            good.optimiser
            | {
                "state": moments
                | {0: moments[0] | {"exp_avg": torch.full_like(moments[0]["exp_avg"], float("nan"))}}
            },
            good.optimiser | {"state": moments | {0: dict(moments[2])}},
            good.optimiser | {"param_groups": [{"params": [torch.zeros(2)] * len(moments)}]},
        ],
        "state": [[torch.zeros(2, 4, 8), torch.zeros(2, 4, 8)]],
    }
    for name, values in wrong.items():
        for value in values:
            files.write_tensors(path, {"format": checkpoint.FORMAT, **vars(replace(good, **{name: value}))})
            again = start(config)
            assert (again.progress.epoch, again.step) == (1, run.task.batches_an_epoch)
            assert "checkpoint-0002.pt cannot be used: " in capsys.readouterr().err
    monkeypatch.setattr(LearningRate, "at", lambda rate, step, falls=0: 1e38)
    with pytest.raises(RunError, match=r"the last good checkpoint is \S+checkpoint-0001\.pt"):
        train.run(config)


def test_a_damaged_best_checkpoint_is_an_error_before_more_epochs_are_trained(
    long_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs after the first have a learning rate that makes the model worse."""
    rates = {1: 1.0, 2: 16.0, 3: 16.0}
    monkeypatch.setattr(
        LearningRate, "at", lambda rate, step, falls=0: rates[step // rate.steps_per_epoch + 1]
    )
    config = settings(
        *TINY, *long_text, "backend=fused", "dropout=none", "schedule.epochs=3", "schedule.clip=inf"
    )
    train.run(config)
    folder = next(Path().rglob("result.json")).parent
    best = json.loads((folder / "result.json").read_text())["epoch"]
    assert best < 3
    (folder / "result.json").unlink()
    checkpoint.path_of(folder, best).write_bytes(b"damaged")
    with pytest.raises(
        ConfigError,
        match=rf"checkpoint-000{best}\.pt holds the best epoch so far, .* start over with force=true",
    ):
        train.run(config)


def test_the_checkpoint_gives_the_result_again(text: list[str]) -> None:
    """An end that was cut off between the last epoch and the result costs nothing but the evaluation."""
    config = settings(*TINY, *text)
    train.run(config)
    folder = next(Path().rglob("result.json")).parent
    first = (folder / "result.json").read_text()
    (folder / "result.json").unlink()
    train.run(config)
    assert (folder / "result.json").read_text() == first


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_checkpoint(
    text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two good epochs a rate of 1e38 makes the weights infinite within the third."""
    config = settings(*TINY, *text, "backend=fused", "schedule.epochs=3", "schedule.clip=inf")
    fingerprint = corpora.load_text(config.data).fingerprint
    other = checkpoint.run_folder(config, fingerprint)
    other.mkdir(parents=True)
    task = LanguageModelling(config.task, corpora.load_text(config.data), torch.device("cpu"))
    run = Run(config, task, other)
    for _ in range(2):
        assert list(run.train_epoch())
        run.finish_epoch()
        run.save()
    monkeypatch.setattr(LearningRate, "at", lambda rate, step, falls=0: 1e38)
    with pytest.raises(RunError, match="at epoch 3, step") as stopped:
        train.run(config)
    assert "the last good checkpoint is" in str(stopped.value) and "checkpoint-0002.pt" in str(stopped.value)
    assert [path.name for path in checkpoint.all_in(other)] == ["checkpoint-0002.pt", "checkpoint-0001.pt"]
    last = read_log(other / "log.jsonl")[-1]
    assert last["kind"] == "error" and "the loss is" in last["error"] and last["epoch"] == 3
    assert not (other / "result.json").exists()


def test_the_folder_holds_what_a_record_needs(text: list[str]) -> None:
    train.run(settings(*TINY, *text))
    folder = next(Path().rglob("result.json")).parent
    result = json.loads((folder / "result.json").read_text())
    log = read_log(folder / "log.jsonl")
    assert log[-1] == {"kind": "result", **result}
    environment = log[0]["environment"]
    assert {"torch", "device", "backend", "threads", "vdrop"} <= environment.keys()
    assert log[0]["config"]["model"]["hidden_size"] == 8


def test_weights_that_break_in_the_last_step_of_an_epoch_are_not_saved(
    text: list[str], text_folder: Path
) -> None:
    """One chunk an epoch: the loss before the step is fine, the validation after it is not."""
    one_chunk = [f"data.train={text_folder}/valid.txt", "task.batch_size=60", "task.bptt=3"]
    with pytest.raises(RunError, match="after epoch 1, step 1; no checkpoint was written yet"):
        train.run(settings(*TINY, *text, *one_chunk, "schedule.lr=2e38", "schedule.clip=inf"))
    (log,) = Path().rglob("log.jsonl")
    assert not checkpoint.all_in(log.parent) and not (log.parent / "result.json").exists()
    assert read_log(log)[-1]["kind"] == "error"


def test_no_run_resumes_from_a_checkpoint_of_other_settings(text: list[str]) -> None:
    config, other = (settings(*TINY, *text, "backend=fused", f"seed={seed}") for seed in (1, 2))
    fingerprint = corpora.load_text(config.data).fingerprint
    train.run(config)
    folders = [checkpoint.run_folder(c, fingerprint) for c in (config, other)]
    folders[1].mkdir(parents=True)
    (folders[0] / "checkpoint-0001.pt").rename(folders[1] / "checkpoint-0001.pt")
    with pytest.raises(ConfigError, match="holds a checkpoint of other settings"):
        train.run(other)
    assert not (folders[1] / "config.yaml").exists()
    moved = Path(shutil.copy(folders[0] / "config.yaml", folders[1])).read_bytes()
    with pytest.raises(ConfigError, match="holds a checkpoint of other settings"):
        train.run(other)
    assert (folders[1] / "config.yaml").read_bytes() == moved, "it belongs to the checkpoint"


def test_tags_that_are_replaced_by_resuming_are_reported(
    text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(settings(*TINY, *text, "tags=[one]", "run_name=mine"))
    folder = next(Path().rglob("result.json")).parent
    for tags, message in (
        (["tags=[one]", "run_name=mine"], ""),
        (["tags=[one,two]", "run_name=mine"], "had tags=[one]; from now on it has tags=[one,two]"),
        (["tags=[one,two]"], "had run_name=mine; from now on it has no run_name"),
        (["run_name=mine"], "had tags=[one,two]; from now on it has no tags"),
    ):
        (folder / "result.json").unlink()
        capsys.readouterr()
        assert train.run(settings(*TINY, *text, *tags)) == "resumed"
        printed = [line for line in capsys.readouterr().err.splitlines() if "from now on" in line]
        assert printed == ([f"vdrop: the run {message}"] if message else [])


def test_a_run_that_another_process_finishes_before_the_lock_is_skipped(
    text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(*TINY, *text)
    train.run(config)
    folder = next(Path().rglob("result.json")).parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "result.json").unlink()

    def make_folder(*_: object) -> None:
        (folder / "result.json").write_bytes(before["result.json"])

    monkeypatch.setattr(train, "make_folder", make_folder)
    assert train.run(config) == "skipped"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_log_that_is_damaged_is_named_before_the_run_resumes(text: list[str]) -> None:
    train.run(settings(*TINY, *text))
    folder = next(Path().rglob("result.json")).parent
    log = folder / "log.jsonl"
    whole = log.read_bytes()
    (folder / "result.json").unlink()
    for damage in (b"not json\n" + whole, b"[1]\n" + whole, b"", whole[: len(whole) // 2]):
        log.write_bytes(damage)
        with pytest.raises(
            ConfigError, match=r"log\.jsonl is not the log of this run up to its checkpoint .*move it away"
        ):
            train.run(settings(*TINY, *text))
        assert log.read_bytes() == damage, "it is left as it is"
    log.rename("log.jsonl")
    train.run(settings(*TINY, *text))
    assert read_log(log)[0]["epoch"] == 1, "the new one says where it begins"
    run = runs.read(folder)
    assert run is not None and run.result["test_ppl"] > 0 and run.words_per_second is None


def test_a_result_that_is_damaged_is_named(text: list[str]) -> None:
    train.run(settings(*TINY, *text))
    path = next(Path().rglob("result.json"))
    for damage in ("", "{}", "[]"):
        path.write_text(damage)
        with pytest.raises(ConfigError, match=r"result\.json is damaged .*; delete it"):
            train.run(settings(*TINY, *text))


def test_a_plateau_that_patience_never_lets_fall_is_refused(text: list[str]) -> None:
    plateau = ["schedule.lr_shape=plateau", "schedule.decay=2", "schedule.patience=1", "schedule.epochs=2"]
    with pytest.raises(
        ConfigError,
        match=r"^schedule\.plateau_epochs must be below schedule\.patience=1 \(or make .* falls, got 1$",
    ):
        train.run(settings(*TINY, *text, *plateau))
    train.run(settings(*TINY, *text, *plateau, "schedule.plateau_gain=0.1"))


SMALL_RECIPES = {  # sizes for a test; all else is the recipe's
    "quick_tied": ["model.hidden_size=16"],
    "ptb_3h": ["model.hidden_size=8", "model.lower_sizes=[16,16]"],
    "ptb_12h": ["model.hidden_size=8", "model.lower_sizes=[16,16]"],
    "inan_medium_tied": ["model.hidden_size=16"],
    "melis_10m": ["model.hidden_size=16", "model.embedding_size=8"],
    "awd_lstm": ["model.hidden_size=8", "model.lower_sizes=[16,16]"],
}


@pytest.mark.parametrize("recipe", SMALL_RECIPES)
def test_a_recipe_trains_on_any_text(recipe: str, long_text: list[str], tmp_path: Path) -> None:
    sizes = [*SMALL_RECIPES[recipe], "task.batch_size=4", "task.bptt=10", "precision=fp32", "device=cpu"]
    train.run(settings(f"experiment={recipe}", *long_text, *sizes, "debug=true", f"outputs={tmp_path}"))
    (folder,) = (path.parent for path in tmp_path.rglob("result.json"))
    result = json.loads((folder / "result.json").read_text())
    words = checkpoint.load(folder / "checkpoint-0001.pt").model["embedding"].shape[0]
    assert result["test_ppl"] == pytest.approx(words, rel=0.1), "two steps from a uniform guess"


@pytest.mark.parametrize("task", ["language_model", "sentiment"])
def test_debug_takes_two_steps_of_everything_and_is_no_run(
    task: str, text: list[str], rated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation, test and checkpoint included; neither a table nor a later run reads its folder."""
    monkeypatch.chdir(tmp_path)
    chosen = [*TINY, *text] if task == "language_model" else [*TINY_SENTIMENT, *rated, "task.protocol=clean"]
    overrides = [*chosen, "schedule.epochs=3", "log_every=50", "checkpoint.minutes=inf"]
    assert train.run(settings(*overrides, "debug=true")) == "done"
    (folder,) = (path.parent for path in Path("outputs").rglob("result.json"))
    assert folder.parent.parent == Path("outputs/debug") and (folder / "checkpoint-0001.pt").exists()
    assert not Path("outputs/train").exists()
    log = read_log(folder / "log.jsonl")
    steps = [record["step"] for record in log if record["kind"] == "step"]
    result = json.loads((folder / "result.json").read_text())
    assert steps == [1, 2] and result["epochs"] == 1
    assert {name.split("_")[0] for name in result} >= {"train", "valid", "test"}
    assert train.run(settings(*overrides, "debug=true")) == "done", "it starts over each time"
    assert settings(*overrides, "debug=true").identity("f") != settings(*overrides).identity("f")
