"""What is said at the start, state.json after a failure, and the bound on the log-prob gap."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from megatron_nsr.observability.run_directory import RunDirectory
from megatron_nsr.observability.state import read_state, write_state
from megatron_nsr.recording import Recorder, alone_in, announce, check_gap, open_loggers, reporting_state
from megatron_nsr.types import StepMetrics, UserError


def config_for(directory: Path, **rollout: Any) -> Config:
    return parse_config(
        {
            "run": {"dir": str(directory), "steps": 4},
            "model": {"path": "model"},
            "data": {"train": "train.jsonl", "template": "plain", "prompts_per_step": 8},
            "objective": {"name": "nsr", "mini_batch_prompts": 8},
            "rollout": rollout,
        }
    )


def fail(run: RunDirectory, error: Exception, *, started_at: int | None) -> None:
    with pytest.raises(type(error)), reporting_state(run) as progress:
        if started_at is not None:
            progress.started(config_for(run.path), lambda: started_at)
        raise error


def outcome(run: RunDirectory) -> tuple[str, int, str]:
    state = read_state(run)
    assert state is not None
    return state.status, state.step, state.reason


def test_wrong_input_before_the_start_leaves_nothing(tmp_path: Path) -> None:
    fail(RunDirectory(tmp_path / "run"), UserError("model.path=x: no such directory"), started_at=None)
    assert not (tmp_path / "run").exists()


def test_wrong_input_that_shows_later_is_a_failure(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    fail(run, UserError("reward.grader=x: gone"), started_at=2)
    assert outcome(run) == ("failed", 2, "UserError: reward.grader=x: gone")


def test_a_failure_at_the_start_of_a_resumed_run_keeps_its_step(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_state(run, "stopped", 7)
    fail(run, MemoryError("no room"), started_at=None)
    assert outcome(run) == ("failed", 7, "MemoryError: no room")


def test_any_rank_reports_a_failure_and_the_first_reason_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    write_state(run, "running", 3)
    monkeypatch.setenv("RANK", "1")
    fail(run, MemoryError("no room"), started_at=3)
    assert outcome(run) == ("failed", 3, "MemoryError: no room")
    fail(run, RuntimeError("connection closed by peer"), started_at=3)
    assert outcome(run) == ("failed", 3, "MemoryError: no room")


def test_a_directory_is_one_run_s_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with alone_in(RunDirectory(tmp_path / "run")):
        said = r"^run\.dir=run: a process of this machine is training in it; choose another run\.dir$"
        with pytest.raises(UserError, match=said), alone_in(RunDirectory(Path("run"))):
            pass
        with alone_in(RunDirectory(tmp_path / "another")):
            pass
    with alone_in(RunDirectory(Path("run"))):
        assert list(tmp_path.iterdir()) == []


def test_the_step_moves_with_every_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    config = config_for(run.path)
    with reporting_state(run) as progress:
        progress.started(config, lambda: 0)
        with open_loggers(run, config, completed_steps=0) as loggers:
            loggers.log(StepMetrics(3, {}))
            assert outcome(run) == ("running", 3, "")


def announced(capsys: pytest.CaptureFixture[str], *, train: Any, **objective: Any) -> list[str]:
    config = config_for(Path("runs/a"))
    config = parse_config(config.model_dump(by_alias=True) | {"objective": {"name": "nsr", "mini_batch_prompts": 8} | objective})
    inputs: Any = SimpleNamespace(train=train, benchmarks={}, backend=SimpleNamespace(device=SimpleNamespace(type="cpu")))
    announce(config, inputs)
    return capsys.readouterr().out.splitlines()


def test_training_tells_before_it_starts_where_it_departs_from_its_preset(capsys: pytest.CaptureFixture[str]) -> None:
    train = SimpleNamespace(prompts=[None] * 5, too_long=0)
    [first] = announced(capsys, train=train, preset="paper")
    assert first.startswith("runs/a: nsr, data.train 5 prompts; ") and first.endswith(" on cpu; starting ...")
    assert announced(capsys, train=train, preset="paper", aggregation="token_mean", entropy_coefficient=0.0)[1:] == [
        "objective.preset=paper holds except for objective.aggregation=token_mean (published: sequence_mean), "
        "objective.entropy_coefficient=0.0 (published: 0.0001)"
    ]
    [evaluation] = announced(capsys, train=None, preset="paper", aggregation="token_mean")  # which reads nothing of the objective
    assert evaluation.startswith("runs/a: evaluate, ")


class Lines:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logged: list[StepMetrics] = []

    def log(self, metrics: StepMetrics) -> None:
        self.logged.append(metrics)

    def close(self) -> None: ...


@pytest.mark.parametrize("gap", [0.02, math.inf, math.nan])
def test_a_gap_past_its_bound_or_no_number_stops_the_run_after_its_line(tmp_path: Path, gap: float) -> None:
    recorder, lines = Recorder(RunDirectory(tmp_path), config_for(tmp_path, max_logprob_gap=0.01)), Lines()
    with pytest.raises(RuntimeError, match=r"rollout/logprob_gap_max is .*, above rollout\.max_logprob_gap=0\.01"):
        recorder.check({"rollout/logprob_gap_max": gap}, lines, 3)
    assert [line.step for line in lines.logged] == [3]


@pytest.mark.parametrize(
    ("bound", "metrics"), [(0.01, {"heldout/logprob_gap_max": 0.01}), (0.01, {}), (None, {"heldout/logprob_gap_max": 5.0})]
)
def test_a_gap_within_its_bound_or_without_one_passes(bound: float | None, metrics: dict[str, float]) -> None:
    check_gap(metrics, "heldout", bound)


def test_an_evaluation_of_a_wrong_push_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"heldout/logprob_gap_max is 0\.5"):
        check_gap({"heldout/logprob_gap_max": 0.5}, "heldout", 0.01)
