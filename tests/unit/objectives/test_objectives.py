"""Weights and mini-batches against the formulas, with the groups at the edge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.objective_fields import NAMES
from megatron_nsr.objectives.mini_batches import build_step_batch
from megatron_nsr.objectives.registry import build_objective
from megatron_nsr.types import Outcome, Reason, Trajectory, UserError, Verdict

CORRECT = Verdict(Outcome.CORRECT, Reason.MATCH)
WRONG = Verdict(Outcome.WRONG, Reason.MISMATCH)
TIMEOUT = Verdict(Outcome.NONE, Reason.TIMEOUT)
VERDICTS = {"+": CORRECT, "-": WRONG, "0": TIMEOUT}


def objective(name: str, lambda_: float = 0.1, regularized: bool = True):
    return build_objective(name, lambda_=lambda_, regularized=regularized)


def weigh(name: str, *groups: str, **settings: Any):
    rewards = torch.tensor([[VERDICTS[mark].reward or 0.0 for mark in group] for group in groups])
    judged = torch.tensor([[mark != "0" for mark in group] for group in groups])
    return objective(name, **settings).weigh(rewards, judged)


def step(name: str, groups: list[str], lengths: list[int] | None = None, *, prompts: int | None = None, **settings):
    verdicts = [VERDICTS[mark] for group in groups for mark in group]
    lengths = lengths or [2] * len(verdicts)
    trajectories = [
        Trajectory(i // len(groups[0]), i, (1,), np.zeros(n, np.int32), np.zeros(n, np.float32), "stop", 0) for i, n in enumerate(lengths)
    ]
    return build_step_batch(
        trajectories,
        verdicts,
        objective(name),
        samples_per_prompt=len(groups[0]),
        mini_batch_prompts=prompts or len(groups),
        aggregation=settings.get("aggregation", "sequence_mean"),
        normalization=settings.get("normalization", "batch"),
        token_budget=settings.get("token_budget", 1),
        critic_mini_batch_prompts=settings.get("critic_mini_batch_prompts"),
    )


@pytest.mark.parametrize(
    ("name", "weights", "kept"),
    [
        ("psr", [1, 0, 0], [True, False, False]),
        ("nsr", [0, -1, 0], [False, True, False]),
        ("w_reinforce", [0.1, -1, 0], [True, True, False]),
        ("reinforce", [1, -1, 0], [True, True, False]),
    ],
)
def test_signed_objectives(name: str, weights: list[float], kept: list[bool]) -> None:
    signed = weigh(name, "+-0")
    torch.testing.assert_close(signed.weights, torch.tensor([weights], dtype=torch.float32))
    assert signed.kept.tolist() == [kept]


@given(st.text("+-0", min_size=1, max_size=9))
def test_lambda_one_is_reinforce_and_lambda_zero_is_nsr_bitwise(group: str) -> None:
    for lambda_, other in ((1.0, "reinforce"), (0.0, "nsr")):
        mine, theirs = weigh("w_reinforce", group, lambda_=lambda_), weigh(other, group)
        assert torch.equal(mine.weights, theirs.weights) and torch.equal(mine.kept, theirs.kept)


@given(st.text("+-0", min_size=1, max_size=9))
def test_grpo_normalises_within_the_judged_samples_of_a_group(group: str) -> None:
    signed = weigh("grpo", group)
    judged = np.array([mark != "0" for mark in group])
    rewards = np.array([VERDICTS[mark].reward or 0.0 for mark in group])[judged]
    expected = np.zeros(len(group))
    if len(set(rewards)) > 1:
        expected[judged] = (rewards - rewards.mean()) / rewards.std(ddof=1)
    np.testing.assert_allclose(signed.weights[0].numpy(), expected, atol=1e-6)
    assert signed.kept[0].tolist() == judged.tolist()  # without spread a group still carries the entropy bonus


def test_grpo_without_entropy_drops_groups_without_spread() -> None:
    signed = weigh("grpo", "++++", "+-++", regularized=False)
    assert signed.kept.tolist() == [[False] * 4, [True] * 4]


def test_sequence_mean_counts_every_judged_sample_of_the_mini_batch() -> None:
    (mini,) = step("nsr", ["+-", "0-"], [2, 4, 3, 5]).mini_batches
    assert [(s.weight, s.scale) for s in mini] == [(-1.0, 1 / (4 * 3)), (-1.0, 1 / (5 * 3))]


def test_token_mean_counts_every_judged_token_of_the_mini_batch() -> None:
    (mini,) = step("nsr", ["+-", "0-"], [2, 4, 3, 5], aggregation="token_mean").mini_batches
    assert [s.scale for s in mini] == [1 / 11, 1 / 11]


def test_mini_batches_are_formed_by_prompt_before_anything_is_dropped() -> None:
    batch = step("nsr", ["++", "+-", "--", "++"], prompts=2)
    assert [[s.trajectory.sample for s in mini] for mini in batch.mini_batches] == [[3], [4, 5]]
    assert [trajectory.sample for trajectory in batch.dropped] == [0, 1, 2, 6, 7]


def test_per_sign_reforms_fewer_mini_batches_from_the_kept_samples() -> None:
    batch = step("nsr", ["++", "+-", "--", "++"], prompts=2, normalization="per_sign")
    (mini,) = batch.mini_batches
    assert [(s.trajectory.sample, s.scale) for s in mini] == [(3, 1 / 6), (4, 1 / 6), (5, 1 / 6)]


@pytest.mark.parametrize("normalization", ["batch", "per_sign"])
def test_all_correct_leaves_nsr_nothing(normalization: str) -> None:
    batch = step("nsr", ["++", "++"], normalization=normalization)
    assert [len(mini) for mini in batch.mini_batches] in ([0], [])
    assert len(batch.dropped) == 4


def test_samples_without_a_verdict_are_neither_kept_nor_dropped() -> None:
    batch = step("reinforce", ["00", "0+"])
    assert [s.trajectory.sample for s in batch.mini_batches[0]] == [3]
    assert batch.dropped == ()


@given(
    groups=st.lists(st.text("+-0", min_size=2, max_size=2), min_size=1, max_size=8),
    critic_prompts=st.sampled_from([1, 2]),
    aggregation=st.sampled_from(["sequence_mean", "token_mean", "budget_mean"]),
    normalization=st.sampled_from(["batch", "per_sign"]),
    data=st.data(),
)
def test_the_critic_s_smaller_mini_batches_join_to_the_policy_s(
    groups: list[str], critic_prompts: int, aggregation: str, normalization: str, data: st.DataObject
) -> None:
    count = 2 * len(groups)
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    settings = {"prompts": 4, "aggregation": aggregation, "normalization": normalization, "token_budget": 9}
    whole = [samples for samples in step("ppo", groups, lengths, **settings).mini_batches if samples]
    parts = step("ppo", groups, lengths, **settings, critic_mini_batch_prompts=critic_prompts)

    remaining = iter([samples for samples in parts.mini_batches if samples])
    joined = [[(sample, share) for share in shares for sample in next(remaining)] for shares in parts.shares]
    assert next(remaining, None) is None
    assert [[s.trajectory.sample for s in samples] for samples in whole] == [
        [s.trajectory.sample for s, _ in samples] for samples in joined
    ]
    for samples, shared in zip(whole, joined, strict=True):
        assert [s.scale * share for s, share in shared] == pytest.approx([s.scale for s in samples])
    for samples in filter(None, parts.mini_batches):
        assert len(samples) <= 2 * critic_prompts
        counted = {"budget_mean": 9 * len(samples)}.get(aggregation, sum(s.trajectory.length for s in samples))
        mean = [1 / (s.trajectory.length * len(samples)) if aggregation == "sequence_mean" else 1 / counted for s in samples]
        assert [s.scale for s in samples] == pytest.approx(mean)  # an update of the critic is a mean over its own mini-batch


def test_every_objective_with_rollouts_can_be_built() -> None:
    assert all(objective(name) for name in NAMES if name != "supervised")
    with pytest.raises(UserError, match=r"objective\.name='ppq': write an import path as module:Class"):
        objective("ppq")


class KeepsUnjudged:
    def weigh(self, rewards, judged):
        from megatron_nsr.objectives.objective import SampleWeights

        return SampleWeights(rewards, torch.ones_like(judged))


def test_a_users_objective_may_not_keep_what_has_no_verdict() -> None:
    path = f"{__name__}:KeepsUnjudged"
    own = build_objective(path)
    with pytest.raises(ValueError, match="kept a sample that has no verdict"):
        build_step_batch([], [TIMEOUT], own, samples_per_prompt=1, mini_batch_prompts=1, aggregation="token_mean", normalization="batch")


class NeedsArguments:
    def __init__(self, scale: float) -> None:
        self.scale = scale


class Weightless:
    weigh = 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NeedsArguments", r"building it raised TypeError: .*missing 1 required positional argument: 'scale'"),
        ("Weightless", r"it has no method weigh\(rewards, judged\)"),
        ("Absent", f"module {__name__} has no Absent"),
    ],
)
def test_an_objective_that_cannot_be_used_is_the_users_error(name: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^objective\.name='{__name__}:{name}': {message}$"):
        objective(f"{__name__}:{name}")
