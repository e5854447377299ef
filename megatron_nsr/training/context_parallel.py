"""A micro-batch's tokens cut out for one context-parallel rank, and the ranks' outputs joined again.

May import: types, losses, models, training.parallel_groups. Everywhere else a micro-batch and what was measured on it are whole, on each
of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nsr.losses.policy_head import HeadOutputs
from megatron_nsr.losses.value_head import ValueOutputs
from megatron_nsr.models.context_parallel import all_tokens
from megatron_nsr.training.parallel_groups import ParallelGroups
from megatron_nsr.types import TrainBatch

Outputs = TypeVar("Outputs", HeadOutputs, ValueOutputs)
TokenLoss = Callable[[Tensor, Tensor], Tensor]


def own_part(batch: TrainBatch) -> TrainBatch:
    """This rank's tokens of a micro-batch, for the head; `cu_seqlens` and `max_seqlen` stay those of the whole sequences."""
    split = batch.split
    if split is None:
        return batch
    vectors = {name: getattr(batch, name) for name in _PER_TOKEN}
    mine = {name: vector[split.mine] for name, vector in vectors.items() if vector is not None}
    return replace(batch, response_rows=split.response_rows, **mine)


_PER_TOKEN = tuple(field.name for field in fields(TrainBatch) if field.name not in ("cu_seqlens", "max_seqlen", "response_rows", "split"))


@torch.no_grad()
def of_all_tokens(output: Outputs, batch: TrainBatch, groups: ParallelGroups) -> Outputs:
    """What the head returned, per token of the whole micro-batch. `loss` stays that of this rank's tokens."""
    if batch.split is None:
        return output
    vectors = {field.name: getattr(output, field.name) for field in fields(output)}
    vectors = {name: vector for name, vector in vectors.items() if vector is not None and vector.ndim == 1}
    packed = torch.stack([vector.to(output.loss.dtype) for vector in vectors.values()], dim=1)
    whole = all_tokens(packed, batch.split, _group(groups)).unbind(dim=1)
    return replace(output, **{name: row.to(vectors[name].dtype) for name, row in zip(vectors, whole, strict=True)})


def on_whole_sequences(loss: TokenLoss, batch: TrainBatch, groups: ParallelGroups) -> TokenLoss:
    """A loss that looks at whole sequences, as a function of this rank's tokens: it returns their losses."""
    split = batch.split
    if split is None:
        return loss

    def of_own_tokens(logprobs: Tensor, entropy: Tensor) -> Tensor:
        whole = all_tokens(torch.stack((logprobs, entropy), dim=1), split, _group(groups))
        return loss(*whole.unbind(dim=1))[split.mine]

    return of_own_tokens


def _group(groups: ParallelGroups) -> dist.ProcessGroup:
    assert groups.context_group is not None  # where tokens are split, there are ranks to split them over
    return groups.context_group
