"""Sums over tokens that become a step's policy metrics, and their reduction over ranks.

May import: types, losses, training.parallel_groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_nsr.losses.policy_head import HeadOutputs
from megatron_nsr.training.parallel_groups import ParallelGroups
from megatron_nsr.types import TrainBatch

_MEASURED = ("tokens", "entropy", "logprob", "gap")
_UPDATED = ("loss", "loss_psr", "loss_nsr", "tokens_psr", "tokens_nsr", "clipped_psr", "clipped_nsr")


@dataclass
class TokenSums:
    """Additive sums over this rank's response tokens, and the largest log-prob gap, which is not additive."""

    sums: dict[str, float] = field(default_factory=dict)
    max_gap: float = 0.0

    def add(self, name: str, value: torch.Tensor | float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def reduced(self, groups: ParallelGroups, names: Sequence[str]) -> TokenSums:
        """The sums over all data-parallel ranks, equal on every rank; only last pipeline stages contribute."""
        values = torch.tensor([self.sums.get(name, 0.0) for name in names], dtype=torch.float64)
        totals = groups.sum_over_last_stages(values).tolist()
        (max_gap,) = groups.max_over_world(torch.tensor([self.max_gap], dtype=torch.float64)).tolist()
        return TokenSums(dict(zip(names, totals, strict=True)), max_gap)


def measure(batches: Sequence[TrainBatch], outputs: Sequence[HeadOutputs]) -> TokenSums:
    """Entropy of the policy and |engine - policy| log-prob over response tokens; empty on stages that have no outputs."""
    total = TokenSums()
    for batch, output in zip(batches, outputs, strict=False):
        mask = batch.response_mask
        gap = (output.logprobs - batch.rollout_logprobs.to(output.logprobs))[mask].abs()
        total.add("tokens", mask.sum())
        total.add("entropy", output.entropy[mask].double().sum())
        total.add("logprob", output.logprobs[mask].double().sum())
        total.add("gap", gap.double().sum())
        # A log-prob that is no number is an infinite gap: max() of Python and of gloo may pass over a NaN.
        total.max_gap = max(total.max_gap, float(gap.nan_to_num(nan=torch.inf).max()) if len(gap) else 0.0)
    return total


def measure_update(batches: Sequence[TrainBatch], outputs: Sequence[HeadOutputs], entropy_coefficient: float) -> TokenSums:
    """The mini-batch's loss, split by the sign of the weight; the per-sign losses leave the entropy bonus out."""
    total = TokenSums()
    for batch, output in zip(batches, outputs, strict=False):
        policy_loss = (output.token_loss + entropy_coefficient * batch.scale * output.entropy).double()
        total.add("loss", output.token_loss.double().sum())
        for name, chosen in (("psr", (batch.weights > 0) & (batch.scale > 0)), ("nsr", (batch.weights < 0) & (batch.scale > 0))):
            total.add(f"loss_{name}", policy_loss[chosen].sum())
            total.add(f"tokens_{name}", chosen.sum())
            total.add(f"clipped_{name}", output.clipped[chosen].sum())
    return total


def measured_metrics(kept: TokenSums, probed: TokenSums, probe_weight: float, groups: ParallelGroups) -> dict[str, float]:
    """Entropy and gap of the step's samples, each dropped sample that was measured counting `probe_weight` times."""
    kept, probed = kept.reduced(groups, _MEASURED), probed.reduced(groups, _MEASURED)
    tokens, entropy, logprob, gap = (kept.sums[name] + probe_weight * probed.sums[name] for name in _MEASURED)
    if not tokens:
        return {}
    return {
        "policy/entropy": entropy / tokens,
        "policy/logprob": logprob / tokens,
        "rollout/logprob_gap_mean": gap / tokens,
        "rollout/logprob_gap_max": max(kept.max_gap, probed.max_gap),
    }


def update_metrics(updates: Sequence[TokenSums], grad_norms: Sequence[float], groups: ParallelGroups) -> dict[str, float]:
    """Means over the step's optimizer updates; clip fractions over its tokens."""
    metrics = {"policy/updates": float(len(updates))}
    if not updates:
        return metrics
    reduced = [update.reduced(groups, _UPDATED).sums for update in updates]
    metrics["policy/grad_norm"] = sum(grad_norms) / len(grad_norms)
    for name in ("loss", "loss_psr", "loss_nsr"):
        metrics[f"policy/{name}"] = sum(sums[name] for sums in reduced) / len(reduced)
    for sign in ("psr", "nsr"):
        tokens = sum(sums[f"tokens_{sign}"] for sums in reduced)
        if tokens:
            metrics[f"policy/clip_fraction_{sign}"] = sum(sums[f"clipped_{sign}"] for sums in reduced) / tokens
    return metrics
