"""Training: resuming, early stopping, divergence, what is written."""

import itertools
import json
import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import CELLS_AND_POLICIES, TINY, TINY_SENTIMENT, settings
from vdrop_cli import checkpoint, corpora, files, interruption, runs, training
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.interruption import Interrupted
from vdrop_cli.lock import Lock
from vdrop_cli.ownership import LOCK
from vdrop_cli.settings.train import Train
from vdrop_cli.sinks import Epoch, Result, Saving, Start, Step, read_log
from vdrop_cli.tasks import LanguageModelling
from vdrop_cli.training import Run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def start(config: Train) -> Run:
    corpus = corpora.load(config.data)
    folder = checkpoint.run_folder(config, corpus.fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    return Run(config, LanguageModelling(config.task, corpus, torch.device("cpu")), folder)


def timeless(record: Any) -> Any:
    return {
        name: value for name, value in vars(record).items() if name not in ("seconds", "words_per_second")
    }


def test_the_records_begin_with_the_start_and_end_with_the_result(text: list[str]) -> None:
    config = settings(*TINY, *text, "dropout=none", "model.hidden_size=32", "schedule.epochs=2")
    records = list(training.records(start(config)))
    assert isinstance(records[0], Start) and isinstance(records[-1], Result)
    steps = [record for record in records if isinstance(record, Step)]
    epochs = [record for record in records if isinstance(record, Epoch)]
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert [epoch.step for epoch in epochs] == [len(steps) // 2, len(steps)]
    mean = sum(step.loss for step in steps[: len(steps) // 2]) / (len(steps) // 2)
    assert epochs[0].train_loss == pytest.approx(mean)
    assert epochs[1].metrics["valid_ppl_batched"] < epochs[0].metrics["valid_ppl_batched"] < 40 * 1.1, (
        "it learns"
    )


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates are launched before the loss is read, as on a GPU."""
    monkeypatch.setattr(training, "Optimizer", partial(training.Optimizer, delayed=True))


@pytest.mark.usefixtures("delayed")
@pytest.mark.parametrize("minutes", [30, 1e-9])
def test_losses_that_are_read_a_step_later_are_the_same(
    minutes: float, text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped and resumed, too; and no checkpoint holds a step that was not reported before it."""
    overrides = [*TINY, *text, "model.hidden_size=8", "dropout=none", "schedule.epochs=2", "task.bptt=15"]
    whole = [
        timeless(record)
        for record in training.records(start(settings(*overrides)))
        if not isinstance(record, Start | Saving)
    ]
    with monkeypatch.context() as immediate:
        immediate.setattr(training, "Optimizer", training.Optimizer.func)  # type: ignore[attr-defined]
        expected = [
            timeless(record)
            for record in training.records(start(settings(*overrides, "outputs=immediate")))
            if vars(record)
        ]
    losses = [[r["loss"] for r in records if "loss" in r] for records in (whole, expected)]
    assert len(losses[0]) > 10 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    steps = len(losses[0]) // 2
    for stop in (steps // 2, steps - 1, steps, steps + 1):
        parts: list[Any] = []
        there = settings(*overrides, f"outputs=stopped-at-{stop}", f"checkpoint.minutes={minutes}")
        run = start(there)
        with pytest.raises(Interrupted):
            for record in training.records(run):
                parts.append(record)
                if isinstance(record, Saving):
                    assert not run.in_flight and parts[-2].step == run.step
                if getattr(record, "step", 0) == stop:
                    monkeypatch.setattr(interruption, "received", [signal.SIGTERM])
        monkeypatch.setattr(interruption, "received", [])
        again = start(there)
        assert (again.progress.epoch, again.progress.batch) == (run.progress.epoch, run.progress.batch)
        parts += training.records(again)
        assert [timeless(record) for record in parts if not isinstance(record, Start | Saving)] == whole


@pytest.mark.usefixtures("delayed")
@pytest.mark.parametrize("bad", [0, 3, -1])
def test_a_loss_that_is_read_a_step_later_ends_the_run_at_its_own_step(
    bad: int, text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, one in the middle, and the last of an epoch; its update and that of a later one are in no
    checkpoint.
    """
    config = settings(
        *TINY, *text, "model.hidden_size=8", "dropout=none", "schedule.epochs=1", "checkpoint.minutes=1e-9"
    )
    run = start(config)
    bad %= run.task.batches_an_epoch
    loss, calls = run.task.loss, itertools.count()

    def broken(*arguments: Any) -> Any:
        value, state = loss(*arguments)
        return value * (torch.nan if next(calls) == bad else 1), state

    monkeypatch.setattr(run.task, "loss", broken)
    seen: list[Any] = []
    with pytest.raises(training.Diverged, match=rf"the loss is nan .* at epoch 1, step {bad + 1}$"):
        for record in training.records(run):
            seen.append(record)
    assert [record.step for record in seen if isinstance(record, Step)] == list(
        range(1, bad + 1)
    ) and run.step == bad
    assert bad == 0 or start(config).step < bad


SHORT = (("lstm", "moon"), ("lstm", "variational_untied"), ("gru", "naive"))  # of cells and policies


@pytest.mark.parametrize(
    ("cell", "policy"),
    [
        pytest.param(*pair, marks=() if pair in SHORT else (pytest.mark.long,), id="-".join(pair))
        for pair in CELLS_AND_POLICIES
    ],
)
def test_two_parts_of_a_run_are_the_whole_bit_for_bit(
    cell: str, policy: str, text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the end of an epoch, in the middle of one, and at its last step, before the validation."""
    overrides = [
        *TINY,
        *text,
        f"model={cell}_small",
        "model.hidden_size=8",
        f"dropout={policy}",
        "schedule.epochs=3",
    ]
    whole = [
        timeless(record)
        for record in training.records(start(settings(*overrides)))
        if not isinstance(record, Start | Saving)
    ]
    steps = max(record["step"] for record in whole if "step" in record) // 3
    for stop in (steps, 3 * steps // 2, 2 * steps):
        there = f"outputs=stopped-at-{stop}"
        first = []
        with pytest.raises(Interrupted):
            for record in training.records(start(settings(*overrides, there))):
                first.append(record)
                if isinstance(record, Step) and record.step == stop:
                    monkeypatch.setattr(interruption, "received", [signal.SIGTERM])
        monkeypatch.setattr(interruption, "received", [])
        run = start(settings(*overrides, there))
        assert run.step == stop
        again = [timeless(r) for r in (*first, *training.records(run)) if not isinstance(r, Start | Saving)]
        assert again == whole
        finished = [
            checkpoint.load(next(Path(folder).rglob("checkpoint-0003.pt")))
            for folder in ("outputs", f"stopped-at-{stop}")
        ]
        assert all(torch.equal(tensor, finished[1].model[name]) for name, tensor in finished[0].model.items())


def test_checkpoints_are_written_after_so_many_minutes_of_training(
    text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that advances by seven seconds whenever it is looked at."""
    saved: dict[str, list[tuple[int, int]]] = {}
    save = checkpoint.save
    for minutes in ("0.2", "5", "inf"):
        now = itertools.count(0, 7)
        monkeypatch.setattr(training.time, "perf_counter", lambda now=now: next(now))
        places = saved.setdefault(minutes, [])
        monkeypatch.setattr(
            checkpoint,
            "save",
            lambda c, *to, places=places: places.append((c.epoch, c.batch)) or save(c, *to),
        )
        list(
            training.records(
                start(
                    settings(
                        *TINY,
                        *text,
                        f"checkpoint.minutes={minutes}",
                        f"outputs=every-{minutes}",
                        "schedule.epochs=2",
                    )
                )
            )
        )
    ends = [(1, 0), (2, 0)]
    assert saved["inf"] == ends
    assert set(ends) < set(saved["5"]) < set(saved["0.2"]) and saved["0.2"] == sorted(saved["0.2"])
    assert len({chunk for _, chunk in saved["5"]}) > 3, "in the middle of epochs"


def places_saved(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[tuple[int, int]]:
    """Epochs and batches of every checkpoint that a run writes."""
    places: list[tuple[int, int]] = []
    save = checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda c, *to: places.append((c.epoch, c.batch)) or save(c, *to))
        list(training.records(start(settings(*TINY, *overrides))))
    return places


def test_a_checkpoint_is_at_the_end_of_every_so_many_epochs_and_of_the_last(
    text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every_third = places_saved(monkeypatch, *text, "schedule.epochs=7", "checkpoint.epochs=3")
    assert every_third == [(3, 0), (6, 0), (7, 0)]
    assert places_saved(monkeypatch, *text, "schedule.epochs=2", "outputs=every") == [(1, 0), (2, 0)]
    assert places_saved(monkeypatch, *text, "schedule.epochs=2", "checkpoint.epochs=9", "outputs=few") == [
        (2, 0)
    ]


@pytest.mark.parametrize(("patience", "expected"), [(5, [1, 3, 4, 6, 7]), (2, [1, 3, 5])])
def test_the_best_epoch_has_a_checkpoint_where_it_is_reported(
    patience: int, expected: list[int], text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at the end of epochs 3 and 6, and of the last, which is the fifth where patience ends the run."""
    measured = iter([5.0, 6.0, 4.0, 7.0, 8.0] if patience == 2 else [5.0, 6.0, 4.5, 4.0, 8.0, 9.0, 9.0])
    monkeypatch.setattr(
        LanguageModelling, "validate", lambda task, model: {task.selection_metric: next(measured)}
    )
    monkeypatch.setattr(LanguageModelling, "result", lambda task, model, *best: {})
    overrides = [
        *text,
        "dropout=none",
        "schedule.epochs=7",
        f"schedule.patience={patience}",
        "checkpoint.epochs=3",
    ]
    assert places_saved(monkeypatch, *overrides) == [(epoch, 0) for epoch in expected]


@pytest.mark.parametrize("policy", ["none", "variational"])
def test_a_run_with_few_checkpoints_comes_to_the_same_bit_for_bit_however_it_ends(
    policy: str, text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after epoch 4 or in epoch 5, where it saves at once; or lost after epoch 4, where it resumes
    from its last checkpoint.
    """
    overrides = [*TINY, *text, "task.batch_size=20", f"dropout={policy}", "schedule.epochs=7"]
    whole = [
        timeless(record)
        for record in training.records(start(settings(*overrides)))
        if not isinstance(record, Start | Saving)
    ]
    epochs = [record for record in whole if "train_loss" in record]
    best_of_4 = min(epochs[:4], key=lambda record: record["metrics"]["valid_ppl_batched"])["epoch"]
    steps = epochs[0]["step"]
    weights = checkpoint.load(next(Path("outputs").rglob("checkpoint-0007.pt"))).model
    for how, kind, last_step, resumed_step in (
        ("stopped after epoch 4", Epoch, 4 * steps, 4 * steps),
        ("stopped in epoch 5", Step, 4 * steps + 2, 4 * steps + 2),
        ("lost after epoch 4", Epoch, 4 * steps, (4 if policy == "none" and best_of_4 == 4 else 3) * steps),
    ):
        there = settings(*overrides, f"outputs={how}", "checkpoint.epochs=3", "checkpoint.minutes=inf")
        first: list[Any] = []
        with pytest.raises(KeyError if "lost" in how else Interrupted):
            for record in training.records(start(there)):
                first.append(record)
                if isinstance(record, kind) and getattr(record, "step", 0) == last_step:
                    if "lost" in how:
                        raise KeyError
                    monkeypatch.setattr(interruption, "received", [signal.SIGTERM])
        monkeypatch.setattr(interruption, "received", [])
        run = start(there)
        assert run.step == resumed_step
        records = [record for record in first if getattr(record, "step", 0) <= run.step]
        records = [
            timeless(record)
            for record in (*records, *training.records(run))
            if not isinstance(record, Start | Saving)
        ]
        assert records == whole
        saved = checkpoint.load(next(Path(how).rglob("checkpoint-0007.pt")))
        assert all(torch.equal(tensor, saved.model[name]) for name, tensor in weights.items())


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
    monkeypatch.setattr("vdrop_cli.optimizer.learning_rate", lambda schedule, epoch: 1e38)
    with pytest.raises(RunError, match=r"the last good checkpoint is \S+checkpoint-0001\.pt"):
        train.run(config)


def test_a_damaged_best_checkpoint_is_an_error_before_more_epochs_are_trained(text: list[str]) -> None:
    config = settings(
        *TINY,
        *text,
        "backend=fused",
        "dropout=none",
        "schedule.epochs=3",
        "schedule.lr=8",
        "schedule.clip=inf",
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


def test_early_stopping_reports_the_best_epoch(text: list[str]) -> None:
    """A rate that makes training worse: it stops `patience` epochs after the best, whose weights it
    reports.
    """
    config = settings(
        *TINY,
        *text,
        "dropout=none",
        "schedule.epochs=30",
        "schedule.patience=2",
        "schedule.lr=8",
        "schedule.clip=inf",
    )
    records = list(training.records(start(config)))
    epochs = [record for record in records if isinstance(record, Epoch)]
    result = records[-1]
    assert isinstance(result, Result)
    best = min(epochs, key=lambda epoch: epoch.metrics["valid_ppl_batched"])
    assert result.epoch == best.epoch < result.epochs == best.epoch + 2 < 30
    assert result.metrics["valid_ppl_batched"] == pytest.approx(best.metrics["valid_ppl_batched"])


def test_of_a_validation_the_metric_that_is_no_number_is_named(
    text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(settings(*TINY, *text))
    monkeypatch.setattr(
        run.task, "validate", lambda model: {run.task.selection_metric: 2.0, "another": float("inf")}
    )
    with pytest.raises(training.Diverged, match=r"^another is inf after epoch 1, step 0"):
        run.finish_epoch()


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_checkpoint(
    text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two good epochs a rate of 1e38 makes the weights infinite within the third."""
    config = settings(*TINY, *text, "backend=fused", "schedule.epochs=3", "schedule.clip=inf")
    fingerprint = corpora.load(config.data).fingerprint
    other = checkpoint.run_folder(config, fingerprint)
    other.mkdir(parents=True)
    task = LanguageModelling(config.task, corpora.load(config.data), torch.device("cpu"))
    run = Run(config, task, other)
    for _ in range(2):
        assert list(run.train_epoch())
        run.finish_epoch()
        run.save()
    monkeypatch.setattr(training, "learning_rate", lambda schedule, epoch: 1e38)
    monkeypatch.setattr("vdrop_cli.optimizer.learning_rate", lambda schedule, epoch: 1e38)
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


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(text: list[str]) -> None:
    config, other = (settings(*TINY, *text, "backend=fused", f"seed={seed}") for seed in (1, 2))
    fingerprint = corpora.load(config.data).fingerprint
    train.run(config)
    folders = [checkpoint.run_folder(c, fingerprint) for c in (config, other)]
    folders[1].mkdir(parents=True)
    (folders[0] / "checkpoint-0001.pt").rename(folders[1] / "checkpoint-0001.pt")
    with pytest.raises(ConfigError, match="holds a checkpoint of other settings"):
        train.run(other)


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


@pytest.mark.parametrize("batches", [0, 2])
def test_a_place_is_named_the_same_between_epochs_and_within_one(batches: int, text: list[str]) -> None:
    """After the last step of epoch 1 the place is in epoch 1; the next step is of epoch 2."""
    config = settings(*TINY, *text, "schedule.epochs=3")
    run = start(config)
    for _ in run.train_epoch():
        pass
    run.finish_epoch()
    first = run.step
    for _ in itertools.islice(run.train_epoch(), batches):
        pass
    assert run.place == f"step {first + batches} of epoch {2 if batches else 1}"
    run.save()
    assert start(config).place == run.place


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
