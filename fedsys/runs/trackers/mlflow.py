"""``tracker=mlflow``: a run of an experiment on an MLflow server, or in a database or folder.

Only MLflow's client is used, by the id of the run, so nothing of MLflow's fluent state is touched:
several runs in one process do not meet.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from fedsys.config.targets import import_extra
from fedsys.runs.tracking import End, TrackedRun, flat

IDENTITY: Final = "fedsys.run"
"""Tag by which a run that continues is found again."""

PARAMS: Final = 100
"""Parameters that MLflow takes in one request."""

LONGEST: Final = 500
"""Characters of a parameter that every MLflow store takes; ``config.yaml`` has the whole."""

_STATUS: Final = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class MlflowTracker:
    """Writes a run to MLflow.

    Args:
        uri: Of the server, or a store such as ``sqlite:///runs.db``; None leaves it to
            ``MLFLOW_TRACKING_URI`` and MLflow's own default.
        experiment: Name of the experiment, made if it is not there.
        model: Whether the model is stored, too, at the end.

    Raises:
        ModelError: MLflow is not installed.
    """

    def __init__(
        self, uri: str | None = None, experiment: str = "fedsys", model: bool = True
    ) -> None:
        # MLflow reports its use to its makers unless it is told not to; whoever sets it, decides.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._library = import_extra("mlflow.tracking", "mlflow", "tracker=mlflow")
        self._uri, self._experiment, self._model = uri, experiment, model

    def start(self, run: TrackedRun) -> None:
        """Make the run in the experiment, or take up the one that it continues."""
        entities = import_extra("mlflow.entities", "mlflow", "tracker=mlflow")
        self._metric = entities.Metric
        self._client: Any = self._library.MlflowClient(tracking_uri=self._uri)
        found = self._client.get_experiment_by_name(self._experiment)
        where = found.experiment_id if found else self._client.create_experiment(self._experiment)
        self._id = self._earlier(where, run) or self._new(where, run, entities.Param)
        self._client.log_text(self._id, run.config_yaml, "config.yaml")

    def _earlier(self, experiment: str, run: TrackedRun) -> str | None:
        if run.after_round == 0:
            return None
        wanted = f"tags.`{IDENTITY}` = '{run.identity}'"
        found = self._client.search_runs([experiment], wanted, max_results=1)
        if not found:
            return None
        earlier = str(found[0].info.run_id)
        self._client.update_run(earlier, status="RUNNING")
        return earlier

    def _new(self, experiment: str, run: TrackedRun, param: Any) -> str:
        made = self._client.create_run(experiment, run_name=run.name, tags={IDENTITY: run.identity})
        identity = str(made.info.run_id)
        leaves = [param(key, _text(value)) for key, value in flat(run.config, ".").items()]
        for first in range(0, len(leaves), PARAMS):
            self._client.log_batch(identity, params=leaves[first : first + PARAMS])
        return identity

    def log(self, number: int, scalars: Mapping[str, float]) -> None:
        """Log the numbers of a round as metrics at the step `number`."""
        self._send(number, scalars.items())

    def _send(self, step: int, pairs: Iterable[tuple[str, float]]) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [self._metric(name, value, now, step) for name, value in pairs]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, end: End) -> None:
        """Log figures, pictures and model, and end the run."""
        self._send(end.last_round, end.figures.items())
        for plot in end.plots:
            self._client.log_artifact(self._id, str(plot), "plots")
        if self._model and end.model is not None:
            self._client.log_artifact(self._id, str(end.model), "model")
        self._client.set_terminated(self._id, _STATUS[end.status])


def _text(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list | dict) else str(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
