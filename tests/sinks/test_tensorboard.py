"""TensorBoard events of a run."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.sinks.examples import EPOCH, RESULT, loss_metrics, step
from vdrop_cli.sinks.json_lines import JsonLines
from vdrop_cli.sinks.log_reader import read_log
from vdrop_cli.sinks.records import Saving, Start
from vdrop_cli.sinks.tensorboard import TensorBoard, events_until


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own reader
def test_tensorboard_has_the_steps_of_the_log_the_epochs_and_the_settings_with_the_result(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

    config = {"model": {"layers": 2}, "dropout": {"name": "naive"}, "seed": 1, "outputs": "x"}
    with TensorBoard(tmp_path, config | {"data": {"dir": None}}, 3, 0, 0, loss_metrics) as sink:
        for record in (Start({}, "f", 0, 0, {}), *map(step, range(1, 8)), EPOCH, RESULT):
            sink(record)
    assert len(list(tmp_path.glob("events.*"))) == 1, "all in one folder"
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        f"step/{name}" for name in ("loss", "train_ppl_dropout", "grad_norm", "lr", "words_per_second")
    } <= tags
    assert {
        f"per_epoch/{name}"
        for name in ("train_loss", "train_ppl_dropout", "valid_ppl_batched", "words_per_second")
    } <= tags
    assert [scalar.step for scalar in events.Scalars("step/loss")] == [3, 6]
    assert events.Scalars("result/test_ppl")[0].value == pytest.approx(9.0)
    assert [scalar.step for scalar in events.Scalars("per_epoch/train_loss")] == [1], "the axis counts epochs"
    start = parse_session_start_info_plugin_data(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    )
    assert start.group_name == tmp_path.name and set(start.hparams) == {"model.layers", "Seed", "Dropout"}
    assert "_hparams_/experiment" not in events.summary_metadata


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own reader
def test_events_until_a_step_are_whole_and_without_the_result(tmp_path: Path) -> None:
    """Of a file that is damaged, those before the damage."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path, {"seed": 1}, 1, 0, 0, loss_metrics) as sink:
        for record in (*map(step, range(1, 7)), EPOCH, *map(step, range(7, 10)), RESULT):
            sink(record)
    (path,) = tmp_path.glob("events.*")
    whole = path.read_bytes()
    cases = (
        (1, 6, 6, {"step", "per_epoch"}),
        (0, 6, 6, {"step"}),
        (0, 5, 5, {"step"}),
        (1, 99, 9, {"step", "per_epoch"}),
    )
    for epochs, until, steps, kinds in cases:
        path.write_bytes(events_until(whole, epochs, until))
        events = EventAccumulator(str(tmp_path)).Reload()
        assert len(events.Scalars("step/loss")) == steps
        assert {
            tag.partition("/")[0] for tag in (*events.Tags()["scalars"], *events.summary_metadata)
        } == kinds
    assert events_until(path.read_bytes(), 1, 99) == path.read_bytes() != whole
    assert events_until(b"", 1, 6) == events_until(b"\xff" * 999, 1, 6) == b""
    for size in range(0, len(whole), 97):
        assert events_until(whole, 1, 6).startswith(events_until(whole[:size], 1, 6))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own reader
def test_a_run_that_resumes_has_each_step_and_each_epoch_once(tmp_path: Path) -> None:
    """It was killed after its third epoch; its last checkpoint is of the first one, after two steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_epoch, resumed_loss in ((0, 9.0), (1, 5.0)):
        with TensorBoard(tmp_path, {}, 1, first_epoch, 2 * first_epoch, loss_metrics) as board:
            for epoch in range(first_epoch + 1, 4):
                board(step(2 * epoch - 1))
                board(step(2 * epoch))
                board(replace(EPOCH, epoch=epoch, step=2 * epoch, train_loss=resumed_loss))
        if first_epoch == 0:  # as if written an hour ago; readers sort files by name
            (path,) = tmp_path.glob("events.*")
            path.rename(tmp_path / "events.out.tfevents.1000000000.host")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [scalar.step for scalar in events.Scalars("step/loss")] == [1, 2, 3, 4, 5, 6]
    losses = [(scalar.step, scalar.value) for scalar in events.Scalars("per_epoch/train_loss")]
    assert losses == [(1, 9.0), (2, 5.0), (3, 5.0)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own reader
def test_records_before_a_checkpoint_are_on_disk_by_then(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with (
        TensorBoard(tmp_path, {}, 1, 0, 0, loss_metrics) as board,
        JsonLines(tmp_path, log_every=1, epochs=0, step=0) as log,
    ):
        for record in (*map(step, range(1, 7)), Saving()):
            board(record)
            log(record)
        assert len(EventAccumulator(str(tmp_path)).Reload().Scalars("step/loss")) == 6
        assert len(read_log(tmp_path / "log.jsonl")) == 6
