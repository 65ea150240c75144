"""MLflow."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sslfast.config import load_json, save_json, to_dict
from sslfast.training.logging import LogContext, Logger, scalars

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read at its import: nothing is sent unless asked for
try:
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient
except ImportError as error:
    raise ImportError(f"it needs the package mlflow ({error}); pip install 'sslfast[mlflow]'") from error

_LONGEST_VALUE, _PARAMS_AT_ONCE = 6000, 100  # MLflow's own limits


class MLflowLog(Logger):
    """A run of MLflow, in ``mlflow.db`` and ``mlartifacts/`` of the run directory unless the variable
    ``MLFLOW_TRACKING_URI`` names a server or another store (``mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db``).

    The experiment is that of ``MLFLOW_EXPERIMENT_NAME``, else ``sslfast``. The run's id is kept in ``mlflow.json``: a
    resumed run continues the same one, and what it logs again is the same.
    """

    def __init__(self, context: LogContext) -> None:
        folder = context.run.path.absolute()
        for name in ("mlflow.store.db.utils", "alembic"):  # a line for each table of a new database
            logging.getLogger(name).setLevel(logging.WARNING)
        given = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=given or f"sqlite:///{folder / 'mlflow.db'}")
        self._total_steps, self._last_step = context.total_steps, context.first_step
        place = folder / "mlflow.json"
        try:
            known = load_json(place)
        except (FileNotFoundError, ValueError):
            known = {}
        if "run_id" in known and known.get("tracking_uri") == given:
            self._run = str(known["run_id"])
            self._client.update_run(self._run, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "sslfast"
        experiment = self._client.get_experiment_by_name(name)
        artifacts = None if given else (folder / "mlartifacts").as_uri()
        number = experiment.experiment_id if experiment else self._client.create_experiment(name, artifacts)
        self._run = self._client.create_run(number, run_name=folder.name).info.run_id
        save_json(place, {"tracking_uri": given, "run_id": self._run})
        params = [Param(key, value[:_LONGEST_VALUE]) for key, value in _flat(to_dict(context.config))]
        for first in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(self._run, params=params[first : first + _PARAMS_AT_ONCE])

    def write(self, record: Mapping[str, Any]) -> None:
        step, milliseconds = record["step"], round(1000 * record["time"]["unix_seconds"])
        metrics = [Metric(name, float(value), milliseconds, step) for name, value in scalars(record).items()]
        self._client.log_batch(self._run, metrics=metrics)
        self._last_step = step

    def write_picture(self, name: str, path: Path, step: int) -> None:
        self._client.log_artifact(self._run, str(path), "pictures")

    def close(self) -> None:
        status = "FINISHED" if self._last_step >= self._total_steps else "KILLED"
        self._client.set_terminated(self._run, status)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)
