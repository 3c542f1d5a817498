"""Starts that are stuck: how they are judged, that this survives a resume, and that it is remembered."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tests.conftest import TINY, Vdrop, settings
from tests.test_survival import training_result
from vdrop_cli import interruption, ownership, runs, stuck_starts, training
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError
from vdrop_cli.interruption import Interrupted
from vdrop_cli.settings.train import StartCheck, Train
from vdrop_cli.sinks import Step, read_log
from vdrop_cli.stuck_starts import StuckError, StuckStart, judge

CHECKED = ("stuck.steps=10", "stuck.loss=0.001")  # a limit that is always exceeded


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(long_text: list[str]) -> Callable[..., Train]:
    """Settings of a short run of 14 steps an epoch."""

    def made(*overrides: str) -> Train:
        config: Train = settings(
            *TINY, *long_text, "task.batch_size=10", "task.bptt=10", "log_every=1", *overrides
        )
        return config

    return made


def folder(outputs: str = "outputs") -> Path:
    return next(Path(outputs).rglob("config.yaml")).parent


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder / "log.jsonl") if record["kind"] == "step"]


def test_a_start_is_judged_by_the_last_quarter_of_its_steps() -> None:
    losses = [9.0] * 6 + [6.0, 8.0] + [1.0] * 4
    assert judge(losses, StartCheck(8, 6.9)) == StuckStart(8, 7.0, 6.9)
    assert judge(losses, StartCheck(8, 7.0)) is None, "at the limit it is not above it"
    assert judge(losses[:7], StartCheck(8, 1.0)) is None, "not yet"
    assert judge(losses, StartCheck(3, 8.9)) == StuckStart(3, 9.0, 8.9), "at least one step"
    assert judge(losses, StartCheck(12, 0.9)) == StuckStart(12, 1.0, 0.9)
    assert judge(losses, StartCheck()) is None
    assert "loss of steps 7 to 8 is 7 nats a word, above stuck.loss=6.9" in str(StuckStart(8, 7.0, 6.9))
    assert "loss of step 3 is 9 " in str(StuckStart(3, 9.0, 7.0))


def test_a_stuck_run_ends_and_says_so_and_the_same_command_says_it_at_once(
    run: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        StuckError,
        match=r"^outputs/train/\S+-s1: .* nats a word, above stuck\.loss=0\.001: .*; take another seed$",
    ) as ended:
        train.run(run(*CHECKED))
    log, stuck = read_log(folder() / "log.jsonl"), json.loads((folder() / "stuck.json").read_text())
    assert (
        len(losses(folder())) == 10
        and log[-1]["kind"] == "error"
        and "this start is stuck" in log[-1]["error"]
    )
    assert stuck == {"step": 10, "loss": pytest.approx(fmean(losses(folder())[8:])), "limit": 0.001}
    assert (
        all(ownership.is_run_file(path) for path in folder().iterdir())
        and not (folder() / "result.json").exists()
    )
    before = {path: path.read_bytes() for path in folder().iterdir()}
    with monkeypatch.context() as patch, pytest.raises(StuckError) as again:
        patch.setattr(train, "Run", None)  # it would be an error to train
        train.run(run(*CHECKED))
    assert (
        str(again.value) == str(ended.value)
        and {path: path.read_bytes() for path in folder().iterdir()} == before
    )


def test_force_starts_over(run: Callable[..., Train]) -> None:
    with pytest.raises(StuckError):
        train.run(run(*CHECKED))
    (folder() / "stuck.json").write_text('{"step": 10, "loss": 99.0, "limit": 7.0}')
    there, left = folder(), list[str]()
    with pytest.raises(StuckError):
        train.run(run(*CHECKED, "force=true"), lambda: left.extend(path.name for path in there.iterdir()))
    assert left == [ownership.LOCK] and json.loads((folder() / "stuck.json").read_text())["loss"] < 9


def test_what_is_remembered_holds_for_the_settings_that_it_was_judged_by(run: Callable[..., Train]) -> None:
    """By others it is trained, in the same folder, to what it comes to without."""
    train.run(run("outputs=whole"))
    for number, others in enumerate(((), ("stuck.steps=10",), ("stuck.steps=9", "stuck.loss=50"))):
        outputs = f"outputs={number}"
        with pytest.raises(StuckError):
            train.run(run(*CHECKED, outputs))
        train.run(run(outputs, *others))
        assert training_result(folder(str(number))) == training_result(folder("whole"))
    with pytest.raises(StuckError):
        train.run(run("stuck.steps=10", "stuck.loss=0.01", "outputs=3"))
    assert stuck_starts.remembered(folder("3"), StartCheck(10, 0.002)) is not None, (
        "a lower limit is exceeded, too"
    )
    assert stuck_starts.remembered(folder("3"), StartCheck(9, 0.002)) is None


def test_a_start_that_is_good_changes_nothing_and_is_finished(run: Callable[..., Train]) -> None:
    train.run(run("outputs=whole"))
    train.run(run("stuck.steps=14"))
    assert training_result(folder()) == training_result(folder("whole"))


@pytest.mark.parametrize("stop", [3, 9, 10])
def test_it_is_judged_by_losses_from_before_an_interruption(
    stop: int, run: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StuckError) as expected:
        train.run(run(*CHECKED, "outputs=whole"))

    class Interruption(training.Progress):
        def __call__(self, record: Any) -> None:
            if isinstance(record, Step) and record.step == stop:
                signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted), interruption.listening():
        patch.setattr(training, "Progress", Interruption)
        train.run(run(*CHECKED))
    monkeypatch.setattr(interruption, "received", [])
    with pytest.raises(StuckError) as ended:
        train.run(run(*CHECKED))
    assert ended.value.start == expected.value.start
    assert losses(folder()) == losses(folder("whole"))


def test_a_run_that_resumes_after_those_steps_is_judged_in_its_first_epoch_alone(
    run: Callable[..., Train], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped after step 12, or after the first of two epochs; the latter says that nothing judged it."""
    for step, outputs in ((12, "outputs"), (15, "later")):

        class Interruption(training.Progress):
            def __call__(self, record: Any, step: int = step) -> None:
                if isinstance(record, Step) and record.step == step:
                    signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch, pytest.raises(Interrupted), interruption.listening():
            patch.setattr(training, "Progress", Interruption)
            train.run(run("schedule.epochs=2", f"outputs={outputs}"))
        monkeypatch.setattr(interruption, "received", [])
    with pytest.raises(StuckError):
        train.run(run(*CHECKED, "schedule.epochs=2"))
    assert len(losses(folder())) == 12 and runs.read_stuck(folder()) is not None
    said = (
        "was not judged by stuck.steps=10 and stuck.loss=0.001, and its first epoch is finished; force=true"
    )
    assert said not in capsys.readouterr().err
    assert train.run(run(*CHECKED, "schedule.epochs=2", "outputs=later")) == "resumed"
    assert capsys.readouterr().err.count(said) == 1


def test_it_ends_at_the_same_step_where_losses_are_read_a_step_later(
    run: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, and with a checkpoint after every step."""
    monkeypatch.setattr(training, "Optimizer", partial(training.Optimizer, delayed=True))
    with pytest.raises(StuckError, match="the mean training loss of steps 9 to 10 "):
        train.run(run(*CHECKED, "checkpoint.minutes=1e-9"))
    assert len(losses(folder())) == 10


def test_more_steps_than_an_epoch_has_are_refused_when_the_text_is_loaded(run: Callable[..., Train]) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^stuck\.steps must be at most 14, the batches of an epoch of \S+train\.txt, .* or null, got "
        r"15$",
    ):
        train.run(run("stuck.steps=15"))
    assert not Path("outputs").exists()
    with pytest.raises(StuckError, match="of steps 12 to 14 "):
        train.run(run("stuck.steps=14", "stuck.loss=0.001"))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"step": 0, "loss": 9, "limit": 7}',
        '{"step": 3, "loss": 7, "limit": 7}',
        '{"step": 3, "loss": NaN, "limit": 7}',
    ],
)
def test_what_is_damaged_is_named_and_force_starts_over(content: str, run: Callable[..., Train]) -> None:
    train.run(run())
    (folder() / "result.json").unlink()
    (folder() / "stuck.json").write_text(content)
    with pytest.raises(
        ConfigError, match=r"stuck\.json is damaged .*; delete it and give the same vdrop train command again"
    ):
        train.run(run(*CHECKED))
    assert runs.stuck_below(Path("outputs")) == []
    assert train.run(run("stuck.steps=10", "force=true")) == "done"


def test_one_stuck_run_does_not_end_the_others_of_a_sweep(
    run: Callable[..., Train], long_text: list[str], vdrop: Vdrop
) -> None:
    """A limit between the losses of seeds, so that one of three is stuck."""
    first = {}
    for seed in (1, 2, 3):
        with pytest.raises(StuckError) as ended:
            train.run(run("stuck.steps=8", "stuck.loss=0.001", f"seed={seed}", "outputs=first"))
        first[seed] = ended.value.start.loss
    low, high = sorted(first.values())[1:]
    (stuck,) = (seed for seed, loss in first.items() if loss == high)
    overrides = [
        *TINY,
        *long_text,
        "task.batch_size=10",
        "task.bptt=10",
        "stuck.steps=8",
        f"stuck.loss={(low + high) / 2!r}",
    ]
    ran = vdrop("train", "-m", *overrides, "seed=1,2,3")
    assert ran.returncode == 1 and "vdrop: 3 runs: 2 done, 1 failed" in ran.stderr, ran.stderr
    assert (
        f"  failed: seed={stuck}: outputs/train/" in ran.stderr
        and "this start is stuck; take another seed" in ran.stderr
    )
    assert [run.train.seed for run in runs.stuck_below(Path("outputs"))] == [stuck]
    assert {run.train.seed for run in runs.below(Path("outputs"))} == {1, 2, 3} - {stuck}


def test_a_run_that_is_read_says_what_it_was(
    run: Callable[..., Train], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StuckError) as ended:
        train.run(run(*CHECKED))
    (stuck,) = runs.stuck_below(Path("outputs"))
    assert stuck.start == ended.value.start and replace(stuck.train, backend=run().backend) == run(*CHECKED)
    assert stuck.environment["device_type"] == "cpu" and stuck.corpus in (folder() / "log.jsonl").read_text()
    capsys.readouterr()
    unfinished = runs.read_any(folder())
    assert isinstance(unfinished, runs.Unfinished) and unfinished.state == "stuck"
    assert unfinished.train == stuck.train and unfinished.log == stuck.log
    (folder() / "log.jsonl").write_text("")
    assert runs.stuck_below(Path("outputs")) == [] and "its start is missing" in capsys.readouterr().err
