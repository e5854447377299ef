"""Which pieces of a torch_dist checkpoint a model's Hugging Face tensors make at a parallel layout, and how they come out of it again.

May import: models, config, types, torch. Follows megatron-core 0.16.1's sharded_state_dict: the layers of a kind are one tensor, whose
first dimension is the layer, and for experts the second is the expert; what several ranks hold is written by the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from megatron_nsr.config import ParallelConfig
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.types import UserError
from megatron_nsr.weights.layouts import Offset, Sizes
from megatron_nsr.weights.mapping import Entry, Location, hf_tensor_shape, locate, whole_model_entries
from megatron_nsr.weights.torch_dist_files import Piece, TorchDistReader

OPTIMIZER_PREFIX = "optimizer."


@dataclass(frozen=True, slots=True)
class CheckpointPart:
    """What one rank writes of one layer, or of what is in no layer: a file of its own. rank: within its pipeline stage."""

    file: str
    rank: int
    entries: tuple[tuple[int | None, Entry], ...]


def stage_ranks(parallel: ParallelConfig) -> int:
    """The fewest ranks of a pipeline stage that tensor and expert parallelism both divide."""
    return math.lcm(parallel.tensor, parallel.expert)


def plan_parts(shape: ModelShape, parallel: ParallelConfig) -> list[CheckpointPart]:
    """The files `__RANK_NUMBER.distcp` of a checkpoint, by the ranks of the smallest world with that layout."""
    parts, written = [], [0] * parallel.pipeline
    for layer, group in groupby(whole_model_entries(shape), key=lambda item: item[0]):
        for stage, items in _by_stage(list(group), shape, parallel).items():
            for rank in range(stage_ranks(parallel)):
                if mine := tuple((layer, entry) for entry, where in items if _writes(rank, entry, where, parallel)):
                    parts.append(CheckpointPart(f"__{rank + stage_ranks(parallel) * stage}_{written[stage]}.distcp", rank, mine))
            written[stage] += 1
    return parts


def _writes(rank: int, entry: Entry, where: Location, parallel: ParallelConfig) -> bool:
    """Whether this rank of the stage is the first to hold the entry or a shard of it; tensor and expert ranks both count from 0."""
    if entry.expert is not None:
        return rank == where.expert_rank
    return rank < parallel.tensor if entry.layout.sharded else rank == 0


def _by_stage(
    items: Sequence[tuple[int | None, Entry]], shape: ModelShape, parallel: ParallelConfig
) -> dict[int, list[tuple[Entry, Location]]]:
    experts_per_rank = shape.moe.experts // parallel.expert if shape.moe else None
    stages: dict[int, list[tuple[Entry, Location]]] = {}
    for layer, entry in items:
        where = locate(layer, entry, shape.num_layers, parallel.pipeline, parallel.virtual_pipeline, experts_per_rank)
        stages.setdefault(where.pipeline_rank, []).append((entry, where))
    return stages


def part_pieces(part: CheckpointPart, shape: ModelShape, parallel: ParallelConfig, tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
    """The part's pieces; each entry's tensors are read when its turn comes."""
    for layer, entry in part.entries:
        index, counts = _leading(layer, entry, shape)
        whole = counts + _whole(entry, shape, parallel.tensor)
        values = [tensors[name] for name in entry.hf]
        for offset, piece in entry.layout.pieces(values, part.rank, parallel.tensor, shape):
            yield Piece(entry.checkpoint_key, index + offset, whole, piece.reshape((1,) * len(index) + piece.shape))


def part_bytes(part: CheckpointPart, shape: ModelShape, parallel: ParallelConfig, element_size: int) -> int:
    """Bytes of weights in the part, each of whose entries is whole or an equal share."""
    ranks = {True: parallel.tensor, False: 1}
    numels = (math.prod(_whole(entry, shape, parallel.tensor)) // ranks[entry.layout.sharded] for _, entry in part.entries)
    return sum(numels) * element_size


def read_entry(reader: TorchDistReader, layer: int | None, entry: Entry, shape: ModelShape) -> tuple[Tensor, ...]:
    """The Hugging Face tensors of an entry, in the order of `entry.hf`; good until the next is read."""
    return entry.layout.join([reader.read(entry.checkpoint_key, _leading(layer, entry, shape)[0])], shape)


def check_checkpoint(reader: TorchDistReader, shape: ModelShape) -> None:
    """Raises UserError naming a tensor that the model needs and the checkpoint lacks, has in another shape, or has beyond it."""
    sizes, known = reader.sizes(), set()
    for layer, entry in whole_model_entries(shape):
        key, names = entry.checkpoint_key, ", ".join(entry.hf)
        if key not in sizes:
            raise UserError(f"checkpoint {reader.directory}: no tensor {key}, which holds {names} of this {shape.family} model")
        counts = _leading(layer, entry, shape)[1]
        if sizes[key][: len(counts)] != counts or not _fits(entry, sizes[key][len(counts) :], shape):
            asked = counts + _whole(entry, shape, tensor=1)
            raise UserError(f"checkpoint {reader.directory}: {key} has shape {sizes[key]}, but config.json asks for {asked} ({names})")
        known.add(key)
    unknown = [key for key in sizes if key not in known and not key.startswith(OPTIMIZER_PREFIX)]
    if unknown:
        which = f"{unknown[0]} is" if len(unknown) == 1 else f"{unknown[0]} and {len(unknown) - 1} more are"
        raise UserError(f"checkpoint {reader.directory}: {which} no part of a {shape.family} model of {shape.num_layers} layers")


def _fits(entry: Entry, size: Sizes, shape: ModelShape) -> bool:
    """Whether a whole parameter of that size joins to the entry's tensors; of how many ranks its padding is, nobody needs to know."""
    try:
        joined = entry.layout.join([torch.empty(size, device="meta")], shape)
    except RuntimeError:
        return False
    return [tuple(tensor.shape) for tensor in joined] == [hf_tensor_shape(name, shape) for name in entry.hf]


def _leading(layer: int | None, entry: Entry, shape: ModelShape) -> tuple[Offset, Sizes]:
    """An entry's place in the dimensions that a checkpoint puts before the parameter's own, and their sizes."""
    if layer is None:
        return (), ()
    if entry.expert is None or shape.moe is None:
        return (layer,), (shape.num_layers,)
    return (layer, entry.expert), (shape.num_layers, shape.moe.experts)


def _whole(entry: Entry, shape: ModelShape, tensor: int) -> Sizes:
    return entry.layout.whole([hf_tensor_shape(name, shape) for name in entry.hf], tensor)
