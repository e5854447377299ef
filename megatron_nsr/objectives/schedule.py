"""Objectives that change over the run: lambda as a function of the step, and NSR as a warm-up to any other objective.

May import: the rest of objectives. A function of the step alone: nothing to save, nothing to lose on resume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_nsr.objectives.objective import Objective
from megatron_nsr.objectives.signed import SignedObjective

Shape = Literal["linear", "cosine"]


def scheduled(step: int, *, start: float, final: float, shape: Shape, start_step: int, end_step: int) -> float:
    """`start` up to step `start_step`, `final` from step `end_step` on, in between a line or half a cosine; steps count from 1."""
    if step <= start_step:
        return start
    if step >= end_step:
        return final
    progress = (step - start_step) / (end_step - start_step)
    if shape == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return start + (final - start) * progress


@dataclass(frozen=True, slots=True)
class LambdaSchedule:
    """W-REINFORCE whose weight of positive samples moves: from 0 to 1 it leads from NSR to REINFORCE."""

    start: float
    final: float
    shape: Shape
    start_step: int
    end_step: int

    def at(self, step: int) -> SignedObjective:
        """The objective of a training step."""
        value = scheduled(step, start=self.start, final=self.final, shape=self.shape, start_step=self.start_step, end_step=self.end_step)
        return SignedObjective(value, 1.0)


@dataclass(frozen=True, slots=True)
class ObjectiveSchedule:
    """NSR in the first `nsr_steps` training steps, then `objective`, or `lambda_schedule` where there is one."""

    objective: Objective
    nsr_steps: int = 0
    lambda_schedule: LambdaSchedule | None = None

    def at(self, step: int) -> Objective:
        """The objective of a training step, counted from 1."""
        if step <= self.nsr_steps:
            return SignedObjective(0.0, 1.0)
        return self.lambda_schedule.at(step) if self.lambda_schedule else self.objective
