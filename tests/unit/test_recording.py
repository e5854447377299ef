"""state.json after a failure, and the bound on the log-prob gap."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_nsr.config import Config, parse_config
from megatron_nsr.observability.run_directory import RunDirectory
from megatron_nsr.observability.state import read_state, write_state
from megatron_nsr.recording import Recorder, reporting_state
from megatron_nsr.types import UserError


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


def gaps(largest: float, mean: float) -> dict[str, float]:
    return {"rollout/logprob_gap_max": largest, "rollout/logprob_gap_mean": mean}


@pytest.mark.parametrize(("largest", "mean"), [(0.02, 0.001), (math.inf, math.inf), (0.0, math.nan)])
def test_a_gap_past_its_bound_or_no_number_stops_the_run(tmp_path: Path, largest: float, mean: float) -> None:
    recorder = Recorder(RunDirectory(tmp_path), config_for(tmp_path, max_logprob_gap=0.01), ())
    with pytest.raises(RuntimeError, match=r"rollout/logprob_gap_max is .*, above rollout\.max_logprob_gap=0\.01"):
        recorder.check(gaps(largest, mean))


def test_a_gap_within_its_bound_or_without_one_passes(tmp_path: Path) -> None:
    Recorder(RunDirectory(tmp_path), config_for(tmp_path, max_logprob_gap=0.01), ()).check(gaps(0.01, 0.001))
    Recorder(RunDirectory(tmp_path), config_for(tmp_path, max_logprob_gap=0.01), ()).check({})
    Recorder(RunDirectory(tmp_path), config_for(tmp_path), ()).check(gaps(5.0, 1.0))
