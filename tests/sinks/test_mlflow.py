"""A run at MLflow, in a folder of this machine."""

from pathlib import Path

import pytest

from tests.sinks.examples import loss_metrics
from tests.sinks.logged import config, logged, train_twice
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.fields import flatten
from vdrop_cli.sinks.loggers import Logger

mlflow = pytest.importorskip("mlflow")


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["each record sent at once", "all sent at the end"])
def test_a_local_run_has_the_numbers_of_the_log_once(
    seconds: float, text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vdrop_cli.sinks import mlflow as sink

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setattr(sink, "SECONDS_BETWEEN_REQUESTS", seconds)
    folder = train_twice("mlflow", text, monkeypatch)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == f"{folder.parent.name} {folder.name}"
    assert run.data.tags[sink.RUN_TAG] == folder.name and run.data.tags["vdrop.tags"] == "a, b"
    assert run.data.params == {name: str(value) for name, value in flatten(config(folder)).items()}
    for kind in ("step", "epoch", "result"):
        expected = logged(folder, kind)
        for name in next(iter(expected.values())):
            history = client.get_metric_history(run.info.run_id, name)
            assert [point.step for point in history] == list(expected), "each once"
            for point in history:
                assert point.value == pytest.approx(expected[point.step][name])


def test_without_a_server_the_variable_that_names_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vdrop_cli.sinks import mlflow as sink

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sink, "find_spec", lambda name: None)
    with (
        pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"),
        Logger("mlflow", sink.MlflowRun, tmp_path, {"log_every": 1}, False, loss_metrics),
    ):
        pass
