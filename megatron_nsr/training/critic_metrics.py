"""Sums over tokens that become a step's critic metrics. May import: types, losses, training.measurements, training.parallel_groups."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_nsr.losses.value_head import ValueOutputs
from megatron_nsr.training.measurements import TokenSums
from megatron_nsr.training.parallel_groups import ParallelGroups
from megatron_nsr.types import TrainBatch

_SUMS = ("tokens", "loss", "clipped", "value", "return", "return_sq", "error", "error_sq")
MIN_SPREAD = 1e-12  # of returns: below it they are equal up to rounding, and nothing is to be explained


def measure_critic(batches: Sequence[TrainBatch], outputs: Sequence[ValueOutputs]) -> TokenSums:
    """A mini-batch's loss, and how far values were from returns before the step's first update; empty on stages without outputs."""
    total = TokenSums()
    for batch, output in zip(batches, outputs, strict=False):
        assert batch.returns is not None and batch.old_values is not None
        returns, values = batch.returns[batch.response_rows].double(), batch.old_values[batch.response_rows].double()
        total.add("tokens", len(returns))
        total.add("loss", output.token_loss.double().sum())
        total.add("clipped", output.clipped.sum())
        total.add("value", values.sum())
        total.add("return", returns.sum())
        total.add("return_sq", returns.square().sum())
        total.add("error", (returns - values).sum())
        total.add("error_sq", (returns - values).square().sum())
    return total


def critic_metrics(updates: Sequence[TokenSums], grad_norms: Sequence[float], groups: ParallelGroups) -> dict[str, float]:
    """Losses and gradient norms as means over the step's optimizer updates; the rest as means over its response tokens."""
    if not updates:
        return {}
    reduced = [update.reduced(groups, _SUMS).sums for update in updates]
    tokens, loss, clipped, value, *moments = (sum(sums[name] for sums in reduced) for name in _SUMS)
    metrics = {
        "critic/loss": loss / len(updates),
        "critic/grad_norm": sum(grad_norms) / len(grad_norms),
        "critic/value_mean": value / tokens,
        "critic/clip_ratio": clipped / tokens,
    }
    spread, unexplained = (square / tokens - (mean / tokens) ** 2 for mean, square in (moments[:2], moments[2:]))
    if spread > MIN_SPREAD:
        metrics["critic/explained_variance"] = 1.0 - unexplained / spread
    return metrics
