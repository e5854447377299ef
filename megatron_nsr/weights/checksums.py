"""Checksums of Hugging Face tensors that add up: a tensor's is the sum of those of its shards, wherever they lie.

May import: models, this package, torch.distributed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.weights.fp8_rows import is_rounded, largest_of_rows, rounded_rows
from megatron_nsr.weights.layouts import ColumnSharded
from megatron_nsr.weights.mapping import hf_tensor_shape, local_parameter
from megatron_nsr.weights.push_plan import Piece, PushPlan

if TYPE_CHECKING:
    from megatron_nsr.models.policy import PolicyModel

ELEMENTS = 1 << 20  # hashed at once, 8 bytes each several times over
COLUMN_BITS = 32
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
# The mixing steps of splitmix64 (Steele, Lea, Flood 2014), its constants as signed numbers.
INCREMENT, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


@torch.no_grad()
def checksum(shard: Tensor, rows: Tensor, first_column: int, dtype: torch.dtype) -> Tensor:
    """What a shard adds to its tensor's checksum: int64 [], a sum modulo 2**64 over its values in `dtype` and their places.

    shard: [rows] or [rows, columns]; rows: int64 [rows], their numbers in the whole tensor; first_column: likewise.

    One wrong element always changes it; several, or elements in each other's place, go unnoticed with a chance of 2**-64. Minus
    zero and numbers below the type's smallest normal one count as zero: some kernels do not keep them.
    """
    matrix = shard.unsqueeze(1) if shard.ndim == 1 else shard
    total = torch.zeros((), dtype=torch.int64, device=shard.device)
    columns = torch.arange(first_column, first_column + matrix.size(1), device=shard.device)
    tiny = torch.finfo(dtype).tiny
    step = max(1, ELEMENTS // matrix.size(1))
    for values, numbers in zip(matrix.split(step), rows.to(shard.device).split(step), strict=True):
        values = values.to(dtype)
        values = values.masked_fill(values.abs() < tiny, 0)
        places = (numbers[:, None] << COLUMN_BITS) + columns
        total += _mix(places * INCREMENT + values.view(INTEGERS[dtype])).sum()
    return total


@torch.no_grad()
def policy_checksums(plan: PushPlan, chunks: Sequence[PolicyModel], dtype: torch.dtype, *, fp8_rows: bool = False) -> dict[str, int]:
    """HF name: checksum of the policy's tensor in `dtype`, taken from the shards where they lie, so that no push is part of it.

    fp8_rows: the weights of linear layers as an engine in FP8 rounds them, in float32.

    Collective over the tensor-, pipeline- and expert-parallel ranks; the same on each of them. What tensor-parallel ranks hold
    replicated is taken from the first.
    """
    groups = chunks[0].pg_collection
    found: dict[str, int] = {}
    for experts, spread_over in ((False, groups.tp), (True, groups.ep)):
        sums = _local_checksums(plan, chunks, dtype, experts=experts, fp8_rows=fp8_rows)
        if sums:
            flat = torch.stack(list(sums.values()))
            for group in (spread_over, groups.pp):
                if group.size() > 1:
                    dist.all_reduce(flat, group=group)
            found |= dict(zip(sums, flat.tolist(), strict=True))
    return found


def _local_checksums(
    plan: PushPlan, chunks: Sequence[PolicyModel], dtype: torch.dtype, *, experts: bool, fp8_rows: bool
) -> dict[str, Tensor]:
    """This rank's part of the checksums of all tensors that are, or are not, those of experts; zero for what it does not have."""
    groups = chunks[0].pg_collection
    parameters = [dict(chunk.named_parameters()) for chunk in chunks]
    zero = torch.zeros((), dtype=torch.int64, device=next(iter(parameters[0].values())).device)
    sums: dict[str, Tensor] = {}
    for piece in (piece for bucket in plan.buckets for piece in bucket.pieces if (piece.entry.expert is not None) == experts):
        sums |= dict.fromkeys(piece.entry.hf, zero)
        counts = piece.where.expert_rank == groups.ep.rank() if experts else piece.entry.layout.sharded or groups.tp.rank() == 0
        if counts and piece.where.pipeline_rank == groups.pp.rank():
            _, parameter = local_parameter(piece.entry, piece.where, parameters[piece.where.vp_stage])
            for name, shard, rows, column in hf_shards(piece, parameter, groups.tp.rank(), plan.tensor, plan.shape):
                if fp8_rows and is_rounded(name):
                    shard = shard.to(dtype)
                    largest = largest_of_rows(shard)
                    if isinstance(piece.entry.layout, ColumnSharded) and groups.tp.size() > 1:
                        dist.all_reduce(largest, dist.ReduceOp.MAX, groups.tp)
                    sums[name] = checksum(rounded_rows(shard, largest), rows, column, torch.float32)
                else:
                    sums[name] = checksum(shard, rows, column, dtype)
    return sums


def hf_shards(piece: Piece, parameter: Tensor, rank: int, size: int, shape: ModelShape) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """(HF name, the rows of it that a rank's parameter holds, their numbers in the whole tensor, its first column)."""
    heights = [hf_tensor_shape(name, shape)[0] for name in piece.entry.hf]
    # each row's number, from 1 on over the tensors of the entry; rows of padding have 0
    numbered = list(torch.arange(1, sum(heights) + 1).split(heights))
    columns_cut = isinstance(piece.entry.layout, ColumnSharded)
    rows = numbered[0] if columns_cut else piece.entry.layout.split(numbered, rank, size, shape)
    first_column = rank * parameter.size(1) if columns_cut else 0
    for name, numbers in zip(piece.entry.hf, numbered, strict=True):
        mine = (rows >= numbers[0]) & (rows <= numbers[-1])
        whole = parameter if bool(mine.all()) else parameter[mine.to(parameter.device)]
        yield name, whole, rows[mine] - numbers[0], first_column


def _mix(value: Tensor) -> Tensor:
    """splitmix64's finisher: a bijection of 64-bit integers under which near values end far apart."""
    value = (value ^ _shift_right(value, 30)) * FIRST
    value = (value ^ _shift_right(value, 27)) * SECOND
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """The shift of an unsigned number."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
