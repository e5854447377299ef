from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.rewards.verdicts import grade_trajectories
from megatron_nsr.types import Outcome, Prompt, Reason, Trajectory, Verdict


def trajectory(prompt: int, text: str, finish_reason: str = "stop") -> Trajectory:
    return Trajectory(prompt, 0, (), np.zeros(1, np.int32), np.zeros(1, np.float32), finish_reason, 0, text)


@pytest.mark.parametrize(("truncated", "outcome"), [("wrong", Outcome.WRONG), ("masked", Outcome.NONE)])
def test_each_trajectory_is_graded_against_its_own_prompt(truncated: Literal["wrong", "masked"], outcome: Outcome) -> None:
    prompts = [Prompt("a", "", (), "1"), Prompt("b", "", (), "2")]
    trajectories = [trajectory(1, r"\boxed{2}"), trajectory(0, r"\boxed{1}", "length"), trajectory(0, r"\boxed{2}"), trajectory(1, "2")]
    with GraderPool("math_verify", workers=1, timeout_s=20, memory_limit_mib=512, cache_size=10) as pool:
        verdicts = grade_trajectories(trajectories, prompts, pool, truncated)
    assert verdicts == [
        Verdict(Outcome.CORRECT, Reason.MATCH, "2"),
        Verdict(outcome, Reason.TRUNCATED),
        Verdict(Outcome.WRONG, Reason.MISMATCH, "2"),
        Verdict(Outcome.WRONG, Reason.NO_BOX),
    ]
