"""Gathers a sharded model back into whole Hugging Face tensors, bucket by bucket, on every rank.

May import: models, torch.distributed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.models.policy import PolicyModel
from megatron_nsr.weights.mapping import Entry, Location, hf_tensor_shape, local_parameter, locate, whole_model_entries


@dataclass(slots=True)
class _Bucket:
    """Entries of one pipeline rank, whose HF tensors lie one after another in one buffer."""

    owner: int
    items: list[tuple[Entry, Location]] = field(default_factory=list)
    numel: int = 0


@torch.no_grad()
def gather_hf_tensors(chunks: Sequence[PolicyModel], shape: ModelShape, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Collective over the tensor- and pipeline-parallel ranks: every rank yields the same (HF name, whole tensor) sequence.

    Tensors have the parameters' dtype and the unpadded vocabulary; a tied head is the embedding and is not yielded again. They
    are views of a bucket's buffer, not of the parameters. A bucket has at most `bucket_bytes`, or one parameter's tensors. Beside the
    model, a rank holds one bucket, and the owner while it fills it also the received shards and the parameter being joined, as
    long as the caller keeps no tensor. Every rank must exhaust the iterator.
    """
    parameters = [dict(chunk.named_parameters()) for chunk in chunks]
    sample = next(iter(parameters[0].values()))
    tp, pp = chunks[0].pg_collection.tp, chunks[0].pg_collection.pp
    for bucket in plan_buckets(shape, pp.size(), len(chunks), bucket_bytes // sample.element_size()):
        buffer = torch.empty(bucket.numel, dtype=sample.dtype, device=sample.device)
        if pp.rank() == bucket.owner:
            _fill(buffer, bucket, parameters, shape, tp)
        if pp.size() > 1:
            dist.broadcast(buffer, dist.get_global_rank(pp, bucket.owner), group=pp)
        yield from _named_views(buffer, bucket, shape)
        del buffer


def plan_buckets(shape: ModelShape, pipeline: int, virtual_pipeline: int, bucket_numel: int) -> list[_Bucket]:
    """The buckets, from the shape and the layout alone, so that all ranks agree without talking."""
    buckets: list[_Bucket] = []
    for layer, entry in whole_model_entries(shape):
        where = locate(layer, entry, shape.num_layers, pipeline, virtual_pipeline)
        numel = sum(math.prod(hf_tensor_shape(name, shape)) for name in entry.hf)
        if not buckets or buckets[-1].owner != where.pipeline_rank or buckets[-1].numel + numel > bucket_numel:
            buckets.append(_Bucket(where.pipeline_rank))
        buckets[-1].items.append((entry, where))
        buckets[-1].numel += numel
    return buckets


def _fill(buffer: Tensor, bucket: _Bucket, parameters: Sequence[Mapping[str, Tensor]], shape: ModelShape, tp: dist.ProcessGroup) -> None:
    """One all-gather for the bucket's sharded parameters, then each joined into its place."""
    mine = [local_parameter(entry, where.index, parameters[where.vp_stage])[1].detach() for entry, where in bucket.items]
    sharded = [parameter for parameter, (entry, _) in zip(mine, bucket.items, strict=True) if entry.layout.sharded]
    gathered = iter(_all_gather(sharded, tp))
    offset = 0
    for parameter, (entry, _) in zip(mine, bucket.items, strict=True):
        shards = next(gathered) if entry.layout.sharded else [parameter]
        for tensor in entry.layout.join(shards, shape):
            buffer[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)
            offset += tensor.numel()


def _all_gather(tensors: Sequence[Tensor], tp: dist.ProcessGroup) -> list[list[Tensor]]:
    """For each tensor, the shards of all tensor-parallel ranks."""
    if tp.size() == 1 or not tensors:
        return [[tensor] for tensor in tensors]
    sizes = [tensor.numel() for tensor in tensors]
    flat = [tensor.reshape(-1) for tensor in tensors]
    local = flat[0] if len(flat) == 1 else torch.cat(flat)  # a large embedding travels alone: no copy of it
    received = local.new_empty(tp.size() * local.numel())  # gloo wants a flat output
    dist.all_gather_into_tensor(received, local, group=tp)
    columns = received.view(tp.size(), -1).split(sizes, dim=1)
    return [[row.view(tensor.shape) for row in column.unbind(0)] for tensor, column in zip(tensors, columns, strict=True)]


def _named_views(buffer: Tensor, bucket: _Bucket, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    offset = 0
    for entry, _ in bucket.items:
        for name in entry.hf:
            size = hf_tensor_shape(name, shape)
            yield name, buffer[offset : offset + math.prod(size)].view(size)
            offset += math.prod(size)
