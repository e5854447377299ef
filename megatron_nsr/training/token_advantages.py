"""Values of a packed micro-batch's tokens to its advantages and returns. May import: types, objectives, training.parallel_groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_nsr.objectives.advantages import generalized_advantages, token_rewards, whitened
from megatron_nsr.training.parallel_groups import ParallelGroups
from megatron_nsr.types import TrainBatch


@dataclass(frozen=True, slots=True)
class Responses:
    """Which of a packed micro-batch's response tokens belong together: `lengths` of them a sample, in the order of `response_rows`."""

    lengths: Int[Tensor, "samples"]  # on the CPU

    @classmethod
    def of(cls, batch: TrainBatch) -> Responses:
        before = torch.cat([torch.zeros(1, dtype=torch.int64), batch.response_mask.cpu().long().cumsum(0)])
        lengths = before[batch.cu_seqlens.cpu().long()].diff()
        return cls(lengths[lengths > 0])  # padding has no response

    def columns(self, values: Float[Tensor, "rows"]) -> Float[Tensor, "tokens samples"]:
        """One response a column, float64 on the CPU: the recursion over tokens is long, and its numbers are few."""
        parts = values.double().cpu().split(self.lengths.tolist())
        return pad_sequence(list(parts)) if parts else torch.zeros(0, 0, dtype=torch.float64)

    def rows(self, columns: Float[Tensor, "tokens samples"]) -> Float[Tensor, "rows"]:
        """The inverse of `columns`."""
        inside = torch.arange(len(columns))[:, None] < self.lengths
        return columns.t()[inside.t()]


def with_advantages(
    batch: TrainBatch, values: Float[Tensor, "tokens"], gamma: float, lambda_: float, penalties: Float[Tensor, "tokens"] | None = None
) -> TrainBatch:
    """The micro-batch with old values, returns, and advantages in place of the samples' weights.

    A sample's weight is its outcome: the reward of its last response token. penalties: what is taken from each token's reward, such as
    a coefficient times log pi_old - log pi_ref.
    """
    responses, rows = Responses.of(batch), batch.response_rows
    outcomes = responses.columns(batch.weights[rows])[:1].flatten()
    taken = None if penalties is None else responses.columns(penalties[rows])
    known = responses.columns(values[rows])
    advantages = generalized_advantages(token_rewards(outcomes, responses.lengths, taken), known, gamma, lambda_)
    returns = responses.rows(advantages + known)
    return replace(
        batch, weights=_on_rows(batch, responses.rows(advantages)), old_values=values.to(torch.float32), returns=_on_rows(batch, returns)
    )


def whiten(judged: Sequence[TrainBatch], groups: ParallelGroups) -> list[TrainBatch]:
    """Advantages of mean 0 and variance 1 over the response tokens of all micro-batches on all ranks. A collective call."""
    advantages = [batch.weights[batch.response_rows].double().cpu() for batch in judged]
    together = torch.cat([torch.zeros(0, dtype=torch.float64), *advantages])
    count, total = groups.sum_over_last_stages(torch.stack([torch.tensor(float(len(together))).double(), together.sum()])).tolist()
    mean = total / max(1.0, count)
    squares = float(groups.sum_over_last_stages((together - mean).square().sum()[None]))
    variance = squares / max(1.0, count - 1.0)
    return [replace(batch, weights=_on_rows(batch, whitened(part, mean, variance))) for batch, part in zip(judged, advantages, strict=True)]


def _on_rows(batch: TrainBatch, values: Float[Tensor, "rows"]) -> Float[Tensor, "tokens"]:
    """float32 [tokens] on the batch's device, zero outside the responses."""
    vector = torch.zeros_like(batch.weights)
    vector[batch.response_rows] = values.to(vector)
    return vector
