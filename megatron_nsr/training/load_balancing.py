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
    real = [real_sequences(batch) for batch in micro_batches]
    total = groups.sum_over_last_stages(torch.tensor([sum(int(mask.sum()) for mask in real)], dtype=torch.float64))
    gradient = coefficient * len(micro_batches) * groups.data_size
    return [LoadBalancing(mask.float() / float(total), gradient) for mask in real]


def real_sequences(batch: TrainBatch) -> torch.Tensor:
    """bool [sequences]: all but padding, which has no response."""
    lengths = batch.cu_seqlens.diff().long()
    sequences = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    return torch.zeros(len(lengths), device=lengths.device).index_add_(0, sequences, batch.response_mask.float()) > 0


def aux_loss_metric(updates: Sequence[Sequence[LoadBalancing]], layers: int, groups: ParallelGroups) -> dict[str, float]:
    """The loss without its coefficient, as the mean over a mini-batch's sequences and the model's layers, and over the updates."""
    found = [loss.double() for balancings in updates for balancing in balancings for loss in balancing.found]
    if not updates:
        return {}
    total = groups.sum_over_world(torch.stack(found).sum(dim=0, keepdim=True))
    return {"policy/aux_loss": float(total) / layers / len(updates)}
