"""Sums over tokens that become a step's policy metrics, and their reduction over ranks.

May import: types, losses, training.parallel_groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_nsr.losses.policy_head import HeadOutputs
from megatron_nsr.losses.terms import LossTerms, k3
from megatron_nsr.training.parallel_groups import ParallelGroups
from megatron_nsr.types import TrainBatch

_MEASURED = ("tokens", "entropy", "logprob", "gap", "kl_reference", "tokens_with_reference")
_SIGNS = ("psr", "nsr")
_VECTORS = ("loss", "clipped", "entropy", "logprob", "input_grad_sq")
# The head does not always give the last two: the tokens that had them tell "none" from 0.
_BY_SIGN = ("tokens", *_VECTORS, "tokens_with_clipped", "tokens_with_input_grad_sq")
_UPDATED = ("loss", "correction", *(f"{name}_{sign}" for name in _BY_SIGN for sign in _SIGNS))


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
    """Entropy, KL to a reference and |engine - policy| log-prob over response tokens; empty on stages that have no outputs."""
    total = TokenSums()
    for batch, output in zip(batches, outputs, strict=False):
        mask = batch.response_mask
        gap = (output.logprobs - batch.rollout_logprobs.to(output.logprobs))[mask].abs()
        total.add("tokens", mask.sum())
        total.add("entropy", output.entropy[mask].double().sum())
        total.add("logprob", output.logprobs[mask].double().sum())
        total.add("gap", gap.double().sum())
        if batch.reference_logprobs is not None:
            total.add("kl_reference", k3(output.logprobs, batch.reference_logprobs)[mask].double().sum())
            total.add("tokens_with_reference", mask.sum())
        # A log-prob that is no number is an infinite gap: max() of Python and of gloo may pass over a NaN.
        total.max_gap = max(total.max_gap, float(gap.nan_to_num(nan=torch.inf).max()) if len(gap) else 0.0)
    return total


def measure_update(batches: Sequence[TrainBatch], outputs: Sequence[HeadOutputs], terms: LossTerms) -> TokenSums:
    """The mini-batch's loss and what the head measured with it, split by the sign of the weight.

    The per-sign losses leave entropy bonus and KL term out.
    """
    total = TokenSums()
    for batch, output in zip(batches, outputs, strict=False):
        policy_loss = output.token_loss + terms.entropy_coefficient * batch.scale * output.entropy
        if batch.reference_logprobs is not None:
            policy_loss = policy_loss - terms.kl_coefficient * batch.scale * k3(output.logprobs, batch.reference_logprobs)
        total.add("loss", output.token_loss.double().sum())
        if terms.correction_cap is not None:
            trained = (batch.weights != 0) & (batch.scale > 0)
            total.add("correction", _corrections(batch, output, terms.correction_cap)[trained].double().sum())
        for sign, chosen in (("psr", (batch.weights > 0) & (batch.scale > 0)), ("nsr", (batch.weights < 0) & (batch.scale > 0))):
            total.add(f"tokens_{sign}", chosen.sum())
            vectors = (policy_loss, output.clipped, output.entropy, output.logprobs, output.input_grad_sq)
            for name, vector in zip(_VECTORS, vectors, strict=True):
                if vector is not None:
                    total.add(f"{name}_{sign}", vector[chosen].double().sum())
                    total.add(f"tokens_with_{name}_{sign}", chosen.sum())
    return total


def _corrections(batch: TrainBatch, output: HeadOutputs, cap: float) -> torch.Tensor:
    """The weights that the rollout correction put on the tokens."""
    old = output.logprobs if batch.old_logprobs is None else batch.old_logprobs
    return (old - batch.rollout_logprobs).exp().clamp(max=cap)


def measured_metrics(kept: TokenSums, probed: TokenSums, probe_weight: float, groups: ParallelGroups) -> dict[str, float]:
    """Entropy and gap of the step's samples, each dropped sample that was measured counting `probe_weight` times."""
    kept, probed = kept.reduced(groups, _MEASURED), probed.reduced(groups, _MEASURED)
    sums = {name: kept.sums[name] + probe_weight * probed.sums[name] for name in _MEASURED}
    tokens = sums["tokens"]
    if not tokens:
        return {}
    metrics = {
        "policy/entropy": sums["entropy"] / tokens,
        "policy/logprob": sums["logprob"] / tokens,
        "rollout/logprob_gap_mean": sums["gap"] / tokens,
        "rollout/logprob_gap_max": max(kept.max_gap, probed.max_gap),
    }
    if sums["tokens_with_reference"]:
        metrics["policy/kl_reference"] = sums["kl_reference"] / sums["tokens_with_reference"]
    return metrics


def update_metrics(updates: Sequence[TokenSums], grad_norms: Sequence[float], groups: ParallelGroups) -> dict[str, float]:
    """Losses and gradient norms as means over the step's optimizer updates; the rest as means over its tokens."""
    metrics = {"policy/updates": float(len(updates))}
    if not updates:
        return metrics
    reduced = [update.reduced(groups, _UPDATED).sums for update in updates]
    metrics["policy/grad_norm"] = sum(grad_norms) / len(grad_norms)
    for name in ("loss", "loss_psr", "loss_nsr"):
        metrics[f"policy/{name}"] = sum(sums[name] for sums in reduced) / len(reduced)
    for sign in _SIGNS:
        metrics |= _sign_metrics(reduced, sign)
    tokens = sum(sums[f"tokens_{sign}"] for sums in reduced for sign in _SIGNS)
    if tokens and any(sums["correction"] for sums in reduced):
        metrics["rollout/correction_mean"] = sum(sums["correction"] for sums in reduced) / tokens
    return metrics


def _sign_metrics(reduced: Sequence[dict[str, float]], sign: str) -> dict[str, float]:
    """What the tokens of one sign have; nothing where there are none."""
    total = {name: sum(sums[f"{name}_{sign}"] for sums in reduced) for name in _BY_SIGN}
    if not total["tokens"]:
        return {}
    metrics = {
        f"policy/entropy_{sign}": total["entropy"] / total["tokens"],
        f"policy/logprob_{sign}": total["logprob"] / total["tokens"],
    }
    if total["tokens_with_clipped"]:
        metrics[f"policy/clip_fraction_{sign}"] = total["clipped"] / total["tokens"]
    if total["tokens_with_input_grad_sq"]:
        norms = [math.sqrt(sums[f"input_grad_sq_{sign}"]) for sums in reduced]
        metrics[f"policy/grad_norm_head_{sign}"] = sum(norms) / len(norms)
    return metrics
