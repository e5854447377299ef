"""Kept trajectories: what was sampled, what the grader read, and back from disk unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_nsr.observability.samples import read_samples, sample_rows, write_samples
from megatron_nsr.types import Outcome, Prompt, Reason, Trajectory, UserError, Verdict

PROMPTS = [Prompt("p0", "2+3?", (1,), "5"), Prompt("p1", "6/8?", (1,), "3/4")]


def trajectory(prompt: int, logprobs: list[float], text: str, finish_reason: str = "stop") -> Trajectory:
    ids = np.arange(len(logprobs), dtype=np.int32)
    return Trajectory(prompt, 0, (1,), ids, np.array(logprobs, dtype=np.float32), finish_reason, weight_version=7, text=text)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    trajectories = [trajectory(1, [-0.5, -1.5], "\\boxed{¾} ✓\n"), trajectory(0, [], "", "length")]
    verdicts = [Verdict(Outcome.CORRECT, Reason.MATCH, "¾"), Verdict(Outcome.NONE, Reason.TIMEOUT)]
    rows = sample_rows(4, PROMPTS, trajectories, verdicts)
    write_samples(tmp_path / "samples" / "step_4.parquet", rows)
    assert read_samples(tmp_path / "samples" / "step_4.parquet") == rows
    first, second = rows
    assert (first.step, first.prompt_id, first.answer, first.extracted, first.outcome, first.reason) == (
        4,
        "p1",
        "3/4",
        "¾",
        "correct",
        "match",
    )
    assert (first.length, first.mean_logprob, first.weight_version) == (2, -1.0, 7)
    assert (second.length, second.mean_logprob, second.extracted, second.finish_reason) == (0, None, None, "length")


def test_no_rows_are_a_file_too(tmp_path: Path) -> None:
    write_samples(tmp_path / "step_1.parquet", [])
    assert read_samples(tmp_path / "step_1.parquet") == []


def test_a_verdict_missing_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        sample_rows(1, PROMPTS, [trajectory(0, [-1.0], "a")], [])


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "step_1.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"step_1\.parquet: not a file of samples"):
        read_samples(tmp_path / "step_1.parquet")
