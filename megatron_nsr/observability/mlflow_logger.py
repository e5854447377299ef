"""A run's metrics and settings in MLflow.

May import: types, platform.doctor and observability; mlflow only where it is switched on.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from megatron_nsr.observability.run_directory import RunDirectory, write_atomic
from megatron_nsr.platform.doctor import shipped_file
from megatron_nsr.types import StepMetrics, UserError

# mlflow/utils/validation.py (3.17) takes no larger batches.
METRICS_PER_BATCH = 1000
PARAMETERS_PER_BATCH = 100
# MLflow's own default of 7 waits four minutes for a server that is gone, at every step; a user's setting stands.
RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


class MlflowLogger:
    """One MLflow run for the life of the run directory; what the server does not take now is sent again with the next step.

    uri: a tracking URI. steps, completed_steps: the run's, and those done before this process. config: the run's parameters.
    Raises UserError where mlflow is not installed or the server does not answer.
    """

    def __init__(
        self, run: RunDirectory, *, uri: str, experiment: str, steps: int, completed_steps: int, config: Mapping[str, Any]
    ) -> None:
        self._client = connected(uri, experiment)
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self._metric, self._param, self._refusal = Metric, Param, MlflowException
        self._steps, self._step = steps, completed_steps
        self._pending: list[Any] = []
        try:
            self._run_id = self._known_run(run) or self._new_run(run, experiment, config)
        except MlflowException as error:
            raise UserError(f"logging.mlflow={uri}: {_one_line(error)}") from None

    def log(self, metrics: StepMetrics) -> None:
        now_ms = int(time.time() * 1000)
        self._step = metrics.step
        self._pending += [self._metric(mlflow_name(name), float(value), now_ms, self._step) for name, value in metrics.values.items()]
        self._send()

    def close(self) -> None:
        """Ends the MLflow run: FINISHED where every step is done, else KILLED, from which a resumed run takes it up again."""
        self._send()
        if self._pending:
            _warn(f"{len(self._pending)} values never reached it; metrics.jsonl has them")
        try:
            self._client.set_terminated(self._run_id, status="FINISHED" if self._step >= self._steps else "KILLED")
        except Exception as error:
            _warn(f"the run could not be ended there: {_one_line(error)}")

    def _known_run(self, run: RunDirectory) -> str | None:
        """The run that this directory has there already, running again; None where the server knows none."""
        if not run.mlflow_run_id.is_file():
            return None
        run_id = run.mlflow_run_id.read_text(encoding="utf-8").strip()
        try:
            self._client.update_run(run_id, status="RUNNING")
        except self._refusal as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run_id

    def _new_run(self, run: RunDirectory, experiment: str, config: Mapping[str, Any]) -> str:
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
        run_id: str = self._client.create_run(experiment_id, run_name=run.path.name).info.run_id
        parameters = [self._param(mlflow_name(key), str(value)) for key, value in config.items()]
        for start in range(0, len(parameters), PARAMETERS_PER_BATCH):
            self._client.log_batch(run_id, params=parameters[start : start + PARAMETERS_PER_BATCH])
        write_atomic(run.mlflow_run_id, run_id)
        return run_id

    def _send(self) -> None:
        try:
            while self._pending:
                self._client.log_batch(self._run_id, metrics=self._pending[:METRICS_PER_BATCH])
                del self._pending[:METRICS_PER_BATCH]
        except Exception as error:  # a tracker must not end a run, and MLflow's stores raise whatever they meet, a bare Exception too
            _warn(f"it did not take the metrics of step {self._step}, which are sent again with the next: {_one_line(error)}")


def connected(uri: str, experiment: str) -> Any:
    """A client of the server at `uri`, which answered when it was asked for the experiment; nothing is made there.

    Raises UserError where mlflow is not installed or the server does not answer.
    """
    for name, value in RETRIES.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise UserError(
            f"logging.mlflow={uri}: the package mlflow-skinny is not installed; "
            f"pip install --no-deps -r {shipped_file('requirements/mlflow.lock')}, where the rest is from a lock file too, "
            "otherwise pip install 'megatron_nsr[mlflow]'; or set logging.mlflow=null"
        ) from None
    try:
        client = MlflowClient(tracking_uri=uri)
        client.get_experiment_by_name(experiment)
    except MlflowException as error:
        raise UserError(f"logging.mlflow={uri}: {_one_line(error)}") from None
    return client


def mlflow_name(name: str) -> str:
    """A metric's or parameter's name in the characters that MLflow takes: `eval/MATH/pass@8` is `eval/MATH/pass_at_8`."""
    return re.sub(r"[^\w/. :-]", "_", name.replace("@", "_at_"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _warn(text: str) -> None:
    print(f"megatron-nsr: MLflow: {text}", file=sys.stderr)
