"""Where a step's metrics go: JSONL, TensorBoard, Weights & Biases, MLflow, Prometheus and the console, behind one protocol.

May import: types and libraries; TensorBoard, wandb and the loggers of other modules only where they are switched on.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megatron_nsr.observability.metrics import encode_line, truncate_after
from megatron_nsr.observability.run_directory import RunDirectory, write_atomic
from megatron_nsr.types import StepMetrics, UserError

# What the console shows of a step: name, label, format.
CONSOLE_METRICS = (
    ("supervised/loss", "loss", "{:.3f}"),
    ("reward/correct_ratio", "correct", "{:.3f}"),
    ("reward/fully_solved_ratio", "solved", "{:.3f}"),
    ("policy/entropy", "entropy", "{:.3f}"),
    ("policy/grad_norm", "grad", "{:.2g}"),
    ("rollout/logprob_gap_max", "gap", "{:.1e}"),
    ("time/step_s", "s", "{:.1f}"),
)


# Why a response has no verdict, as the console tells it where there is one.
NO_VERDICT_REASONS = (("reward/timeout_ratio", "timeout"), ("reward/crash_ratio", "crash"), ("reward/bad_gold_ratio", "bad gold"))


class MetricLogger(Protocol):
    """Takes each step's metrics; `close` flushes and frees."""

    def log(self, metrics: StepMetrics) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """Several loggers as one; a context manager."""

    def __init__(self, loggers: Sequence[MetricLogger]) -> None:
        self._loggers = tuple(loggers)

    def log(self, metrics: StepMetrics) -> None:
        for logger in self._loggers:
            logger.log(metrics)

    def close(self) -> None:
        """Closes every logger, also where one of them raises."""
        with ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonlLogger:
    """Appends one object a step to metrics.jsonl; what it holds of steps after `completed_steps` is dropped first."""

    def __init__(self, path: Path, completed_steps: int = 0) -> None:
        truncate_after(path, completed_steps)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: StepMetrics) -> None:
        self._file.write(encode_line(metrics))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardLogger:
    """One scalar a metric; events of steps after `completed_steps` are purged, so that a resumed run draws one line."""

    def __init__(self, directory: Path, completed_steps: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=completed_steps + 1)

    def log(self, metrics: StepMetrics) -> None:
        for name, value in metrics.values.items():
            self._writer.add_scalar(name, float(value), metrics.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run, online or written to RUN/wandb for a later `wandb sync`; one run id for the life of the directory."""

    def __init__(self, run: RunDirectory, *, mode: Literal["offline", "online"], project: str, config: Mapping[str, Any]) -> None:
        self.check(mode)
        import wandb

        self._run = wandb.init(
            project=project,
            name=run.path.name,
            dir=str(run.path),
            id=_wandb_run_id(run),
            resume="allow" if mode == "online" else None,  # offline, wandb ignores it and says so
            mode=mode,
            config=dict(config),
            settings=wandb.Settings(console="off", silent=mode == "offline"),
        )
        # Our own step as the x-axis: wandb's counter may not go back, and a resumed run repeats steps after its checkpoint.
        self._run.define_metric("*", step_metric="step")

    @staticmethod
    def check(mode: str) -> None:
        """Raises UserError where wandb is not installed."""
        if find_spec("wandb") is None:
            raise UserError(f"logging.wandb={mode}: the package wandb is not installed; install it or set logging.wandb=disabled")

    def log(self, metrics: StepMetrics) -> None:
        self._run.log({"step": metrics.step, **metrics.values})

    def close(self) -> None:
        self._run.finish()


class ConsoleLogger:
    """Progress for a person: one live line on a terminal, else one plain line a step.

    steps: the run's training steps; completed_steps: those done before this process.
    """

    def __init__(self, title: str, steps: int, completed_steps: int = 0, console: Console | None = None) -> None:
        self._title, self._steps, self._completed = title, steps, completed_steps
        self._console = console or Console()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def log(self, metrics: StepMetrics) -> None:
        summary = summarise(metrics)
        if not self._console.is_terminal:
            line = f"{self._title} step {metrics.step}/{self._steps} {summary}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        if self._progress is None:  # not before: an engine that starts up writes over a live line
            self._progress = self._start()
        self._progress.update(self._task, completed=metrics.step, summary=summary)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _start(self) -> Progress:
        text = TextColumn("{task.fields[summary]}", markup=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            text,
        )
        progress = Progress(*columns, console=self._console)
        self._task = progress.add_task(self._title, total=self._steps, completed=self._completed, summary="")
        progress.start()
        return progress


def summarise(metrics: StepMetrics) -> str:
    """The few numbers of a step that a person watches, on one line."""
    shown = [(label, form, metrics.values[name]) for name, label, form in CONSOLE_METRICS if name in metrics.values]
    words = [f"{label} {form.format(float(value))}" for label, form, value in shown]
    if missing := metrics.values.get("reward/no_verdict_ratio"):
        reasons = [f"{label} {metrics.values[name]:.3f}" for name, label in NO_VERDICT_REASONS if metrics.values.get(name)]
        words.insert(0, f"no verdict {missing:.3f}" + (f" ({', '.join(reasons)})" if reasons else ""))
    return " ".join(words)


def check_loggers(
    *, wandb: Literal["disabled", "offline", "online"], mlflow: str | None, mlflow_experiment: str, prometheus_port: int | None
) -> None:
    """Raises UserError where a chosen logger is not installed or could not start now; makes nothing, here or on a server."""
    if prometheus_port is not None:
        from megatron_nsr.observability.prometheus_logger import PrometheusLogger

        PrometheusLogger.check(prometheus_port)
    if wandb != "disabled":
        WandbLogger.check(wandb)
    if mlflow is not None:
        from megatron_nsr.observability.mlflow_logger import connected

        connected(mlflow, mlflow_experiment)


def build_loggers(
    run: RunDirectory,
    *,
    rank: int,
    title: str,
    steps: int,
    completed_steps: int,
    tensorboard: bool,
    wandb: Literal["disabled", "offline", "online"],
    wandb_project: str,
    mlflow: str | None,
    mlflow_experiment: str,
    prometheus_port: int | None,
    config: Mapping[str, Any],
) -> Loggers:
    """The loggers that the settings name, JSONL and console always; only rank 0 gets any.

    config: what wandb and MLflow show as the run's settings. Raises UserError where a chosen logger is not installed or cannot start.
    """
    if rank != 0:
        return Loggers(())
    loggers: list[MetricLogger] = [JsonlLogger(run.metrics, completed_steps)]
    if tensorboard:
        loggers.append(TensorBoardLogger(run.tensorboard, completed_steps))
    if prometheus_port is not None:
        from megatron_nsr.observability.prometheus_logger import PrometheusLogger

        loggers.append(PrometheusLogger(port=prometheus_port, run=run.path.name))
    if wandb != "disabled":
        loggers.append(WandbLogger(run, mode=wandb, project=wandb_project, config=config))
    if mlflow is not None:
        from megatron_nsr.observability.mlflow_logger import MlflowLogger

        loggers.append(
            MlflowLogger(run, uri=mlflow, experiment=mlflow_experiment, steps=steps, completed_steps=completed_steps, config=config)
        )
    return Loggers([*loggers, ConsoleLogger(title, steps, completed_steps)])


def _wandb_run_id(run: RunDirectory) -> str:
    path = run.wandb / "run_id"
    if not path.is_file():
        write_atomic(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()
