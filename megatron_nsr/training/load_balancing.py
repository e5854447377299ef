"""The load-balancing loss of a mini-batch: what each sequence counts in it, and the metric that comes of it.

May import: types, models, training.parallel_groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_nsr.models.expert_routing import LoadBalancing
from megatron_nsr.training.parallel_groups import ParallelGroups
from megatron_nsr.types import TrainBatch


def balance_mini_batch(micro_batches: Sequence[TrainBatch], coefficient: float, groups: ParallelGroups) -> list[LoadBalancing]:
    """One for each of this rank's micro-batches. A collective call.

    The loss is the mean over the mini-batch's sequences, prompts included, on all data-parallel ranks, summed over layers, so that
    it does not depend on the layout or on how sequences are packed.
    """
    real = [real_tokens(batch) for batch in micro_batches]
    counts = [int((lengths > 0).sum()) for lengths, _ in real]
    total = float(groups.sum_over_last_stages(torch.tensor([sum(counts)], dtype=torch.float64)))
    gradient = coefficient * len(micro_batches) * groups.data_size
    return [LoadBalancing((lengths > 0).float() / total, lengths.clamp(min=1), sequences, gradient) for lengths, sequences in real]


def real_tokens(batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sequence's tokens, int64 [sequences], and the number of each token's sequence, int64 [tokens], of what is not padding.

    A sequence ends with its response, and what fills it up comes after that; padding of its own has no response, and no tokens then.
    Tokens of padding have the number of sequences in place of a sequence's number.
    """
    filled = batch.cu_seqlens.diff().long()
    sequences = torch.repeat_interleave(torch.arange(len(filled), device=filled.device), filled)
    ends = torch.where(batch.response_mask, batch.positions + 1, 0)
    lengths = torch.zeros_like(filled).scatter_reduce(0, sequences, ends, "amax")
    return lengths, torch.where(batch.positions < lengths[sequences], sequences, len(filled))


def aux_loss_metric(updates: Sequence[Sequence[LoadBalancing]], layers: int, groups: ParallelGroups) -> dict[str, float]:
    """The loss without its coefficient, as the mean over a mini-batch's sequences and the model's layers, and over the updates."""
    found = [loss.double() for balancings in updates for balancing in balancings for loss in balancing.found]
    if not updates:
        return {}
    total = groups.sum_over_world(torch.stack(found).sum(dim=0, keepdim=True))
    return {"policy/aux_loss": float(total) / layers / len(updates)}
