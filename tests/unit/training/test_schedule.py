"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from megatron_nsr.training.schedule import learning_rate


def rates(steps: int, **changes: Any) -> list[float]:
    settings: dict[str, Any] = {"peak": 1.0, "final": 0.0, "schedule": "constant", "warmup_steps": 0, "total_steps": steps} | changes
    return [learning_rate(step, **settings) for step in range(steps)]


def test_constant_without_warm_up_is_the_peak_from_the_first_step() -> None:
    assert rates(4, peak=1e-6) == [1e-6] * 4


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_rises_evenly_and_never_starts_at_zero(schedule: str) -> None:
    assert rates(8, schedule=schedule, warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_from_the_peak_past_the_middle_to_the_final_rate() -> None:
    got = rates(10, peak=3.0, final=1.0, schedule="cosine", warmup_steps=2, total_steps=10)
    assert got[2] == 3.0
    assert got[6] == pytest.approx(2.0)
    assert got[9] == pytest.approx(2.0 + math.cos(math.pi * 7 / 8))
    assert all(later < earlier for earlier, later in pairwise(got[2:]))


def test_cosine_stays_at_the_final_rate_after_the_last_step() -> None:
    assert learning_rate(25, peak=3.0, final=1.0, schedule="cosine", warmup_steps=2, total_steps=10) == pytest.approx(1.0)


def test_a_run_that_ends_within_its_warm_up_never_reaches_the_peak() -> None:
    assert rates(3, schedule="cosine", warmup_steps=10, total_steps=3) == pytest.approx([0.1, 0.2, 0.3])
    assert learning_rate(10, peak=1.0, final=0.5, schedule="cosine", warmup_steps=10, total_steps=10) == 1.0
