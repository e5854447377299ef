"""How Hugging Face tensors lie in a megatron-core parameter and over its tensor-parallel shards. Pure functions of tensors.

May import: torch, models.hf_config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_nsr.models.hf_config import ModelShape


class Layout(Protocol):
    """`split` gives rank `rank` of `size` its shard of the joined parameter; `join` of all shards gives the tensors back, bitwise."""

    sharded: bool  # False: every tensor-parallel rank holds the whole parameter

    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor: ...

    def join(self, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Replicated:
    """The same tensor on every rank."""

    sharded = False

    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor:
        return tensors[0]

    def join(self, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        return (shards[0],)


@dataclass(frozen=True)
class ColumnSharded:
    """Cut along dimension 1, the inputs of a row-parallel linear layer."""

    sharded = True

    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor:
        return tensors[0].chunk(size, dim=1)[rank]

    def join(self, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards), dim=1),)


@dataclass(frozen=True)
class FusedQKV:
    """q, k and v, weights or biases, interleaved by query group (a group's queries, its key, its value), cut along dimension 0."""

    sharded = True

    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor:
        groups = [x.reshape(shape.query_groups, -1, *x.shape[1:]).chunk(size, dim=0)[rank] for x in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def join(self, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        fused = torch.cat(list(shards), dim=0)
        by_group = fused.reshape(shape.query_groups, -1, *fused.shape[1:])
        queries = shape.heads // shape.query_groups * shape.head_dim
        return tuple(x.flatten(0, 1) for x in by_group.split([queries, shape.head_dim, shape.head_dim], dim=1))


@dataclass(frozen=True)
class FusedGateUp:
    """Each rank's rows of the gate, then its rows of the up projection."""

    sharded = True

    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor:
        return torch.cat([x.chunk(size, dim=0)[rank] for x in tensors], dim=0)

    def join(self, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return tuple(torch.cat([half[i] for half in halves], dim=0) for i in range(2))


@dataclass(frozen=True)
class WholeGateUp:
    """All rows of the gate, then all rows of the up projection: an expert, which is not cut over tensor-parallel ranks."""

    sharded = False

    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor:
        return torch.cat(list(tensors), dim=0)

    def join(self, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        return shards[0].chunk(2, dim=0)


@dataclass(frozen=True)
class PaddedVocabulary:
    """Rows of the vocabulary cut along dimension 0, after zero rows up to a multiple of the ranks."""

    sharded = True

    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor:
        rows = -(-shape.vocab_size // size)
        shard = tensors[0][rank * rows : (rank + 1) * rows]
        return torch.cat([shard, shard.new_zeros(rows - shard.size(0), *shard.shape[1:])], dim=0)

    def join(self, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards), dim=0)[: shape.vocab_size],)
