"""Gathers a sharded model back into whole Hugging Face tensors, bucket by bucket, on every rank.

May import: models, platform, torch.distributed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.models.policy import PolicyModel
from megatron_nsr.platform.host_memory import require_present
from megatron_nsr.weights.mapping import local_parameter
from megatron_nsr.weights.push_plan import Bucket, Piece, PushPlan, plan_push


def gather_hf_tensors(chunks: Sequence[PolicyModel], shape: ModelShape, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Plans and gathers at once; see `plan_for` and `execute_push_plan`."""
    return execute_push_plan(plan_for(chunks, shape, bucket_bytes), chunks)


def plan_for(chunks: Sequence[PolicyModel], shape: ModelShape, bucket_bytes: int) -> PushPlan:
    """The plan for this model as it lies on the ranks; the same on each of them."""
    groups = chunks[0].pg_collection
    return plan_push(
        shape,
        tensor=groups.tp.size(),
        pipeline=groups.pp.size(),
        virtual_pipeline=len(chunks),
        expert=groups.ep.size(),
        element_bytes=next(chunks[0].parameters()).element_size(),
        bucket_bytes=bucket_bytes,
    )


@torch.no_grad()
def execute_push_plan(plan: PushPlan, chunks: Sequence[PolicyModel]) -> Iterator[tuple[str, Tensor]]:
    """Collective over the tensor-, pipeline- and expert-parallel ranks: every rank yields the same (HF name, whole tensor) sequence.

    Tensors have the parameters' dtype and the unpadded vocabulary; a tied head is the embedding and is not yielded again. They
    have memory of their own: a caller may keep them. While a bucket's tensors are yielded the next bucket travels, into the other
    of two buffers; see `PushPlan.extra_bytes`. Every rank must exhaust the iterator.
    """
    rank = _Rank(plan, chunks)
    ahead = rank.start(0)
    for number, bucket in enumerate(plan.buckets):
        buffer = ahead.finish() if ahead else None
        ahead = rank.start(number + 1)  # overwrites the bucket before this one, whose last tensor has been joined
        for position, piece in enumerate(bucket.pieces):
            if ahead and position == len(bucket.pieces) // 2:
                ahead.send_on()
            yield from zip(piece.entry.hf, rank.join(buffer, bucket, piece), strict=True)


class _Rank:
    """This rank's parameters, its place in the plan, and the memory of the two buckets that it holds at a time."""

    def __init__(self, plan: PushPlan, chunks: Sequence[PolicyModel]) -> None:
        self.plan = plan
        self.parameters = [dict(chunk.named_parameters()) for chunk in chunks]
        require_present((parameter for named in self.parameters for parameter in named.values()), "the model's weights")
        groups = chunks[0].pg_collection
        self.tp, self.pp, self.ep = groups.tp, groups.pp, groups.ep
        sample = next(iter(self.parameters[0].values()))
        self.memory = [torch.empty(size, dtype=sample.dtype, device=sample.device) for size in plan.buffer_sizes]

    def owns(self, bucket: Bucket) -> bool:
        return bucket.owner == self.pp.rank() and bucket.expert_owner in (None, self.ep.rank())

    def start(self, number: int) -> _Transfer | None:
        """Sets a bucket on its way; None where there is no such bucket, and where this rank has the whole model."""
        if number == len(self.plan.buckets) or not self.plan.travels:
            return None
        bucket = self.plan.buckets[number]
        return _Transfer(self, bucket, self.memory[number % 2][: self.plan.numel(bucket)])

    def local(self, piece: Piece) -> Tensor:
        """This rank's shard of a parameter that its stage owns. Raises RuntimeError where its shape is not the planned one."""
        name, parameter = local_parameter(piece.entry, piece.where, self.parameters[piece.where.vp_stage])
        if parameter.shape != piece.shape:
            raise RuntimeError(f"{name} has shape {tuple(parameter.shape)}, the push plan expects {piece.shape}")
        return parameter.detach()

    def join(self, buffer: Tensor | None, bucket: Bucket, piece: Piece) -> list[Tensor]:
        """The HF tensors of one parameter, in memory of their own."""
        layout = piece.entry.layout
        shards = [self.local(piece)] if buffer is None else [part.view(piece.shape) for part in self.parts(buffer, bucket, piece)]
        theirs = {_memory(shard) for shard in shards}  # a layout may return views of them
        return [tensor.clone() if _memory(tensor) in theirs else tensor for tensor in layout.join(shards, self.plan.shape)]

    def parts(self, buffer: Tensor, bucket: Bucket, piece: Piece) -> list[Tensor]:
        """Where each tensor-parallel rank's shard lies in a bucket's buffer, [piece.numel] each; one place where it is replicated."""
        slots = buffer[: self.plan.tensor * bucket.slot].view(self.plan.tensor, bucket.slot).unbind(0)
        where = slots if piece.entry.layout.sharded else (buffer[self.plan.tensor * bucket.slot :],)
        return [place[piece.offset : piece.offset + piece.numel] for place in where]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Transfer:
    """A bucket on its way into this rank's buffer, asynchronously: to all ranks of its stage, by an all-gather of shards or a
    broadcast of experts, then by a broadcast to the other stages."""

    def __init__(self, rank: _Rank, bucket: Bucket, buffer: Tensor) -> None:
        self.buffer = buffer
        self._pp, self._owner = rank.pp, bucket.owner
        self._work: dist.Work | None = None
        self._sent_on = False
        if rank.owns(bucket):
            for piece in bucket.pieces:
                parts = rank.parts(self.buffer, bucket, piece)
                (parts[rank.tp.rank()] if piece.entry.layout.sharded else parts[0]).view(piece.shape).copy_(rank.local(piece))
        if rank.pp.rank() == bucket.owner:
            self._work = self._within_stage(rank, bucket)
        if self._work is None:
            self.send_on()

    def _within_stage(self, rank: _Rank, bucket: Bucket) -> dist.Work | None:
        if bucket.expert_owner is not None and rank.plan.expert > 1:
            source = dist.get_global_rank(rank.ep, bucket.expert_owner)
            return dist.broadcast(self.buffer, source, group=rank.ep, async_op=True)
        if bucket.slot and rank.plan.tensor > 1:
            slots = self.buffer[: rank.plan.tensor * bucket.slot]
            mine = slots[rank.tp.rank() * bucket.slot :][: bucket.slot]  # in place: no second copy of the shards
            return dist.all_gather_into_tensor(slots, mine, group=rank.tp, async_op=True)
        return None

    def send_on(self) -> None:
        """Starts the broadcast to other stages, once the first step is complete; a second call does nothing."""
        if not self._sent_on:
            self._wait()
            self._sent_on = True
            if self._pp.size() > 1:
                source = dist.get_global_rank(self._pp, self._owner)
                self._work = dist.broadcast(self.buffer, source, group=self._pp, async_op=True)

    def finish(self) -> Tensor:
        """The complete buffer."""
        self.send_on()
        self._wait()
        return self.buffer

    def _wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.wait()
