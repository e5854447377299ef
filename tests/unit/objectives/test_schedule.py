"""Objectives that change over the run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.objectives.registry import build_objective
from megatron_nsr.objectives.schedule import LambdaSchedule, ObjectiveSchedule, scheduled
from megatron_nsr.objectives.signed import SignedObjective

LINE = {"start": 0.0, "final": 1.0, "shape": "linear", "start_step": 10, "end_step": 20}


@pytest.mark.parametrize(
    ("shape", "values"), [("linear", [0.0, 0.0, 0.1, 0.5, 1.0, 1.0]), ("cosine", [0.0, 0.0, 0.0244717, 0.5, 1.0, 1.0])]
)
def test_a_schedule_leads_from_its_first_step_to_its_last(shape: str, values: list[float]) -> None:
    found = [scheduled(step, **(LINE | {"shape": shape})) for step in (1, 10, 11, 15, 20, 500)]
    assert found == pytest.approx(values, abs=1e-6)


def test_a_schedule_without_length_jumps_after_its_step() -> None:
    assert [scheduled(step, **(LINE | {"start_step": 4, "end_step": 4})) for step in (3, 4, 5)] == [0.0, 0.0, 1.0]


@given(st.integers(1, 100), st.floats(0, 2), st.floats(0, 2), st.sampled_from(["linear", "cosine"]), st.integers(0, 40), st.integers(0, 40))
def test_a_schedule_stays_between_its_ends_and_never_turns_back(
    step: int, start: float, final: float, shape: str, first: int, length: int
) -> None:
    now, then = (scheduled(s, start=start, final=final, shape=shape, start_step=first, end_step=first + length) for s in (step, step + 1))
    low, high = sorted((start, final))
    assert low - 1e-12 <= now <= high + 1e-12
    assert (then - now) * (final - start) >= -1e-12


def test_lambda_moves_the_weight_of_positive_samples_alone() -> None:
    schedule = ObjectiveSchedule(SignedObjective(0.0, 1.0), lambda_schedule=LambdaSchedule(0.0, 1.0, "linear", 0, 4))
    assert [schedule.at(step) for step in (1, 4, 9)] == [SignedObjective(0.25, 1.0), SignedObjective(1.0, 1.0), SignedObjective(1.0, 1.0)]


def test_nsr_leads_to_any_objective() -> None:
    grpo = build_objective("grpo")
    schedule = ObjectiveSchedule(grpo, nsr_steps=2)
    assert [schedule.at(step) for step in (1, 2, 3)] == [build_objective("nsr"), build_objective("nsr"), grpo]
    assert ObjectiveSchedule(grpo).at(1) is grpo
