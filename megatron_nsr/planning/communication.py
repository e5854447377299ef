"""Bytes that one GPU sends, by group. A ring over n ranks sends (n - 1) / n of the result for an all-gather or a reduce-scatter.

May import: models, planning. Formulas with their sources: docs/planning.md.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.planning.layout import Layout
from megatron_nsr.planning.parameters import Elements, model_elements, stage_elements
from megatron_nsr.planning.passes import Passes, step_passes
from megatron_nsr.planning.workload import Workload


def ring(ranks: int) -> float:
    """The share of a whole tensor that each rank sends in an all-gather or a reduce-scatter."""
    return (ranks - 1) / ranks


def tensor_bytes(shape: ModelShape, layout: Layout, tokens: float, element: int) -> float:
    """One layer, one way (forward or backward): an all-gather and a reduce-scatter each of attention and MLP, or two all-reduces.

    A mixture's experts are whole on their rank: only attention is split.
    """
    blocks = 2 if shape.moe is None else 1
    return 2 * blocks * tokens * shape.hidden * element * ring(layout.tensor)


def expert_bytes(shape: ModelShape, layout: Layout, part_tokens: float, element: int) -> float:
    """One layer, one way: tokens to their experts and back, by all-to-all."""
    if shape.moe is None:
        return 0.0
    return 2 * part_tokens * shape.moe.experts_per_token * shape.hidden * element * ring(layout.expert)


def context_bytes(shape: ModelShape, layout: Layout, tokens: float, element: int) -> float:
    """One layer, one way: keys and values of the other context-parallel ranks pass by."""
    keys = shape.query_groups * shape.head_dim // layout.tensor
    return 2 * tokens * keys * element * (layout.context - 1)


def pipeline_bytes(shape: ModelShape, layout: Layout, part_tokens: float, element: int) -> float:
    """One way: every chunk's output goes to the next stage."""
    return 0.0 if layout.pipeline == 1 else part_tokens * shape.hidden * element * layout.virtual_pipeline


def passes_bytes(shape: ModelShape, layout: Layout, passes: Passes, tokens: float, element: int) -> dict[str, float]:
    """By group, of `tokens` tokens of a rank in one stage's layers. A layer that is recomputed sends again, but not between stages."""
    layers, part = shape.num_layers / layout.pipeline, tokens / layout.tensor if layout.sequence else tokens
    again = layout.again(shape)
    split = (again.linear + again.mlp) / 2 if shape.moe is None else again.linear

    def ways(share: float) -> float:
        return layers * (1 + passes.backwards * (1 + share))

    return {
        "tensor parallel": ways(split) * tensor_bytes(shape, layout, tokens, element),
        "context parallel": ways(again.scores) * context_bytes(shape, layout, tokens, element),
        "expert parallel": ways(again.mlp) * expert_bytes(shape, layout, part, element),
        "pipeline": (1 + passes.backwards) * pipeline_bytes(shape, layout, part, element),
    }


def step_bytes(shape: ModelShape, layout: Layout, workload: Workload, element: int) -> dict[str, float]:
    """By group, of one GPU of the first stage in all phases of a step but sampling; groups that send nothing are left out."""
    found: dict[str, float] = defaultdict(float)
    tokens = workload.kept_tokens / layout.data / layout.context
    for passes in itertools.chain(*step_passes(workload).values()):
        for group, size in passes_bytes(shape, layout, passes, tokens, element).items():
            found[group] += size
        elements = stage_elements(shape, layout, 0, critic=passes.critic)
        found["data parallel, gradients"] += passes.updates * gradient_bytes(layout, elements)
        found["data parallel, weights"] += passes.updates * parameter_bytes(layout, elements, element)
    found["push, inside a stage"], found["push, between stages"] = push_gather_bytes(shape, layout, element)
    return {name: size for name, size in found.items() if size}


def gradient_bytes(layout: Layout, elements: Elements) -> float:
    """A mini-batch: fp32 gradients by reduce-scatter (distributed optimizer), or by all-reduce."""
    ways = 1 if layout.distributed_optimizer else 2
    return ways * 4 * (elements.dense * ring(layout.replicas) + elements.experts * ring(layout.expert_replicas))


def parameter_bytes(layout: Layout, elements: Elements, element: int) -> float:
    """A mini-batch: the distributed optimizer's shards of the new weights, by all-gather."""
    if not layout.distributed_optimizer:
        return 0.0
    return element * (elements.dense * ring(layout.replicas) + elements.experts * ring(layout.expert_replicas))


def push_gather_bytes(shape: ModelShape, layout: Layout, element: int) -> tuple[float, float]:
    """A push, (inside a stage, between stages): tensor- and expert-parallel ranks gather, stages broadcast what they own."""
    whole = model_elements(shape) * element
    inside = whole / layout.pipeline * max(ring(layout.tensor), ring(layout.expert))
    return inside, whole * ring(layout.pipeline)
