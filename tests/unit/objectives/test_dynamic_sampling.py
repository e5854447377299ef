"""Which prompts of a step give way, and to which."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.objectives.dynamic_sampling import Group, grouped, refilled
from megatron_nsr.types import Outcome, Prompt, Reason, Trajectory, Verdict

VERDICTS = {
    "+": Verdict(Outcome.CORRECT, Reason.MATCH),
    "-": Verdict(Outcome.WRONG, Reason.MISMATCH),
    "0": Verdict(Outcome.NONE, Reason.TIMEOUT),
}
MARKS = st.lists(st.text("+-0", min_size=3, max_size=3), max_size=8)


def groups(marks: list[str], first: int = 0) -> list[Group]:
    return [Group(Prompt(str(first + i), "", (), ""), (), tuple(VERDICTS[mark] for mark in group)) for i, group in enumerate(marks)]


def one(sample: int) -> Trajectory:
    return Trajectory(sample // 3, sample % 3, (1,), np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", 0)


def test_a_group_is_mixed_only_with_both_verdicts() -> None:
    assert [group.mixed for group in groups(["+++", "---", "+-0", "+00", "00-", "000", "-++"])] == [False, False, True, *[False] * 3, True]


def test_groups_are_cut_from_what_is_ordered_by_prompt_and_sample() -> None:
    prompts, trajectories = [Prompt(name, "", (), "") for name in "ab"], [one(i) for i in range(6)]
    verdicts = [VERDICTS[mark] for mark in "+-0--+"]
    first, second = grouped(prompts, trajectories, verdicts, 3)
    assert (first.prompt.id, first.trajectories, first.verdicts) == ("a", tuple(trajectories[:3]), tuple(verdicts[:3]))
    assert (second.prompt.id, second.trajectories, second.verdicts) == ("b", tuple(trajectories[3:]), tuple(verdicts[3:]))


@given(MARKS, MARKS)
def test_only_unmixed_groups_give_way_and_only_to_mixed_ones_in_order(present: list[str], further: list[str]) -> None:
    before, spare = groups(present), groups(further, first=100)
    after = refilled(before, spare)
    assert len(after) == len(before)
    changed = [new for old, new in zip(before, after, strict=True) if new is not old]
    assert all(not old.mixed for old, new in zip(before, after, strict=True) if new is not old)
    mixed = [group for group in spare if group.mixed]
    wanted = sum(not group.mixed for group in before)
    assert changed == mixed[:wanted]
