"""Which bytes travel between which ranks when the weights are gathered: computed once, from the shape and the layout alone.

May import: models, this package, rich. No tensor and no process group: a plan can be made and printed on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table

from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.weights.layouts import ColumnSharded
from megatron_nsr.weights.mapping import Entry, Location, hf_tensor_shape, locate, whole_model_entries

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """One parameter in a bucket. offset: elements, in each rank's slot, or in the replicated part. shape: of one rank's shard."""

    entry: Entry
    where: Location
    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters of one pipeline stage that travel together, as one flat buffer.

    The buffer holds a slot of `slot` elements for each tensor-parallel rank, then `replicated` elements that all of them have.
    Experts travel by themselves: only the ranks of one expert-parallel rank have them, whole (slot is 0).
    """

    owner: int  # pipeline rank
    expert_owner: int | None  # expert-parallel rank; None: all of them have these parameters
    pieces: tuple[Piece, ...]
    slot: int
    replicated: int

    @property
    def names(self) -> list[str]:
        """The HF tensors, in the order in which they are handed over."""
        return [name for piece in self.pieces for name in piece.entry.hf]


@dataclass(frozen=True, slots=True)
class RankTraffic:
    """What one rank sends in a whole push: `gather_bytes` to each of `gather_to`, and so on: shards, experts, then whole buckets."""

    rank: int
    stage: int
    gather_to: tuple[int, ...]
    gather_bytes: int
    expert_to: tuple[int, ...]
    expert_bytes: int
    broadcast_to: tuple[int, ...]
    broadcast_bytes: int


@dataclass(frozen=True, slots=True)
class PushPlan:
    """The buckets in their order. A stage sends only parameters that it owns; a tied head is the embedding and is not sent again.

    For each bucket the tensor-parallel ranks of its stage all-gather their slots, or the rank that has the bucket's experts broadcasts
    them to its expert-parallel group; then each rank of the stage broadcasts the buffer to the rank at the same place in the other
    stages. Data-parallel replicas do the same beside one another.
    """

    shape: ModelShape
    tensor: int
    pipeline: int
    virtual_pipeline: int
    expert: int
    element_bytes: int
    buckets: tuple[Bucket, ...]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all HF tensors: what a push hands to an engine."""
        names = (name for bucket in self.buckets for name in bucket.names)
        return sum(math.prod(hf_tensor_shape(name, self.shape)) for name in names) * self.element_bytes

    def numel(self, bucket: Bucket) -> int:
        """Elements of the bucket's buffer."""
        return self.tensor * bucket.slot + bucket.replicated

    def buffer_bytes(self, bucket: Bucket) -> int:
        return self.numel(bucket) * self.element_bytes

    @property
    def travels(self) -> bool:
        """Whether ranks share the model; where each has the whole of it, nothing is sent and no buffer is needed."""
        return self.tensor * self.pipeline * self.expert > 1

    @property
    def buffer_sizes(self) -> tuple[int, int]:
        """Elements of the two buffers: buckets take them in turn."""
        even, odd = (max(map(self.numel, self.buckets[start::2]), default=0) for start in (0, 1))
        return (even, odd) if self.travels else (0, 0)

    @property
    def extra_bytes(self) -> int:
        """The most that a rank holds beside the model: both buffers and the HF tensors of one parameter, joined."""
        pieces = (piece for bucket in self.buckets for piece in bucket.pieces)
        joined = max(sum(math.prod(hf_tensor_shape(name, self.shape)) for name in piece.entry.hf) for piece in pieces)
        return (sum(self.buffer_sizes) + joined) * self.element_bytes

    def traffic(self, world_size: int) -> Iterator[RankTraffic]:
        """Every rank's sends, by the amount that must arrive; how a collective routes it (ring, tree) is the library's affair.

        Ranks are numbered as megatron-core numbers them: tensor-parallel ranks are neighbours, and so, counted apart from them, are
        expert-parallel ranks; stages lie furthest apart.
        """
        stage_ranks = world_size // self.pipeline
        for rank in range(world_size):
            stage, place = divmod(rank, stage_ranks)
            first, first_expert = rank - rank % self.tensor, rank - place % self.expert
            owned = [bucket for bucket in self.buckets if bucket.owner == stage]
            yield RankTraffic(
                rank,
                stage,
                tuple(peer for peer in range(first, first + self.tensor) if peer != rank),
                sum(bucket.slot for bucket in owned) * self.element_bytes,
                tuple(peer for peer in range(first_expert, first_expert + self.expert) if peer != rank),
                sum(self.buffer_bytes(bucket) for bucket in owned if bucket.expert_owner == place % self.expert),
                tuple(place + other * stage_ranks for other in range(self.pipeline) if other != stage),
                sum(self.buffer_bytes(bucket) for bucket in owned),
            )

    def describe(self, world_size: int) -> RenderableType:
        """Two tables for people: the buckets, and who sends how much to whom."""
        return Group(self._bucket_table(), self._traffic_table(world_size))

    def _bucket_table(self) -> Table:
        memory = f"at most {_mib(self.extra_bytes)} MiB a rank beside the model"
        table = _table(f"{len(self.buckets)} buckets, {_mib(self.tensor_bytes)} MiB of weights, {memory}; sizes in MiB")
        table.add_column("first tensor", no_wrap=True)
        expert_rank = ["expert\nrank"] if self.expert > 1 else []
        for header in ("bucket", "stage", *expert_rank, "tensors", "buffer", "all-gather\na rank", "broadcast\na stage"):
            table.add_column(header, justify="right", no_wrap=True)
        for number, bucket in enumerate(self.buckets):
            size = _mib(self.buffer_bytes(bucket))
            gathered = _mib(bucket.slot * self.element_bytes) if self.tensor > 1 and bucket.slot else "-"
            sizes = (size if self.travels else "-", gathered, size if self.pipeline > 1 else "-")
            expert = ["-" if bucket.expert_owner is None else str(bucket.expert_owner)] if self.expert > 1 else []
            table.add_row(bucket.names[0], str(number), str(bucket.owner), *expert, str(len(bucket.names)), *sizes)
        return table

    def _traffic_table(self, world_size: int) -> Table:
        table = _table(f"{world_size} ranks, one push; MiB to each receiver")
        experts_to = ["experts to", "MiB"] if self.expert > 1 else []
        for header in ("rank", "stage", "all-gather to", "MiB", *experts_to, "broadcast to", "MiB"):
            table.add_column(header, justify="right")
        for row in self.traffic(world_size):
            experts = [(row.expert_to, row.expert_bytes)] if self.expert > 1 else []
            sends = ((row.gather_to, row.gather_bytes), *experts, (row.broadcast_to, row.broadcast_bytes))
            cells = (text for to, size in sends for text in (_ranks(to), _mib(size) if to else "-"))
            table.add_row(str(row.rank), str(row.stage), *cells)
        return table


def plan_push(
    shape: ModelShape, *, tensor: int, pipeline: int, virtual_pipeline: int, element_bytes: int, bucket_bytes: int, expert: int = 1
) -> PushPlan:
    """Fills buckets in the order of export; a bucket holds at most `bucket_bytes`, or one parameter that is larger."""
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    owner: tuple[int, int | None] = (0, None)
    slot = replicated = 0
    experts_per_rank = shape.moe.experts // expert if shape.moe else None

    def close() -> None:
        if pieces:
            buckets.append(Bucket(*owner, tuple(pieces), slot, replicated))

    for layer, entry in whole_model_entries(shape):
        where = locate(layer, entry, shape.num_layers, pipeline, virtual_pipeline, experts_per_rank)
        theirs = (where.pipeline_rank, None if entry.expert is None else where.expert_rank)
        shard = shard_shape(entry, shape, tensor)
        numel = math.prod(shard)
        total = tensor * slot + replicated + (tensor if entry.layout.sharded else 1) * numel
        if theirs != owner or total * element_bytes > bucket_bytes:
            close()
            pieces, owner, slot, replicated = [], theirs, 0, 0
        pieces.append(Piece(entry, where, slot if entry.layout.sharded else replicated, shard))
        if entry.layout.sharded:
            slot += numel
        else:
            replicated += numel
    close()
    return PushPlan(shape, tensor, pipeline, virtual_pipeline, expert, element_bytes, tuple(buckets))


def shard_shape(entry: Entry, shape: ModelShape, tensor: int) -> tuple[int, ...]:
    """The dimensions of one tensor-parallel rank's parameter."""
    sizes = [hf_tensor_shape(name, shape) for name in entry.hf]
    rows, rest = sum(size[0] for size in sizes), sizes[0][1:]
    if not entry.layout.sharded:
        return rows, *rest
    if isinstance(entry.layout, ColumnSharded):
        return rows, rest[0] // tensor
    return -(-rows // tensor), *rest  # only a padded vocabulary is not divisible


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE)


def _ranks(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks)) or "-"


def _mib(size: int) -> str:
    return f"{size / MIB:,.2f}"
