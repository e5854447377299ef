"""Floating-point operations of a token and of a step's passes. May import: models, planning. Formulas: docs/planning.md."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.planning.layout import Layout
from megatron_nsr.planning.passes import Passes, step_passes
from megatron_nsr.planning.workload import Lengths, Workload


def layer_products(shape: ModelShape) -> float:
    """Of one token in one layer's matrix products with weights, forward: two for each weight that the token meets."""
    if shape.moe is None:
        return linear_products(shape) + 2.0 * 3 * shape.hidden * shape.ffn
    return linear_products(shape) + 2.0 * shape.hidden * shape.moe.experts + expert_products(shape)


def linear_products(shape: ModelShape) -> float:
    """The part of `layer_products` in attention: queries, keys, values and output."""
    return 2.0 * shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.query_groups)


def expert_products(shape: ModelShape) -> float:
    """The part of `layer_products` in a mixture's experts."""
    return 2.0 * shape.moe.experts_per_token * 3 * shape.hidden * shape.moe.ffn if shape.moe else 0.0


def attention_products(shape: ModelShape, context: float) -> float:
    """Of one token that looks at `context` tokens, in one layer: scores, and their sum over values."""
    return 4.0 * shape.heads * shape.head_dim * context


def head_products(shape: ModelShape) -> float:
    """Of one response token in one product with the LM head."""
    return 2.0 * shape.hidden * shape.vocab_size


def mean_context(lengths: Lengths) -> float:
    """Tokens that a token of a packed sequence looks at, on average over tokens: half of E[n^2] / E[n]."""
    squared = lengths.sequence_mean**2 + (lengths.response_spread * lengths.response_mean) ** 2
    return min(squared / lengths.sequence_mean, lengths.prompt_mean + lengths.cap) / 2


@dataclass(frozen=True, slots=True)
class LayerWork:
    """Of one token in one layer: its linear layers but a mixture's experts, attention's scores, and the experts."""

    linear: float
    scores: float
    experts: float

    @property
    def total(self) -> float:
        return self.linear + self.scores + self.experts


def layer_work(shape: ModelShape, layout: Layout, passes: Passes, context: float) -> LayerWork:
    """Backward is twice forward, and what is recomputed."""
    linear, experts, again = linear_products(shape), expert_products(shape), layout.again(shape)
    mlp = layer_products(shape) - linear - experts

    def times(share: float) -> float:
        return 1 + passes.backwards * (2 + share)

    return LayerWork(
        linear=times(again.linear) * linear + times(again.mlp) * mlp,
        scores=times(again.scores) * attention_products(shape, context),
        experts=times(again.mlp) * experts,
    )


def passes_flops(shape: ModelShape, layout: Layout, workload: Workload, passes: Passes) -> float:
    """Of all GPUs together. The head is for response tokens alone."""
    layers = shape.num_layers * layer_work(shape, layout, passes, mean_context(workload.lengths)).total
    return workload.kept_tokens * (layers + passes.head * workload.response_share * head_products(shape))


def step_flops(shape: ModelShape, layout: Layout, workload: Workload) -> dict[str, float]:
    """Of all GPUs together, by phase. Sampled tokens pass once; prompts are read once for all their samples."""
    lengths = workload.lengths
    sampled = workload.sequences * lengths.response_mean
    found = {
        "prefill": forward_flops(shape, workload, workload.prompts * lengths.prompt_mean),
        "decode": forward_flops(shape, workload, sampled) + sampled * head_products(shape),
    }
    for name, passes in step_passes(workload).items():
        found[name] = sum(passes_flops(shape, layout, workload, one) for one in passes)
    return found


def forward_flops(shape: ModelShape, workload: Workload, tokens: float) -> float:
    """Of the layers, over packed sequences."""
    return tokens * shape.num_layers * (layer_products(shape) + attention_products(shape, mean_context(workload.lengths)))


def model_flops(shape: ModelShape, workload: Workload, tokens: float) -> float:
    """Of an update as utilization counts them: forward and backward, without what is recomputed."""
    return 3 * (forward_flops(shape, workload, tokens) + tokens * workload.response_share * head_products(shape))
