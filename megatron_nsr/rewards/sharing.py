"""Grading shared among the ranks, which all hold all trajectories. May import: platform, types, the rest of rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from megatron_nsr.platform import distributed
from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.rewards.verdicts import grade_trajectories
from megatron_nsr.types import NoVerdicts, Outcome, Prompt, Reason, Trajectory, Verdict


def grade_shared(
    trajectories: Sequence[Trajectory], prompts: Sequence[Prompt], pool: GraderPool, truncated: Literal["wrong", "masked"]
) -> list[Verdict]:
    """Every rank grades its share and gets all verdicts, in the trajectories' order. A collective call."""
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = grade_trajectories(trajectories[rank::world_size], prompts, pool, truncated)
    shares = distributed.all_gather_object(mine)
    return [shares[index % world_size][index // world_size] for index in range(len(trajectories))]


def require_verdicts(verdicts: Sequence[Verdict], pool: GraderPool, grader: str) -> None:
    """Raises NoVerdicts where responses were graded and none of all has a verdict. A collective call. grader: as the config names it.

    Truncated responses alone do not raise: nobody has graded them.
    """
    reasons = Counter(verdict.reason for verdict in verdicts)
    if any(verdict.outcome is not Outcome.NONE for verdict in verdicts) or reasons.keys() <= {Reason.TRUNCATED}:
        return
    counts = ", ".join(f"{reason.value} {count}" for reason, count in reasons.most_common())
    raised = next(filter(None, distributed.all_gather_object(pool.last_exception)), "")
    last = f"; the grader's last exception was {raised}" if Reason.CRASH in reasons and raised else ""
    raise NoVerdicts(f"reward.grader={grader}: none of the step's {len(verdicts)} responses has a verdict ({counts}){last}")
