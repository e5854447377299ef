"""Grading shared among the ranks, which all hold all trajectories. May import: platform, types, the rest of rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron_nsr.platform import distributed
from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.rewards.verdicts import grade_trajectories
from megatron_nsr.types import Prompt, Trajectory, Verdict


def grade_shared(
    trajectories: Sequence[Trajectory], prompts: Sequence[Prompt], pool: GraderPool, truncated: Literal["wrong", "masked"]
) -> list[Verdict]:
    """Every rank grades its share and gets all verdicts, in the trajectories' order. A collective call."""
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = grade_trajectories(trajectories[rank::world_size], prompts, pool, truncated)
    shares = distributed.all_gather_object(mine)
    return [shares[index % world_size][index // world_size] for index in range(len(trajectories))]
