"""The records of a training: resuming bit for bit, checkpoints, early stopping, a number of steps."""

import itertools
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import CELLS_AND_POLICIES, TINY, TINY_SENTIMENT, settings
from vdrop_cli import checkpoint, corpora, interruption, tasks, training
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError
from vdrop_cli.interruption import Interrupted
from vdrop_cli.settings.train import Train
from vdrop_cli.sinks import Epoch, Result, Saving, Start, Step, read_log
from vdrop_cli.tasks import LanguageModelling
from vdrop_cli.training import Run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(config: Train) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trains; returns the records of steps and epochs without times, and the result."""
    train.run(config)
    return read(Path(config.outputs))


def read(outputs: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    (path,) = outputs.rglob("result.json")
    dropped = ("seconds", "words_per_second", "chain")
    records = [
        {name: value for name, value in record.items() if name not in dropped}
        for record in read_log(path.parent / "log.jsonl")
        if record["kind"] in ("step", "epoch")
    ]
    result = {name: value for name, value in json.loads(path.read_text()).items() if name not in dropped}
    return records, result


@pytest.mark.parametrize("task", ["language_model", "sentiment"])
def test_max_steps_ends_the_training_within_an_epoch(task: str, text: list[str], rated: list[str]) -> None:
    """Its steps are the first ones of the whole training; the epoch is validated and reported."""
    chosen = [*TINY, *text] if task == "language_model" else [*TINY_SENTIMENT, *rated]
    overrides = [*chosen, "schedule.epochs=3", "log_every=1"]
    whole, whole_result = run(settings(*overrides, "outputs=whole"))
    steps = next(record["step"] for record in whole if record["kind"] == "epoch")
    limit = steps + steps // 2
    short, result = run(settings(*overrides, f"schedule.max_steps={limit}", "outputs=short"))
    assert short[:-1] == whole[: len(short) - 1]
    assert short[-1]["kind"] == "epoch" and (short[-1]["epoch"], short[-1]["step"]) == (2, limit)
    assert (result["epochs"], result["stopped_after_steps"]) == (2, limit)
    assert "stopped_after_steps" not in whole_result


def test_max_steps_beyond_the_last_epoch_changes_no_number(
    text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(settings(*TINY, *text, "outputs=whole"))
    said = "schedule.max_steps=100000 has no effect: training has 36 steps"
    assert said not in capsys.readouterr().err
    assert run(settings(*TINY, *text, "schedule.max_steps=100000", "outputs=limited")) == whole
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("stop", ["middle", "last"])
def test_a_run_with_max_steps_resumes(stop: str, text: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*TINY, *text, "schedule.epochs=3", "schedule.max_steps=30", "log_every=1"]
    whole = run(settings(*overrides, "outputs=whole"))
    assert whole[1]["stopped_after_steps"] == 30
    config = settings(*overrides, "outputs=stopped")
    checks = iter(range(1000))
    with monkeypatch.context() as stopping:
        last = {"middle": 12, "last": 29}[stop]
        check = interruption.check

        def stop_at_step() -> None:
            if next(checks) == last:
                stopping.setattr(interruption, "received", [signal.SIGTERM])
            check()

        stopping.setattr(interruption, "check", stop_at_step)
        with pytest.raises(Interrupted):
            train.run(config)
    assert train.run(config) == "resumed"
    assert read(Path("stopped")) == whole
    assert train.run(config) == "skipped"


def test_a_longer_run_with_the_same_max_steps_continues_the_shorter_one(
    text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*TINY, *text, "schedule.max_steps=30", "log_every=1"]
    whole = run(settings(*overrides, "schedule.epochs=40", "outputs=whole"))
    train.run(settings(*overrides, "schedule.epochs=20"))
    epochs = whole[1]["epochs"]
    assert epochs < 20, "the shorter run has all steps, too"
    capsys.readouterr()
    train.run(settings(*overrides, "schedule.epochs=40"))
    assert f"after step 30 of epoch {epochs}" in capsys.readouterr().err
    path = next(
        path.parent for path in Path("outputs").rglob("config.yaml") if "epochs: 40" in path.read_text()
    )
    assert json.loads((path / "result.json").read_text())["test_ppl"] == whole[1]["test_ppl"]


def test_the_identity_of_a_run_without_max_steps_stays(text: list[str]) -> None:
    without = settings(*TINY, *text)
    assert settings(*TINY, *text, "schedule.max_steps=null").identity("f") == without.identity("f")
    assert settings(*TINY, *text, "schedule.max_steps=9").identity("f") != without.identity("f")


@pytest.mark.parametrize("steps", ["0", "-1", "2147483648"])
def test_max_steps_has_limits(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"^schedule\.max_steps must be "):
        settings(f"schedule.max_steps={steps}")


def test_a_start_cannot_be_judged_after_the_last_step() -> None:
    with pytest.raises(ConfigError, match=r"^stuck\.steps must be at most schedule\.max_steps=100, or null"):
        settings("stuck.steps=200", "schedule.max_steps=100")


def start(config: Train) -> Run:
    corpus = corpora.load_text(config.data)
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
    loss, calls = run.gradient_step.loss, itertools.count()

    def broken(*arguments: Any) -> Any:
        objective = loss(*arguments)
        value = objective.descended * (torch.nan if next(calls) == bad else 1)
        return objective._replace(descended=value, reported=value)

    run.gradient_step.loss = broken
    seen: list[Any] = []
    with pytest.raises(training.Diverged, match=rf"the loss is nan .* at epoch 1, step {bad + 1}$"):
        for record in training.records(run):
            seen.append(record)
    assert [record.step for record in seen if isinstance(record, Step)] == list(
        range(1, bad + 1)
    ) and run.step == bad
    assert bad == 0 or start(config).step < bad


@pytest.mark.parametrize("is_delayed", [False, True])
def test_every_update_has_the_rate_that_its_record_states(
    is_delayed: bool, text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, for 36 steps an epoch: it rises during the first steps, and falls after an epoch whose
    validation is no better.
    """
    monkeypatch.setattr(training, "Optimizer", partial(training.Optimizer, delayed=is_delayed))
    plateau = ["schedule.lr_shape=plateau", "schedule.decay=4", "schedule.max_epoch=0", "schedule.warmup=8"]
    run = start(settings(*TINY, *text, *plateau, "schedule.epochs=3"))
    monkeypatch.setattr(run.task, "validate", lambda model: {run.task.selection_metric: 9.0})
    monkeypatch.setattr(run.task, "result", lambda model, *best: {})
    descend, rates = run.optimiser.descend, list[float]()
    monkeypatch.setattr(run.optimiser, "descend", lambda two, lr: rates.append(lr) or descend(two, lr))
    records = list(training.records(run))
    expected = [min(1.0, step / 8) for step in range(1, 73)] + [1 / 4] * 36
    assert rates == [record.lr for record in records if isinstance(record, Step)] == expected
    assert [record.lr for record in records if isinstance(record, Epoch)] == [1, 1, 1 / 4]
    assert run.progress.best_epoch == 1, "of equal validations the first"


@pytest.mark.parametrize("task", ["language_model", "sentiment"])
def test_every_epoch_has_masks_of_its_own_and_ratings_come_in_another_order(
    task: str, text: list[str], rated: list[str], tmp_path: Path
) -> None:
    chosen = [*TINY, *text] if task == "language_model" else [*TINY_SENTIMENT, *rated]
    config = settings(*chosen, "dropout=variational", "schedule.epochs=2")
    run = Run(config, tasks.load(config, torch.device("cpu")), tmp_path)
    loss, seen = run.gradient_step.loss, list[tuple[Any, Any]]()

    def remembering(batch: Any, state: Any, masks: Any) -> Any:
        seen.append((batch.ids_TB, masks.layers[0].h))
        return loss(batch, state, masks)

    run.gradient_step.loss = remembering
    for _ in range(2):
        list(run.train_epoch())
        run.finish_epoch()
    batches = run.task.batches_an_epoch
    assert len(seen) == 2 * batches > 2
    for (ids_TB, mask), (later_ids_TB, later_mask) in zip(seen[:batches], seen[batches:], strict=True):
        assert torch.equal(ids_TB, later_ids_TB) == (task == "language_model")
        assert not torch.equal(mask, later_mask)


def test_speed_is_that_of_training_alone_and_seconds_include_validation(
    text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock by which a step of 20 words takes 2 seconds, a validation 50 and the evaluation at the end
    1000.
    """
    clock = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    config = settings(*TINY, *text, "schedule.epochs=2")
    run = start(config)

    def lasting(seconds: float, call: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            clock[0] += seconds
            return call(*arguments)

        return timed

    for owner, name, seconds in (
        (run.optimiser, "descend", 2),
        (run.task, "validate", 50),
        (run.task, "result", 1000),
    ):
        monkeypatch.setattr(owner, name, lasting(seconds, getattr(owner, name)))
    records = list(training.records(run))
    epochs = [record for record in records if isinstance(record, Epoch)]
    assert {record.words_per_second for record in (*epochs, *records) if hasattr(record, "lr")} == {10}
    assert [epoch.seconds for epoch in epochs] == [36 * 2 + 50] * 2
    assert records[-1].seconds == start(config).progress.seconds == 2 * (36 * 2 + 50)


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
    options = [*text, f"model={cell}_small", "model.hidden_size=8", f"dropout={policy}"]
    require_parts_are_the_whole([*TINY, *options, "schedule.epochs=3"], monkeypatch)


ADAM = ["schedule.optimiser=adam", "schedule.lr=0.1", "schedule.beta1=0"]
PLATEAU = ["schedule.lr_shape=plateau", "schedule.decay=9", "schedule.max_epoch=0"]
COSINE = ["schedule.lr_shape=cosine", "schedule.decay=1", "schedule.max_epoch=0", "schedule.warmup=40"]


@pytest.mark.parametrize(
    "options",
    [
        ["model.tie_embeddings=true", "model.embedding_size=6", *ADAM, *PLATEAU],
        ["schedule.optimiser=adamw", "schedule.lr=0.01", "schedule.weight_decay=0.1", *COSINE],
        [
            *("schedule.average_decay=0.9", "schedule.average_from=1", "schedule.max_epoch=1"),
            *("task.bptt=10", "task.random_length=true", "task.reset=0.3", "task.ar=1", "task.tar=1"),
            "dropout.new_each_step=[p_x,p_out]",
        ],
        [
            *("schedule.average_decay=1", "schedule.average_from=1", "schedule.max_epoch=1"),
            *("model.layers=3", "model.lower_sizes=[9,7]", "dropout.p_weight=0.5"),
        ],
    ],
    ids=["plateau", "cosine", "average", "weight drop"],
)
def test_two_parts_of_a_run_with_another_schedule_are_the_whole_bit_for_bit(
    options: list[str], text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate falls within these epochs."""
    whole = require_parts_are_the_whole([*TINY, *text, *options, "schedule.epochs=3"], monkeypatch)
    rates = [record["lr"] for record in whole if "step" in record and "epoch" in record]
    assert rates[-1] < rates[len(rates) // 2]
    pairs = [(step, epoch) for step, epoch in itertools.pairwise(whole) if "train_loss" in epoch]
    assert len(pairs) == 3 and all(step["lr"] == epoch["lr"] for step, epoch in pairs), "of its last step"


def require_parts_are_the_whole(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stopped at the end of an epoch, in the middle of one, and at its last step, before the validation.

    Returns the records of the whole.
    """
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
        pairs = [(tensor, finished[1].average[name]) for name, tensor in finished[0].average.items()]
        assert all(torch.equal(*pair) for pair in pairs) and len(finished[1].average) == len(pairs)
    return whole


@pytest.mark.parametrize(
    "options",
    [
        ["schedule.warmup=500", "schedule.lr_shape=linear", "schedule.decay=1"],
        ["schedule.average_decay=1", "schedule.average_from=6"],
        ["schedule.average_decay=1", "schedule.average_trigger=7"],
        ["stuck.steps=20", "stuck.loss=6.5"],
    ],
)
def test_what_needs_a_longer_training_is_left_out_of_debugging(
    options: list[str], text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text, *options, "schedule.epochs=30", "debug=true"))
    assert list(tmp_path.rglob("outputs/debug/**/result.json"))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["schedule.lr_shape=cosine", "schedule.decay=1", "schedule.max_epoch=1"], "max_epoch"),
        (["schedule.average_decay=1", "schedule.average_from=1"], "average_from"),
    ],
)
def test_what_never_begins_within_max_steps_is_refused(
    options: list[str], name: str, text: list[str]
) -> None:
    """An epoch has 36 steps."""
    common = [*TINY, *text, *options, "schedule.epochs=3"]
    with pytest.raises(ConfigError, match=rf"^schedule\.{name} must be so many epochs that .* 36, the steps"):
        train.run(settings(*common, "schedule.max_steps=36"))
    train.run(settings(*common, "schedule.max_steps=37"))


def test_a_trigger_that_cannot_begin_an_average_within_max_steps_is_refused(text: list[str]) -> None:
    """An epoch has 36 steps, and an average begins after `average_trigger` + 2 epochs at the earliest."""
    options = ["schedule.average_decay=1", "schedule.average_trigger=1", "schedule.epochs=4"]
    with pytest.raises(
        ConfigError, match=r"^schedule\.average_trigger must be so few epochs that an average"
    ):
        train.run(settings(*TINY, *text, *options, "schedule.max_steps=108"))
    train.run(settings(*TINY, *text, *options, "schedule.max_steps=109"))


def test_a_warm_up_ends_within_the_training(text: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^schedule\.warmup must be below 36, .* got 36"):
        train.run(settings(*TINY, *text, "schedule.warmup=36"))
    train.run(settings(*TINY, *text, "schedule.warmup=35"))


def test_checkpoints_are_written_after_so_many_minutes_of_training(
    text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that advances by seven seconds whenever it is looked at."""
    saved: dict[str, list[tuple[int, int]]] = {}
    save = checkpoint.save
    for minutes in ("0.2", "2", "inf"):
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
    assert set(ends) < set(saved["2"]) < set(saved["0.2"]) and saved["0.2"] == sorted(saved["0.2"])
    assert len({chunk for _, chunk in saved["2"]}) > 3, "in the middle of epochs"


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
    policy: str, long_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after epoch 4 or in epoch 5, where it saves at once; or lost after epoch 4, where it resumes
    from its last checkpoint.
    """
    overrides = [*TINY, *long_text, "task.batch_size=20", f"dropout={policy}", "schedule.epochs=7"]
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


def test_the_last_epoch_is_reported_where_that_is_asked_for(
    rated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same training; the best one is an earlier epoch, and evaluation takes the same one."""
    monkeypatch.chdir(tmp_path)
    common = [*TINY_SENTIMENT, *rated, "task.protocol=clean", "schedule.epochs=4", "schedule.lr=0.1"]
    for name, options in (("best", []), ("last", ["schedule.report_last=true"])):
        train.run(settings(*common, *options, f"outputs={name}"))
    runs = {name: next(Path(name).rglob("result.json")).parent for name in ("best", "last")}
    epochs = {
        name: [record for record in read_log(folder / "log.jsonl") if record["kind"] == "epoch"]
        for name, folder in runs.items()
    }
    errors = [epoch["valid_rmse"] for epoch in epochs["best"]]
    assert errors == [epoch["valid_rmse"] for epoch in epochs["last"]]
    results = {name: json.loads((folder / "result.json").read_text()) for name, folder in runs.items()}
    best = errors.index(min(errors)) + 1
    assert best < 4 and (results["best"]["epoch"], results["last"]["epoch"]) == (best, 4)
    assert checkpoint.find(str(runs["last"])).name == "checkpoint-0004.pt"
    assert results["last"]["valid_rmse"] == pytest.approx(errors[-1], rel=1e-5)


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
