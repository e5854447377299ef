"""Transformer Engine's linear layers in FP8: what megatron-core is told, which sizes they take, how far micro-batches are filled up.

May import: config, types, models.hf_config, megatron.core. Weights and optimizer stay what they are in bfloat16: a layer rounds its weight
when a schedule's first micro-batch arrives, so that checkpoints, export and push know nothing of FP8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_nsr.config import ModelConfig, ParallelConfig
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.types import UserError

if TYPE_CHECKING:  # the planner checks layouts without megatron-core, whose import takes seconds
    from megatron.core.transformer.transformer_config import TransformerConfig

_SIDE = 16  # of each side of an FP8 product, rows of tokens included (cuBLAS; Transformer Engine 2.11, utils.py)
# What one rank adds to an all-gather in blockwise scaling (Transformer Engine 2.11, utils.py, assert_dim_for_all_gather).
_GATHERED_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Fp8:
    """`model.fp8` and how many layers at either end stay in bfloat16."""

    recipe: Literal["delayed", "tensorwise", "blockwise"]
    edge_layers: int = 0

    @classmethod
    def of(cls, model: ModelConfig) -> Fp8 | None:
        return None if model.fp8 is None else cls(model.fp8, model.fp8_edge_layers)


def fp8_fields(fp8: Fp8) -> dict[str, Any]:
    """The fields of megatron-core 0.16.1's TransformerConfig."""
    fields: dict[str, Any] = {
        # Gradients reach further than e4m3 with one scale a tensor, and not with one a block: Transformer Engine's defaults.
        "fp8": "e4m3" if fp8.recipe == "blockwise" else "hybrid",
        "fp8_recipe": fp8.recipe,
    }
    if fp8.recipe == "delayed":
        # Transformer Engine's defaults; megatron-core's own, the last micro-batch's largest value alone, clip whatever grows.
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
        # The ranks of a group agree on scales after each micro-batch, and data-parallel ranks may have different numbers of them.
        fields["tp_only_amax_red"] = True
    if fp8.edge_layers:
        edge = fp8.edge_layers
        fields |= {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": edge, "num_layers_at_end_in_bf16": edge}
    return fields


def check_fp8(fp8: Fp8, shape: ModelShape, parallel: ParallelConfig, backend: str) -> None:
    """Raises UserError where this model on this layout cannot compute in FP8. Needs no GPU and no process group."""
    if backend != "te":
        raise UserError(f"model.fp8={fp8.recipe}: only Transformer Engine computes in FP8, on a GPU, and this is the {backend} backend")
    edge, stage = fp8.edge_layers, shape.num_layers // parallel.pipeline
    if 2 * edge > shape.num_layers:
        raise UserError(f"model.fp8_edge_layers={edge}: twice that is more than num_hidden_layers={shape.num_layers}")
    if edge > stage:  # transformer_config.py, line 1005
        raise UserError(
            f"model.fp8_edge_layers={edge} is more than the {stage} layers of one of parallel.pipeline={parallel.pipeline} stages"
        )
    for name, size in _sides(shape, parallel.tensor):
        if size % _SIDE:
            raise UserError(f"model.fp8={fp8.recipe}: {name} is {size}, which is no multiple of {_SIDE}, as FP8 products need")
    if fp8.recipe == "blockwise" and parallel.sequence and shape.hidden % _GATHERED_BLOCK:
        raise UserError(
            f"model.fp8=blockwise with parallel.sequence=true: hidden_size is {shape.hidden}, which is no multiple of {_GATHERED_BLOCK}, "
            "as gathered blocks need; set tensorwise"
        )


def _sides(shape: ModelShape, tensor: int) -> Iterator[tuple[str, int]]:
    """(name, size) of the sides of every linear layer's weight on a tensor-parallel rank."""
    each = f" / parallel.tensor={tensor}" if tensor > 1 else ""
    yield "hidden_size", shape.hidden
    yield f"num_attention_heads x head_dim{each}", shape.heads * shape.head_dim // tensor
    yield f"num_key_value_heads x head_dim{each}", shape.query_groups * shape.head_dim // tensor
    if shape.moe is None:
        yield f"intermediate_size{each}", shape.ffn // tensor
    else:
        yield "moe_intermediate_size", shape.moe.ffn


def token_multiple(config: TransformerConfig) -> int:
    """What the tokens of a context-parallel rank's part of a micro-batch must be a multiple of.

    Sequence parallelism cuts them evenly over the tensor-parallel ranks, and FP8 products have whole rows of 16. Experts fill up their own
    tokens (megatron-core 0.16.1, transformer/moe/experts.py, TEGroupedMLP), so no router has to send some to experts they did not choose.
    """
    ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
    if not config.fp8:
        return ranks
    return ranks * (_GATHERED_BLOCK if config.fp8_recipe == "blockwise" and config.sequence_parallel else _SIDE)
