"""The MLflow logger against MLflow's own store in a folder: names, resuming, a store that is away for a while."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_nsr.observability.mlflow_logger import MlflowLogger, connected, mlflow_name
from megatron_nsr.observability.run_directory import RunDirectory
from megatron_nsr.types import StepMetrics, UserError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path / "store"


def logger(store: Path, run: Path, **changes: Any) -> MlflowLogger:
    run.mkdir(exist_ok=True)
    settings: dict[str, Any] = {"uri": store.as_uri(), "experiment": "e", "steps": 3, "completed_steps": 0}
    settings |= {"config": {"optimizer.learning_rate": 1e-6}} | changes
    return MlflowLogger(RunDirectory(run), **settings)


def only_run(store: Path) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store.as_uri())
    experiment = client.get_experiment_by_name("e")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def history(store: Path, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    found = MlflowClient(tracking_uri=store.as_uri()).get_metric_history(only_run(store).info.run_id, name)
    return [(metric.step, metric.value) for metric in found]


def test_a_run_arrives_with_its_settings_and_metrics(store: Path, tmp_path: Path) -> None:
    tracker = logger(store, tmp_path / "nsr")
    for step in (1, 2, 3):
        tracker.log(StepMetrics(step, {"policy/loss": step / 4, "eval/MATH/pass@8": 0.5}))
    assert only_run(store).info.status == "RUNNING"
    tracker.close()
    run = only_run(store)
    assert (run.info.run_name, run.info.status) == ("nsr", "FINISHED")
    assert run.data.params == {"optimizer.learning_rate": "1e-06"}
    assert history(store, "policy/loss") == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert run.data.metrics["eval/MATH/pass_at_8"] == 0.5


def test_a_stopped_run_goes_on_as_the_same_one(store: Path, tmp_path: Path) -> None:
    first = logger(store, tmp_path / "nsr")
    first.log(StepMetrics(1, {"policy/loss": 1.0}))
    first.close()
    assert only_run(store).info.status == "KILLED"
    second = logger(store, tmp_path / "nsr", completed_steps=1, config={"optimizer.learning_rate": 1e-5})
    assert only_run(store).info.status == "RUNNING"
    second.log(StepMetrics(2, {"policy/loss": 2.0}))
    second.close()
    assert history(store, "policy/loss") == [(1, 1.0), (2, 2.0)]


def test_another_store_gets_a_run_of_its_own(store: Path, tmp_path: Path) -> None:
    logger(store, tmp_path / "nsr").close()
    other = tmp_path / "other_store"
    tracker = logger(other, tmp_path / "nsr")
    tracker.log(StepMetrics(3, {"policy/loss": 3.0}))
    tracker.close()
    assert history(other, "policy/loss") == [(3, 3.0)]


def test_what_the_store_does_not_take_is_sent_again(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = logger(store, tmp_path / "nsr")
    away = tmp_path / "away"
    store.rename(away)
    tracker.log(StepMetrics(1, {"policy/loss": 1.0}))
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("megatron-nsr: MLflow: it did not take the metrics of step 1, which are sent again with the next")
    if store.exists():  # an empty store that MLflow made instead
        store.rename(tmp_path / "empty")
    away.rename(store)
    tracker.log(StepMetrics(2, {"policy/loss": 2.0}))
    assert history(store, "policy/loss") == [(1, 1.0), (2, 2.0)]
    assert capsys.readouterr().err == ""


def test_a_run_outlives_a_store_that_stays_away(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = logger(store, tmp_path / "nsr")
    store.rename(tmp_path / "away")
    tracker.log(StepMetrics(1, {"policy/loss": 1.0, "policy/entropy": 1.0}))
    tracker.close()
    assert "MLflow: 2 values never reached it; metrics.jsonl has them" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"^logging\.mlflow=http://127\.0\.0\.1:9: .*[Cc]onnection refused"):
        logger(tmp_path, tmp_path / "nsr", uri="http://127.0.0.1:9")
    assert list((tmp_path / "nsr").iterdir()) == []
    with pytest.raises(UserError, match=r"^logging\.mlflow=http://127\.0\.0\.1:9: .*[Cc]onnection refused"):
        connected("http://127.0.0.1:9", "e")


def test_without_mlflow_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(
        UserError,
        match=r"logging\.mlflow=file:.*pip install --no-deps -r \S*requirements/mlflow\.lock, .*pip install 'megatron_nsr\[mlflow\]'",
    ):
        logger(tmp_path, tmp_path / "nsr")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("policy/loss", "policy/loss"), ("eval/AMC 23/cons@16", "eval/AMC 23/cons_at_16"), ("data.files[0]", "data.files_0_")],
)
def test_names_keep_to_mlflow_s_characters(name: str, expected: str) -> None:
    assert mlflow_name(name) == expected
