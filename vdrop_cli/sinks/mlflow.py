"""A run at MLflow."""

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, RunTag

from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.fields import flatten
from vdrop_cli.sinks.loggers import PROJECT
from vdrop_cli.sinks.records import TAGS

RUN_TAG = "vdrop.run"  # the name of the run folder, by which a run is resumed
SECONDS_BETWEEN_REQUESTS = 10.0
MAX_METRICS = 1000  # of one request
NEWEST_BY = {"step": f"{TAGS['step']}loss", "epoch": f"{TAGS['epoch']}train_loss"}


class MlflowRun:
    """A run with a tag that names its run folder.

    A training that does not resume from a checkpoint makes a new run. The step of `per_epoch/…` and
    `result/…` counts epochs. MLflow reads its own environment variables: MLFLOW_TRACKING_URI,
    MLFLOW_EXPERIMENT_NAME, …
    """

    def __init__(self, folder: Path, config: dict[str, Any], resumes: bool) -> None:
        if not mlflow.is_tracking_uri_set() and find_spec("sqlalchemy") is None:
            raise ConfigError("logger=mlflow needs a server; set MLFLOW_TRACKING_URI=http://…")
        self.client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)).experiment_id
        self.metrics = list[Metric]()  # not sent yet
        self.sent = time.monotonic()
        self.recorded = dict[str, int]()
        earlier = (
            self.client.search_runs(
                [experiment],
                f"tags.`{RUN_TAG}` = '{folder.name}'",
                order_by=["attributes.start_time DESC"],
                max_results=1,
            )
            if resumes
            else []
        )
        if earlier:
            self.id = earlier[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            for kind, metric in NEWEST_BY.items():
                history = self.client.get_metric_history(self.id, metric)
                self.recorded[kind] = max((point.step for point in history), default=0)
            return
        name = config["run_name"] or f"{folder.parent.name} {folder.name}"
        self.id = self.client.create_run(experiment, run_name=name).info.run_id
        tags = {RUN_TAG: folder.name, **({"vdrop.tags": ", ".join(config["tags"])} if config["tags"] else {})}
        self.client.log_batch(
            self.id,
            params=[Param(key, str(value)) for key, value in flatten(config).items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )

    def log(self, kind: str, values: dict[str, float], position: int) -> None:
        now = int(1000 * time.time())
        self.metrics += [Metric(name, value, now, position) for name, value in values.items()]
        if time.monotonic() - self.sent >= SECONDS_BETWEEN_REQUESTS:
            self.flush()

    def flush(self) -> None:
        while self.metrics:
            self.client.log_batch(self.id, metrics=self.metrics[:MAX_METRICS])
            del self.metrics[:MAX_METRICS]
        self.sent = time.monotonic()

    def finish(self, failed: bool) -> None:
        self.flush()
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")
