"""Verdicts to mini-batches of weighted samples: drop what has no loss, and say what each response token counts.

May import: types, objectives.objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_nsr.objectives.objective import Objective, SampleWeights
from megatron_nsr.types import Trajectory, Verdict, WeightedSample

Aggregation = Literal["sequence_mean", "token_mean", "budget_mean"]
Normalization = Literal["batch", "per_sign"]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step's training data: one list of kept samples an optimizer step, and the judged samples that were dropped."""

    mini_batches: tuple[tuple[WeightedSample, ...], ...]
    dropped: tuple[Trajectory, ...]


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
) -> StepBatch:
    """Weighs the step's trajectories, which are ordered by prompt and then by sample.

    `batch`: mini-batches are formed by prompt before anything is dropped, and the denominator counts the samples that
    have a verdict. `per_sign`: mini-batches of the same number of samples are re-formed from the kept samples alone,
    and count only those: fewer and larger updates, as in the paper's public code.
    """
    signed = _weigh(verdicts, objective, samples_per_prompt)
    weights, kept = signed.weights.flatten().tolist(), signed.kept.flatten().tolist()
    size = mini_batch_prompts * samples_per_prompt
    chosen = range(len(trajectories)) if normalization == "batch" else [i for i, keep in enumerate(kept) if keep]
    mini_batches = []
    for start in range(0, len(chosen), size):
        rows = chosen[start : start + size]
        counted = [trajectories[i] for i in rows if verdicts[i].reward is not None]
        scales = token_scales([trajectories[i] for i in rows], counted, aggregation, token_budget)
        samples = (WeightedSample(trajectories[i], weights[i], scale) for i, scale in zip(rows, scales, strict=True) if kept[i])
        mini_batches.append(tuple(samples))
    judged = (i for i, verdict in enumerate(verdicts) if verdict.reward is not None)
    return StepBatch(tuple(mini_batches), tuple(trajectories[i] for i in judged if not kept[i]))


def token_scales(
    samples: Sequence[Trajectory], counted: Sequence[Trajectory], aggregation: Aggregation, token_budget: int = 1
) -> list[float]:
    """What one response token of each sample counts: 1 / (T N) for sequence_mean, 1 / (sum of T) for token_mean, and for budget_mean
    1 / (token_budget N), the same whatever a response's length is (Dr. GRPO, arXiv 2503.20783).

    `counted` are the samples that form the denominator.
    """
    if aggregation == "budget_mean":
        return [1.0 / (token_budget * max(1, len(counted)))] * len(samples)
    if aggregation == "sequence_mean":
        return [1.0 / (sample.length * max(1, len(counted))) for sample in samples]
    return [1.0 / max(1, sum(sample.length for sample in counted))] * len(samples)


def _weigh(verdicts: Sequence[Verdict], objective: Objective, samples_per_prompt: int) -> SampleWeights:
    rewards = torch.tensor([verdict.reward or 0.0 for verdict in verdicts]).view(-1, samples_per_prompt)
    judged = torch.tensor([verdict.reward is not None for verdict in verdicts]).view(-1, samples_per_prompt)
    signed = objective.weigh(rewards, judged)
    if signed.weights.shape != rewards.shape or signed.kept.shape != rewards.shape:
        raise ValueError(f"objective returned weights of shape {tuple(signed.weights.shape)}, not {tuple(rewards.shape)}")
    if bool((signed.kept & ~judged).any()):
        raise ValueError("objective kept a sample that has no verdict")
    return signed
