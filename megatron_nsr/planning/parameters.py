"""Parameters of one rank, counted from the table that loads and exports them.

May import: models, weights, planning.layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.planning.layout import Layout
from megatron_nsr.weights.mapping import EMBEDDING, FINAL_NORM, HEAD, LAYER_ENTRIES, Entry, hf_tensor_shape
from megatron_nsr.weights.push_plan import shard_shape


@dataclass(frozen=True, slots=True)
class Elements:
    """Parameters in elements: those that every data-parallel rank has, and those of the experts, which fewer ranks share."""

    dense: int
    experts: int = 0

    def __add__(self, other: Elements) -> Elements:
        return Elements(self.dense + other.dense, self.experts + other.experts)

    def times(self, count: int) -> Elements:
        return Elements(self.dense * count, self.experts * count)

    @property
    def total(self) -> int:
        return self.dense + self.experts


@lru_cache(maxsize=4096)
def layer_elements(shape: ModelShape, tensor: int, expert: int) -> Elements:
    """One layer of one rank."""
    per_rank = shape.moe.experts // expert if shape.moe else 0
    entries = [entry.of_layer(0, 0) for entry in LAYER_ENTRIES[shape.family]]
    dense = sum(_numel(entry, shape, tensor) for entry in entries if not entry.of_experts)
    return Elements(dense, per_rank * sum(_numel(entry, shape, tensor) for entry in entries if entry.of_experts))


def stage_elements(shape: ModelShape, layout: Layout, stage: int, *, critic: bool = False) -> Elements:
    """All parameters of a rank of pipeline stage `stage`.

    A tied head is the embedding on a single stage, and a copy of it on the last of several (megatron-core keeps both and sums their
    gradients). A critic has one row in place of the head.
    """
    elements = layer_elements(shape, layout.tensor, layout.expert).times(shape.num_layers // layout.pipeline)
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        elements += Elements(_numel(EMBEDDING, shape, layout.tensor))
    if last:
        elements += Elements(_numel(FINAL_NORM, shape, layout.tensor))
        if critic:
            elements += Elements(shape.hidden)
        elif not (shape.tie_embeddings and first):
            elements += Elements(_numel(HEAD, shape, layout.tensor))
    return elements


def fp8_elements(shape: ModelShape, layout: Layout) -> float:
    """Weights of a rank's layers that compute in FP8, on the first or the last stage; norms and biases among them are few."""
    layers = shape.num_layers / layout.pipeline * layout.fp8_share(shape)
    return layers * layer_elements(shape, layout.tensor, layout.expert).total


@lru_cache(maxsize=64)
def model_elements(shape: ModelShape) -> int:
    """All parameters of the model, a tied head once."""
    layer = layer_elements(shape, 1, 1).total
    ends = [EMBEDDING, FINAL_NORM] + ([] if shape.tie_embeddings else [HEAD])
    return layer * shape.num_layers + sum(math.prod(hf_tensor_shape(name, shape)) for entry in ends for name in entry.hf)


@lru_cache(maxsize=64)
def largest_tensor(shape: ModelShape) -> int:
    """Elements of the largest tensor of the model's files."""
    entries = [EMBEDDING, *(entry.of_layer(0, 0) for entry in LAYER_ENTRIES[shape.family])]
    return max(math.prod(hf_tensor_shape(name, shape)) for entry in entries for name in entry.hf)


def _numel(entry: Entry, shape: ModelShape, tensor: int) -> int:
    return math.prod(shard_shape(entry, shape, tensor))
