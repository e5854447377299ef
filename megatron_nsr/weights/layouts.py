"""How Hugging Face tensors lie in a megatron-core parameter and over its tensor-parallel shards. Pure functions of tensors.

May import: torch, models.hf_config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_nsr.models.hf_config import ModelShape

Sizes = tuple[int, ...]
Offset = tuple[int, ...]


class Layout(Protocol):
    """`split` gives rank `rank` of `size` its shard of the joined parameter; `join` of all shards gives the tensors back, bitwise.

    The whole parameter is the shard of one rank of one. `pieces` are the parts of a rank's shard and where in the whole they lie: that is
    how checkpoints hold parameters. What these return may be views of what they are given. `whole` are the whole parameter's dimensions,
    from the tensors' and the number of ranks, which may need padding.
    """

    sharded: bool  # False: every tensor-parallel rank holds the whole parameter

    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor: ...

    def join(self, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]: ...

    def pieces(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> tuple[tuple[Offset, Tensor], ...]: ...

    def whole(self, tensors: Sequence[Sizes], size: int) -> Sizes: ...


class _OnePiece(ABC):
    """A rank's shard is one piece of the whole parameter, which is cut along `dim`, or not at all."""

    sharded = True
    dim = 0

    @abstractmethod
    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor: ...

    def pieces(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> tuple[tuple[Offset, Tensor], ...]:
        shard = self.split(tensors, rank, size, shape)
        return ((_offset(shard, self.dim, rank if self.sharded else 0), shard),)

    def whole(self, tensors: Sequence[Sizes], size: int) -> Sizes:
        return _stacked(tensors)


@dataclass(frozen=True)
class Replicated(_OnePiece):
    """The same tensor on every rank."""

    sharded = False

    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor:
        return tensors[0]

    def join(self, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        return (shards[0],)


@dataclass(frozen=True)
class ColumnSharded(_OnePiece):
    """Cut along dimension 1, the inputs of a row-parallel linear layer."""

    dim = 1

    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor:
        return tensors[0].chunk(size, dim=1)[rank]

    def join(self, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        return (_joined(shards, dim=1),)


@dataclass(frozen=True)
class FusedQKV(_OnePiece):
    """q, k and v, weights or biases, interleaved by query group (a group's queries, its key, its value), cut along dimension 0."""

    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor:
        groups = [x.reshape(shape.query_groups, -1, *x.shape[1:]).chunk(size, dim=0)[rank] for x in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def join(self, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        fused = _joined(shards, dim=0)
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
        return tuple(_joined([half[i] for half in halves], dim=0) for i in range(2))

    def pieces(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> tuple[tuple[Offset, Tensor], ...]:
        gate, up = (x.chunk(size, dim=0)[rank] for x in tensors)
        return (_offset(gate, 0, rank), gate), (_offset(up, 0, size + rank), up)

    def whole(self, tensors: Sequence[Sizes], size: int) -> Sizes:
        return _stacked(tensors)


@dataclass(frozen=True)
class WholeGateUp:
    """All rows of the gate, then all rows of the up projection: an expert, which is not cut over tensor-parallel ranks."""

    sharded = False

    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor:
        return torch.cat(list(tensors), dim=0)

    def join(self, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        return shards[0].chunk(2, dim=0)

    def pieces(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> tuple[tuple[Offset, Tensor], ...]:
        gate, up = tensors
        return (_offset(gate, 0, 0), gate), (_offset(up, 0, 1), up)

    def whole(self, tensors: Sequence[Sizes], size: int) -> Sizes:
        return _stacked(tensors)


@dataclass(frozen=True)
class PaddedVocabulary(_OnePiece):
    """Rows of the vocabulary cut along dimension 0, after zero rows up to a multiple of the ranks."""

    def split(self, tensors: Sequence[Tensor], rank: int, size: int, shape: ModelShape) -> Tensor:
        rows = -(-shape.vocab_size // size)
        shard = tensors[0][rank * rows : (rank + 1) * rows]
        missing = rows - shard.size(0)
        return torch.cat([shard, shard.new_zeros(missing, *shard.shape[1:])], dim=0) if missing else shard

    def join(self, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
        return (_joined(shards, dim=0)[: shape.vocab_size],)

    def whole(self, tensors: Sequence[Sizes], size: int) -> Sizes:
        return (-(-tensors[0][0] // size) * size, *tensors[0][1:])


def _joined(shards: Sequence[Tensor], dim: int) -> Tensor:
    """The shards one after another along `dim`; one alone is not copied."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


def _offset(piece: Tensor, dim: int, index: int) -> Offset:
    """Where piece `index` of equal ones along `dim` starts."""
    return tuple(index * size if i == dim else 0 for i, size in enumerate(piece.shape))


def _stacked(tensors: Sequence[Sizes]) -> Sizes:
    """The dimensions of tensors one after another along dimension 0."""
    return (sum(sizes[0] for sizes in tensors), *tensors[0][1:])
