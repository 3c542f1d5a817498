"""Runs that continue shorter ones: to the same, bit for bit, as runs from the start; and what is not
continued.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, TINY_SENTIMENT, settings
from tests.test_ownership import content
from tests.test_survival import timeless, training_result
from vdrop_cli import checkpoint, continuation, files, runs, training
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.run_files import SHARED_DEVICE
from vdrop_cli.settings.choices import Precision
from vdrop_cli.settings.commands import Reproduce
from vdrop_cli.settings.train import Train
from vdrop_cli.sinks import read_log
from vdrop_cli.studies.plan import RunFactory
from vdrop_cli.studies.study import Row

SHORT = ("task.batch_size=20", "task.bptt=10", "log_every=3")
PLATEAU = ("schedule.lr_shape=plateau", "schedule.decay=2", "schedule.max_epoch=0", "schedule.lr=20")
WORSE = ("dropout=none", "schedule.lr=8", "schedule.clip=inf")  # after its first epochs


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(text: list[str]) -> Callable[..., Train]:
    """Settings of a short run of so many epochs."""

    def made(epochs: int, *overrides: str) -> Train:
        config: Train = settings(*TINY, *text, *SHORT, *overrides, f"schedule.epochs={epochs}")
        return config

    return made


def folder_of(epochs: int, outputs: str = "outputs") -> Path:
    """Of the run of so many epochs, whether it is finished or not."""
    return next(
        path.parent
        for path in Path(outputs).rglob("config.yaml")
        if f"\n  epochs: {epochs}\n" in path.read_text()
    )


def starts(folder: Path) -> list[int]:
    """The epochs after which its parts began."""
    return [record["epoch"] for record in read_log(folder / "log.jsonl") if record["kind"] == "start"]


def require_same(epochs: int, whole: str = "whole") -> None:
    """Result, steps and epochs of the log, and weights are those of a run from the start."""
    assert training_result(folder_of(epochs))[:3] == training_result(folder_of(epochs, whole))[:3]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), marks=pytest.mark.long),
        WORSE,
        pytest.param(
            ("dropout=naive", "schedule.optimiser=adam", "schedule.lr=0.01"), marks=pytest.mark.long
        ),
        PLATEAU,
    ],
    ids=" ".join,
)
def test_a_longer_run_begins_where_a_shorter_one_ended_and_comes_to_the_same(
    overrides: tuple[str, ...], run: Callable[..., Train], capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice; one of these reports its best epoch, which is an early one."""
    for epochs in (3, 5, 6):
        shorter = content(Path("outputs"))
        capsys.readouterr()
        train.run(run(epochs, *overrides))
        message = capsys.readouterr().err
        assert (
            (f", continuing {folder_of({5: 3, 6: 5}[epochs])} after step " in message)
            if epochs > 3
            else ("continuing" not in message)
        )
        assert content(Path("outputs")).items() >= shorter.items(), "the shorter ones stay as they are"
        assert starts(folder_of(epochs)) == {3: [0], 5: [0, 3], 6: [0, 3, 5]}[epochs]
    for epochs in (5, 6):
        train.run(run(epochs, *overrides, f"outputs=whole-{epochs}"))
        require_same(epochs, f"whole-{epochs}")
        finished_run = runs.read(folder_of(epochs))
        assert (
            finished_run is not None
            and finished_run.has_whole_log
            and [epoch["epoch"] for epoch in finished_run.epochs] == list(range(1, epochs + 1))
        )
    result = json.loads((folder_of(6) / "result.json").read_text())
    assert (result["epoch"] < 4) == (overrides == WORSE)


def test_what_is_left_of_a_finished_run_is_not_replaced_by_a_shorter_one(run: Callable[..., Train]) -> None:
    """Where the checkpoints and the result of the longer run are gone."""
    for epochs in (2, 3):
        train.run(run(epochs))
    folder = folder_of(3)
    for path in (*checkpoint.all_in(folder), folder / "result.json"):
        path.unlink()
    evaluation = folder / "eval-0003-standard.json"
    evaluation.write_text('{"metrics": {}}')
    before = content(folder)
    with pytest.raises(ConfigError, match=r"eval-0003-standard\.json is of weights that"):
        train.run(run(3))
    assert content(folder) == before
    evaluation.unlink()
    with pytest.raises(ConfigError, match=r"log\.jsonl is of a finished run whose checkpoints are gone"):
        train.run(run(3))
    assert content(folder).items() < before.items()


def test_times_that_measure_nothing_stay_so_in_the_longer_run(run: Callable[..., Train]) -> None:
    train.run(run(2))
    (folder_of(2) / SHARED_DEVICE).write_text("six others")
    train.run(run(3))
    assert runs.read(folder_of(3)).words_per_second is None


def test_a_mark_that_is_no_file_is_reported_and_the_run_begins_from_nothing(
    run: Callable[..., Train], capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(run(2))
    (folder_of(2) / SHARED_DEVICE).mkdir()
    train.run(run(3))
    assert SHARED_DEVICE in capsys.readouterr().err and starts(folder_of(3)) == [0]


def test_a_run_on_ratings_is_continued_too(rated: list[str]) -> None:
    """Which reports its best epoch, and reads its texts in an order of each epoch."""
    rating_overrides = [*TINY_SENTIMENT, *rated, "task.protocol=clean", "dropout=naive"]
    for epochs, outputs in ((2, "outputs"), (4, "outputs"), (4, "whole")):
        train.run(settings(*rating_overrides, f"schedule.epochs={epochs}", f"outputs={outputs}"))
    assert starts(folder_of(4)) == [0, 2]
    require_same(4)


def lose(config: Train, monkeypatch: pytest.MonkeyPatch, epoch: int, batch: int = 0) -> None:
    """A run whose process is lost when it has saved at a place within an epoch, or at its end."""
    save = checkpoint.save

    def then_die(state: checkpoint.Checkpoint, *more: Any) -> None:
        save(state, *more)
        if (state.epoch, state.batch) >= (epoch, batch):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", then_die)
        train.run(config)


def test_the_run_that_has_come_furthest_is_continued_and_none_of_more_epochs(
    run: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(run(1))
    lose(run(5), monkeypatch, 3)
    train.run(run(4))
    assert starts(folder_of(4)) == [0, 1], "that of five epochs has come further, but is longer"
    lose(run(3), monkeypatch, 2)
    train.run(run(6))
    assert starts(folder_of(6)) == [0, 1, 4]


def test_an_interrupted_one_is_continued_from_the_end_of_its_last_whole_epoch(
    run: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(run(4, "checkpoint.minutes=1e-9"), monkeypatch, 2, 1)
    assert [path.name for path in checkpoint.all_in(folder_of(4))][:2] == [
        "checkpoint-0002-00001.pt",
        "checkpoint-0002.pt",
    ]
    for outputs in ("outputs", "whole"):
        train.run(run(5, f"outputs={outputs}"))
    assert starts(folder_of(5)) == [0, 2]
    require_same(5)


def test_one_that_patience_has_ended_is_not_trained_further(run: Callable[..., Train]) -> None:
    """As the longer run would have ended there, too."""
    for epochs, outputs in ((9, "outputs"), (30, "outputs"), (30, "whole")):
        train.run(run(epochs, *WORSE, "schedule.patience=1", f"outputs={outputs}"))
    result = json.loads((folder_of(30) / "result.json").read_text())
    assert result["epochs"] < 9 and starts(folder_of(30)) == [0, result["epochs"]]
    require_same(30)


def test_a_run_continues_one_that_would_have_trained_after_its_last_epoch(run: Callable[..., Train]) -> None:
    patient = [*WORSE, "schedule.patience=4"]
    for epochs, outputs in ((3, "outputs"), (30, "outputs"), (30, "whole")):
        train.run(run(epochs, *patient, f"outputs={outputs}"))
    assert json.loads((folder_of(30) / "result.json").read_text())["epochs"] > 3 and starts(
        folder_of(30)
    ) == [0, 3]
    require_same(30)


@pytest.mark.parametrize(
    "other",
    [
        "seed=2",
        "backend=reference",
        "precision=bf16",
        "dropout.p_h=0.1",
        "schedule.decay=3",
        "data.min_count=9",
    ],
)
def test_a_run_of_other_settings_is_none_to_continue(other: str, run: Callable[..., Train]) -> None:
    train.run(run(1))
    train.run(run(2, other))
    assert starts(folder_of(2)) == [0]


def test_a_shorter_run_that_could_not_have_these_settings_is_none_to_continue(
    run: Callable[..., Train],
) -> None:
    """Its training ends before the average would begin."""
    train.run(run(1))
    train.run(run(3, "schedule.average_decay=1", "schedule.average_from=2"))
    assert starts(folder_of(3)) == [0]


def test_a_run_whose_rate_falls_to_its_end_continues_no_shorter_one(run: Callable[..., Train]) -> None:
    """The rates of the shorter one fall sooner."""
    linear = ("schedule.lr_shape=linear", "schedule.decay=1", "schedule.max_epoch=0")
    train.run(run(1, *linear))
    train.run(run(2, *linear))
    assert starts(folder_of(2)) == [0]


def test_what_changes_no_number_may_differ(run: Callable[..., Train]) -> None:
    train.run(run(2))
    train.run(run(4, "log_every=1", "checkpoint.epochs=2"))
    train.run(run(4, "outputs=whole"))
    assert starts(folder_of(4)) == [0, 2]
    steps = [record["step"] for record in read_log(folder_of(4) / "log.jsonl") if record["kind"] == "step"]
    assert steps == [*range(3, steps[-1] // 2 + 1, 3), *range(steps[-1] // 2 + 1, steps[-1] + 1)], (
        "of each part as it was asked for"
    )
    parts = [
        timeless(json.loads((folder_of(4, outputs) / "result.json").read_text()))
        for outputs in ("outputs", "whole")
    ]
    assert parts[0] == parts[1]


def test_force_begins_from_nothing_and_a_folder_with_a_checkpoint_never_looks_elsewhere(
    run: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(run(4, "force=true"), monkeypatch, 1)
    train.run(run(3, "force=true"))
    assert starts(folder_of(3)) == [0]
    with monkeypatch.context() as patch:
        patch.setattr(continuation, "find", None)  # it would be an error to call it
        train.run(run(4))
    assert starts(folder_of(4)) == [0, 1]
    train.run(run(5), continues_shorter=False)
    assert starts(folder_of(5)) == [0], "as a job that was requeued after it had started over"


def damaged(folder: Path) -> Iterator[tuple[str, list[Path], int | None, str]]:
    """What is damaged of a run of three epochs, the best of which is the second; after which epoch it is
    continued, and what is said.
    """
    newest, best, log = (folder / name for name in ("checkpoint-0003.pt", "checkpoint-0002.pt", "log.jsonl"))
    yield "newest", [newest], 2, r"checkpoint-0003\.pt is damaged"
    yield (
        "all",
        [newest, best],
        None,
        "begins from nothing: no checkpoint of a shorter run beside it can be used",
    )
    yield "best", [best], None, r"checkpoint-0002\.pt is damaged"
    yield "log", [log], None, r"checkpoint-0003\.pt cannot be used: \S+log\.jsonl is not the log of its run"


def test_what_is_damaged_is_said_and_the_run_begins_before_it_or_from_nothing(
    run: Callable[..., Train], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    validations = {1: 6.0, 2: 5.0, 3: 7.0}
    monkeypatch.setattr(
        training.Run, "finish_epoch", with_validations(training.Run.finish_epoch, validations)
    )
    train.run(run(3, "dropout=none"))
    train.run(run(5, "dropout=none", "outputs=whole", "force=true"))
    whole = Path("outputs").rename("made")
    for what, paths, epoch, message in damaged(folder_of(3, "made")):
        shutil.copytree(whole, "outputs")
        for path in (Path("outputs", *path.parts[1:]) for path in paths):
            path.write_bytes(b"damaged\n" + path.read_bytes()[8:])
        before = content(folder_of(3))
        capsys.readouterr()
        train.run(run(5, "dropout=none"))
        assert re.search(message, capsys.readouterr().err), what
        assert starts(folder_of(5)) == ([0] if epoch is None else [0, epoch]), what
        assert content(folder_of(3)) == before
        require_same(5)
        shutil.rmtree("outputs")


def with_validations(
    finish_epoch: Callable[[training.Run], Any], validations: dict[int, float]
) -> Callable[[training.Run], Any]:
    """The end of an epoch as if its validation had given that; so it is known which epoch is the best."""

    def finish(run: training.Run) -> Any:
        run.task.validate = lambda model: {
            run.task.selection_metric: validations.get(run.progress.epoch + 1, 9.0)
        }  # type: ignore[method-assign]
        return finish_epoch(run)

    return finish


def test_without_a_log_of_the_shorter_run_a_new_one_begins(
    run: Callable[..., Train], capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(run(2))
    (folder_of(2) / "log.jsonl").unlink()
    train.run(run(3))
    assert (
        starts(folder_of(3)) == [2]
        and "is missing; a new log begins after epoch 2" in capsys.readouterr().err
    )


def test_a_checkpoint_that_does_not_belong_there_is_none_to_continue(
    run: Callable[..., Train], capsys: pytest.CaptureFixture[str]
) -> None:
    """One of another seed, under the name of this one's; and files that are no run's beside it."""
    for seed in (1, 2):
        train.run(run(2, f"seed={seed}"))
    first, second = (next(Path("outputs").glob(f"train/*/*-s{seed}")) for seed in (1, 2))
    shutil.copy(second / "checkpoint-0002.pt", first)
    (first / "checkpoint-0001.pt").unlink()
    for name, damaged in (
        ("notes-s1", None),
        ("empty-s1", ""),
        ("list-s1", "[]"),
        ("text-s1", "schedule: 3"),
        ("word-s1", "schedule: {epochs: x}"),
    ):
        (first.parent / name).mkdir()
        if damaged is not None:
            (first.parent / name / "config.yaml").write_text(damaged)
    (first.parent / "file-s1").touch()
    train.run(run(3))
    message = capsys.readouterr().err
    assert (
        "checkpoint-0002.pt cannot be used: it is of other settings than those that its folder is named by"
        in message
    )
    assert starts(folder_of(3)) == [0] and "begins from nothing" in message


def test_what_can_perhaps_be_read_later_is_an_error_and_nothing_is_trained(
    run: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(run(1))
    monkeypatch.setattr(
        files, "read_tensors", lambda path: (_ for _ in ()).throw(OSError(116, "Stale file handle"))
    )
    with pytest.raises(ConfigError, match=r"checkpoint-0001\.pt cannot be read \(Stale file handle\)"):
        train.run(run(2))
    assert not (folder_of(2) / "log.jsonl").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own reader
def test_tensorboard_shows_every_step_once_and_the_result_of_the_longer_run_alone(
    run: Callable[..., Train],
) -> None:
    """Also where a try to begin was killed before its first checkpoint, and the shorter run has come further
    than its checkpoint.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.run(run(2))
    (folder_of(2) / "checkpoint-0002.pt").unlink()
    train.run(run(3), continues_shorter=False)
    for path in checkpoint.all_in(folder_of(3)):
        path.unlink()
    (folder_of(3) / "result.json").unlink()
    log = folder_of(3) / "log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
    train.run(run(3))
    assert starts(folder_of(3)) == [0, 1]
    events = EventAccumulator(str(folder_of(3))).Reload()
    last = read_log(folder_of(3) / "log.jsonl")[-2]["step"]
    assert [scalar.step for scalar in events.Scalars("per_epoch/train_loss")] == [1, 2, 3]
    assert [scalar.step for scalar in events.Scalars("step/loss")] == list(range(3, last + 1, 3))
    assert [scalar.step for scalar in events.Scalars("result/test_ppl")] == [3]


def test_a_copying_that_is_cut_off_anywhere_is_made_up_for(
    run: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run whose best epoch is an early one: its log, two checkpoints and events are copied."""
    train.run(run(3, *WORSE))
    train.run(run(4, *WORSE, "outputs=whole"))
    replace = files.replace
    for parts in (0, 2, 3):
        to_write = iter([True] * parts)

        def failing(path: Path, *content: Any, to_write: Iterator[bool] = to_write) -> None:
            if path.name != "config.yaml" and not next(to_write, False):
                raise RunError("the disk is full")
            replace(path, *content)

        with monkeypatch.context() as patch, pytest.raises(RunError, match="the disk is full"):
            patch.setattr(files, "replace", failing)
            train.run(run(4, *WORSE))
        assert len(checkpoint.all_in(folder_of(4))) == max(0, parts - 2), "events and log come first"
        train.run(run(4, *WORSE))
        require_same(4)
        shutil.rmtree(folder_of(4))


def test_a_plan_counts_the_epochs_of_a_shorter_run(run: Callable[..., Train]) -> None:
    train.run(run(2, "precision=fp32"))
    factory = RunFactory(Reproduce(precision=Precision.fp32))
    assert [
        factory.training(Row("it", (), (), run(epochs, *more), ()), 1).epochs_done
        for epochs, more in ((2, ()), (5, ()), (5, ("dropout=none",)))
    ] == [2, 2, 0]
