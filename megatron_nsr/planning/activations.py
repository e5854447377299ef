"""Bytes that a micro-batch keeps on a rank for its backward pass, and what head and backward pass need beside them.

May import: config, losses.chunks, models, planning. Formulas with their sources: docs/planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_nsr.losses.chunks import default_chunk
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.planning.hardware import BackendName
from megatron_nsr.planning.layout import Layout

FP8_BYTES = 1


@dataclass(frozen=True, slots=True)
class Widths:
    """A layer's sizes on one tensor-parallel rank, elements a token."""

    hidden: int
    queries: int
    keys: int  # of the keys alone; values have as many
    heads: int
    head_dim: int
    ffn: int  # a dense layer's

    @classmethod
    def of(cls, shape: ModelShape, tensor: int) -> Widths:
        return cls(
            shape.hidden,
            shape.heads * shape.head_dim // tensor,
            shape.query_groups * shape.head_dim // tensor,
            shape.heads // tensor,
            shape.head_dim,
            shape.ffn // tensor,
        )


def kept_by_layer(shape: ModelShape, layout: Layout, element: int, backend: BackendName) -> float:
    """Bytes that one layer keeps of one micro-batch, on average over the layers. element: bytes of an activation."""
    fp8, share = layout.fp8_share(shape), layout.recomputed_share(shape)
    whole = (1 - fp8) * _whole_layer(shape, layout, element, backend, element)
    whole += fp8 * _whole_layer(shape, layout, element, backend, FP8_BYTES)
    entry = layout.part_tokens * shape.hidden * element / layout.refined.together
    return share * entry / (layout.tensor if layout.refined.distributed else 1) + (1 - share) * whole


def _whole_layer(shape: ModelShape, layout: Layout, element: int, backend: BackendName, side: int) -> float:
    """side: bytes of an input that a linear layer keeps for its weight's gradient; `element`, or 1 where it computes in FP8."""
    widths = Widths.of(shape, layout.tensor)
    attention = _attention_bytes(shape, layout, widths, element, backend)
    if side != element:  # attention keeps its output as it is, and the layer behind it a rounded copy
        attention += layout.tokens * side * widths.queries
    norm = layout.part_tokens * (_norm_bytes(widths.hidden, element, backend) + (side - element) * widths.hidden)
    second = norm if shape.moe is None else layout.part_tokens * _norm_bytes(widths.hidden, element, backend)  # the router's input too
    if not layout.again(shape).mlp or layout.recompute == "full":
        return norm + second + attention + _mlp_bytes(shape, layout, widths, element, backend, side)
    # The second norm is part of what te recomputes, but before experts.
    return norm + attention + (second if backend == "cpu" or shape.moe else layout.part_tokens * widths.hidden * element)


def _norm_bytes(width: int, element: int, backend: BackendName) -> float:
    """Input, output and the root mean square of a token; torch's own norm keeps the input and the normed input in fp32."""
    return width * (2 * element if backend == "te" else 8 + element) + 4


def _attention_bytes(shape: ModelShape, layout: Layout, widths: Widths, element: int, backend: BackendName) -> float:
    """Queries, keys, values and output, and a number a head; torch keeps more of them."""
    queries, keys, selective = widths.queries, widths.keys, layout.recomputes("core_attn")
    if backend == "te":
        token = element * (2 * queries + 2 * keys) + (0 if selective else 4 * widths.heads)
        if shape.qk_norm:  # the norms' inputs: a copy of the queries, and the fused projection that the keys are a view of
            token += element * (2 * queries + 2 * keys)
        return float(layout.tokens * token)
    # The fused projection, queries and keys after rotation, the output; cosines and sines of both; where tokens lie in the padded batch.
    token = element * (3 * queries + 3 * keys + 4 * widths.head_dim) + 4 * widths.heads + 8
    if not selective:  # queries, keys, values and output padded to the longest sequence
        token += element * (2 * queries + 2 * keys)
    if not selective and layout.context > 1:  # keys and values of all ranks, gathered in place of the rotated keys, and padded; the mask
        token += element * (2 * keys * (layout.context - 1) + 2 * keys * layout.context - keys + layout.longest_tokens)
    if shape.qk_norm:  # norms in fp32; a view of the projection needs no copy where that is fp32 too
        token += 4 * (2 * queries + (1 if element == 4 else 2) * keys + widths.heads + keys // widths.head_dim)
    return float(layout.tokens * token)


def _mlp_bytes(shape: ModelShape, layout: Layout, widths: Widths, element: int, backend: BackendName, side: int) -> float:
    """The gate and up projections' output and what enters the down projection; torch keeps the factors of SwiGLU too."""
    inner = (2 if backend == "te" else 4) * element + side
    if shape.moe is None:
        return float(layout.tokens * inner * widths.ffn)
    # Router logits and probabilities in fp32; the copies of a token that its experts get, and their inner width.
    routed = shape.moe.experts_per_token * (side * shape.hidden + inner * shape.moe.ffn)
    return float(layout.part_tokens * (2 * 4 * shape.moe.experts + routed))


def layers_in_flight(shape: ModelShape, layout: Layout, micro_batches: int, stage: int) -> float:
    """Layers of a rank whose activations live at once, counted once a micro-batch.

    One forward, one backward: stage r starts with pipeline - r - 1 micro-batches more. Interleaved: 2 (pipeline - r - 1) +
    (virtual - 1) pipeline chunks more (megatron-core 0.16.1, pipeline_parallel/schedules.py, get_pp_rank_microbatches).
    """
    behind = layout.pipeline - stage - 1
    chunk = shape.num_layers / (layout.pipeline * layout.virtual_pipeline)
    if layout.virtual_pipeline == 1:
        return min(behind + 1, micro_batches) * chunk
    return min(2 * behind + (layout.virtual_pipeline - 1) * layout.pipeline + 1, micro_batches * layout.virtual_pipeline) * chunk


def activation_bytes(shape: ModelShape, layout: Layout, micro_batches: int, stage: int, element: int, backend: BackendName) -> float:
    """What lives between a forward and a backward pass, at most."""
    kept = layers_in_flight(shape, layout, micro_batches, stage) * kept_by_layer(shape, layout, element, backend)
    if stage == layout.pipeline - 1:  # the final norm, and the head's gradient of its input, of one micro-batch
        kept += layout.part_tokens * (_norm_bytes(shape.hidden, element, backend) + element * shape.hidden)
    if backend == "cpu" and layout.pipeline > 1 and stage < layout.pipeline - 1:  # what was sent stays: it cannot be freed early
        chunks = layers_in_flight(shape, layout, micro_batches, stage) / (shape.num_layers / (layout.pipeline * layout.virtual_pipeline))
        kept += chunks * layout.part_tokens * shape.hidden * element
    return kept


def workspace_bytes(
    shape: ModelShape, layout: Layout, stage: int, element: int, backend: BackendName, *, chunk: int | None, sign_norms: bool
) -> float:
    """The larger of what the head needs while it runs and what a layer's backward pass needs."""
    head = head_workspace(shape, layout, element, backend, chunk=chunk, sign_norms=sign_norms) if stage == layout.pipeline - 1 else 0.0
    return max(head, backward_workspace(shape, layout, element, backend))


def head_workspace(shape: ModelShape, layout: Layout, element: int, backend: BackendName, *, chunk: int | None, sign_norms: bool) -> float:
    """Of the fused head, as docs/fused-head.md derives it: no term has tokens x vocabulary."""
    rows = -(-shape.vocab_size // layout.tensor)
    size = min(chunk or default_chunk(rows, torch.device("cuda" if backend == "te" else "cpu")), layout.tokens)
    upcast = backend == "cpu" and element == 2
    gradient = element if element == 2 and not upcast else 0
    total = (4 + gradient + (max(gradient, 4 if element == 4 or upcast else 0) if sign_norms else 0)) * size * rows
    total += 4 * rows * shape.hidden if upcast else 0
    total += 2 * layout.tokens * shape.hidden * element if layout.sequence else 0
    return float(total + 40 * layout.tokens)


def backward_workspace(shape: ModelShape, layout: Layout, element: int, backend: BackendName) -> float:
    """Gradients inside an MLP while they are formed, a weight's gradient before it is summed, and a recomputed layer."""
    widths = Widths.of(shape, layout.tensor)
    if shape.moe is None:
        inner = layout.tokens * 3 * widths.ffn
        weight = 2 * widths.ffn * shape.hidden
    else:
        inner = layout.part_tokens * shape.moe.experts_per_token * 3 * shape.moe.ffn
        weight = 2 * shape.moe.ffn * shape.hidden
    again = 0.0
    if layout.recompute == "full":
        again = layout.refined.together * _whole_layer(shape, layout, element, backend, element)
    elif layout.again(shape).mlp:
        again = _mlp_bytes(shape, layout, widths, element, backend, element)
    return again + element * (inner + 2 * layout.part_tokens * shape.hidden + weight)
