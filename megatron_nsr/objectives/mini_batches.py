"""Verdicts to mini-batches of weighted samples: drop what has no loss, and say what each response token counts.

May import: types, objectives.objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_nsr.objectives.objective import Objective, SampleWeights
from megatron_nsr.types import Trajectory, Verdict, WeightedSample

Aggregation = Literal["sequence_mean", "token_mean", "budget_mean"]
Normalization = Literal["batch", "per_sign"]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step's training data: one list of kept samples an optimizer step, and the judged samples that were dropped.

    shares: where PPO's critic makes more updates than the policy, `mini_batches` are the critic's, and each of the policy's consists of
    the next len(shares[i]) of them that hold a sample: shares[i] are their parts of its denominator.
    """

    mini_batches: tuple[tuple[WeightedSample, ...], ...]
    dropped: tuple[Trajectory, ...]
    shares: tuple[tuple[float, ...], ...] = ()


def build_step_batch(
    trajectories: Sequence[Trajectory],
    verdicts: Sequence[Verdict],
    objective: Objective,
    *,
    samples_per_prompt: int,
    mini_batch_prompts: int,
    aggregation: Aggregation,
    normalization: Normalization,
    token_budget: int = 1,
    critic_mini_batch_prompts: int | None = None,
) -> StepBatch:
    """Weighs the step's trajectories, which are ordered by prompt and then by sample.

    `batch`: mini-batches are formed by prompt before anything is dropped, and the denominator counts the samples that
    have a verdict. `per_sign`: mini-batches of the same number of samples are re-formed from the kept samples alone,
    and count only those: fewer and larger updates, as in the paper's public code.
    critic_mini_batch_prompts divides mini_batch_prompts.
    """
    signed = _weigh(verdicts, objective, samples_per_prompt)
    weights, kept = signed.weights.flatten().tolist(), signed.kept.flatten().tolist()

    def mini_batch(rows: Sequence[int]) -> tuple[tuple[WeightedSample, ...], int]:
        counted = [trajectories[i] for i in rows if verdicts[i].reward is not None]
        scales = token_scales([trajectories[i] for i in rows], counted, aggregation, token_budget)
        samples = (WeightedSample(trajectories[i], weights[i], scale) for i, scale in zip(rows, scales, strict=True) if kept[i])
        return tuple(samples), denominator(counted, aggregation, token_budget)

    size = mini_batch_prompts * samples_per_prompt
    chosen = range(len(trajectories)) if normalization == "batch" else [i for i, keep in enumerate(kept) if keep]
    mini_batches = [mini_batch(rows) for rows in _cut(chosen, size)]
    judged = (i for i, verdict in enumerate(verdicts) if verdict.reward is not None)
    batch = StepBatch(tuple(samples for samples, _ in mini_batches), tuple(trajectories[i] for i in judged if not kept[i]))
    if critic_mini_batch_prompts is None:
        return batch
    parts = [[mini_batch(part) for part in _cut(rows, critic_mini_batch_prompts * samples_per_prompt)] for rows in _cut(chosen, size)]
    shares = (tuple(count / whole for samples, count in cut if samples) for cut, (_, whole) in zip(parts, mini_batches, strict=True))
    return replace(batch, mini_batches=tuple(samples for cut in parts for samples, _ in cut), shares=tuple(filter(None, shares)))


def denominator(counted: Sequence[Trajectory], aggregation: Aggregation, token_budget: int = 1) -> int:
    """What a mini-batch's sum is divided by: N samples for sequence_mean, their tokens for token_mean, and for budget_mean token_budget N,
    the same whatever a response's length is (Dr. GRPO, arXiv 2503.20783)."""
    if aggregation == "token_mean":
        return max(1, sum(sample.length for sample in counted))
    return max(1, len(counted)) * (token_budget if aggregation == "budget_mean" else 1)


def token_scales(
    samples: Sequence[Trajectory], counted: Sequence[Trajectory], aggregation: Aggregation, token_budget: int = 1
) -> list[float]:
    """What one response token of each sample counts: 1 / (T N) for sequence_mean, and one by the `denominator` otherwise.

    `counted` are the samples that form the denominator.
    """
    whole = denominator(counted, aggregation, token_budget)
    return [1.0 / (sample.length * whole if aggregation == "sequence_mean" else whole) for sample in samples]


def _cut(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _weigh(verdicts: Sequence[Verdict], objective: Objective, samples_per_prompt: int) -> SampleWeights:
    rewards = torch.tensor([verdict.reward or 0.0 for verdict in verdicts]).view(-1, samples_per_prompt)
    judged = torch.tensor([verdict.reward is not None for verdict in verdicts]).view(-1, samples_per_prompt)
    signed = objective.weigh(rewards, judged)
    if signed.weights.shape != rewards.shape or signed.kept.shape != rewards.shape:
        raise ValueError(f"objective returned weights of shape {tuple(signed.weights.shape)}, not {tuple(rewards.shape)}")
    if bool((signed.kept & ~judged).any()):
        raise ValueError("objective kept a sample that has no verdict")
    return signed
