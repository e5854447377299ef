"""The loggers write the same names and values everywhere, resume, and only on rank 0."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_nsr.observability.loggers import (
    ConsoleLogger,
    Loggers,
    MetricLogger,
    TensorBoardLogger,
    WandbLogger,
    build_loggers,
    summarise,
)
from megatron_nsr.observability.metrics import read_metrics
from megatron_nsr.observability.run_directory import RunDirectory
from megatron_nsr.types import StepMetrics

STEP = StepMetrics(2, {"reward/correct_ratio": 0.25, "rollout/logprob_gap_max": 3e-6, "time/step_s": 1.5})


def build(run: RunDirectory, rank: int) -> Loggers:
    return build_loggers(
        run,
        rank=rank,
        title="nsr",
        steps=4,
        completed_steps=0,
        tensorboard=True,
        wandb="offline",
        wandb_project="p",
        mlflow=(run.path / "mlflow").as_uri(),
        mlflow_experiment="e",
        prometheus_port=None,
        config={"a": 1},
    )


def test_one_call_reaches_every_logger(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = RunDirectory(tmp_path)
    with build(run, rank=0) as loggers:
        loggers.log(STEP)
    assert read_metrics(run.metrics) == [{"step": 2, **STEP.values}]
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/correct_ratio")] == [(2, 0.25)]
    assert len(list(run.wandb.glob("offline-run-*/run-*.wandb"))) == 1
    assert len(list((run.path / "mlflow").glob("*/*/metrics/reward/correct_ratio"))) == 1
    assert "nsr step 2/4 correct 0.250 gap 3.0e-06 s 1.5" in capsys.readouterr().out


def test_other_ranks_log_nothing(tmp_path: Path) -> None:
    with build(RunDirectory(tmp_path), rank=1) as loggers:
        loggers.log(STEP)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_draws_one_line_after_a_resume(tmp_path: Path) -> None:
    for completed, steps, value in ((0, (1, 2, 3), 1.0), (1, (2, 3), 2.0)):
        logger = TensorBoardLogger(tmp_path, completed)
        for step in steps:
            logger.log(StepMetrics(step, {"policy/loss": value}))
        logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("policy/loss")] == [(1, 1.0), (2, 2.0), (3, 2.0)]


def test_a_resumed_run_keeps_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for step in (1, 2):
        logger = WandbLogger(RunDirectory(tmp_path), mode="offline", project="p", config={})
        logger.log(StepMetrics(step, {"policy/loss": 1.0}))
        logger.close()
        ids.append((tmp_path / "wandb" / "run_id").read_text())
    assert ids[0] == ids[1]
    written = {path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}  # one file, where both began in the same second
    assert written == {f"run-{ids[0]}.wandb"}


def test_a_terminal_shows_one_live_line() -> None:
    output = io.StringIO()
    logger = ConsoleLogger("nsr", 4, console=Console(file=output, force_terminal=True, width=120))
    for step in range(1, 5):
        logger.log(StepMetrics(step, {"reward/correct_ratio": step / 4}))
    logger.close()
    final = output.getvalue().rstrip().rpartition("\r")[2]
    assert "nsr" in final and "4/4" in final and "correct 1.000" in final


def test_a_console_line_is_not_wrapped_or_read_as_markup() -> None:
    output = io.StringIO()
    logger = ConsoleLogger("[bold]run", 4, console=Console(file=output, width=20))
    logger.log(STEP)
    assert output.getvalue() == "[bold]run step 2/4 correct 0.250 gap 3.0e-06 s 1.5\n"


def test_the_console_says_which_share_has_no_verdict_and_why() -> None:
    values = {"reward/no_verdict_ratio": 0.75, "reward/crash_ratio": 0.5, "reward/timeout_ratio": 0.0, "reward/correct_ratio": 1.0}
    assert summarise(StepMetrics(1, values)) == "no verdict 0.750 (crash 0.500) correct 1.000"
    assert summarise(StepMetrics(1, values | {"reward/no_verdict_ratio": 0.0})) == "correct 1.000"


def test_a_logger_that_fails_to_close_does_not_keep_the_others_open() -> None:
    closed: list[str] = []

    class Failing:
        def log(self, metrics: StepMetrics) -> None: ...

        def close(self) -> None:
            raise OSError("disk full")

    class Closing:
        def log(self, metrics: StepMetrics) -> None: ...

        def close(self) -> None:
            closed.append("closed")

    loggers: list[MetricLogger] = [Closing(), Failing(), Closing()]
    with pytest.raises(OSError, match="disk full"):
        Loggers(loggers).close()
    assert closed == ["closed", "closed"]
