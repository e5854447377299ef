"""Verdicts for a step's trajectories.

May import: types and this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.types import Outcome, Prompt, Reason, Trajectory, Verdict


def grade_trajectories(
    trajectories: Sequence[Trajectory], prompts: Sequence[Prompt], pool: GraderPool, truncated: Literal["wrong", "masked"]
) -> list[Verdict]:
    """One verdict a trajectory, in order; `Trajectory.prompt` indexes `prompts`.

    A truncated response is not graded, even if it has a box: it is wrong/truncated, or none/truncated where they are masked.
    """
    cut = Verdict(Outcome.WRONG if truncated == "wrong" else Outcome.NONE, Reason.TRUNCATED)
    graded = iter(pool.grade([(item.text, prompts[item.prompt]) for item in trajectories if not item.truncated]))
    return [cut if item.truncated else next(graded) for item in trajectories]
