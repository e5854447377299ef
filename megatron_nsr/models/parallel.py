"""Checks a parallel layout against the model and the world, and sets megatron-core's process groups up.

May import: megatron.core, platform, config, types.
"""

from __future__ import annotations

import torch

from megatron_nsr.config import ParallelConfig
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.platform import cpu_patches
from megatron_nsr.platform.distributed import TIMEOUT
from megatron_nsr.types import UserError


def validate_layout(parallel: ParallelConfig, shape: ModelShape, world_size: int) -> None:
    """Raises UserError naming the first field that does not fit; needs no process group."""
    tensor, pipeline, virtual = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    for field, size in (
        ("num_attention_heads", shape.heads),
        ("num_key_value_heads", shape.query_groups),
        ("intermediate_size", shape.ffn),
    ):
        if size % tensor:
            raise UserError(f"parallel.tensor={tensor} does not divide {field}={size}")
    if parallel.distributed_optimizer and pipeline > 1 and shape.tie_embeddings:
        # The tied embedding gets a bucket of its own there, and megatron-core 0.16.1 restores shards from wrong places
        # (distrib_optimizer.py).
        raise UserError(
            f"parallel.distributed_optimizer=true with parallel.pipeline={pipeline}: not with tied embeddings, whose optimizer state "
            "would not survive a checkpoint; turn one of the two off"
        )
    if shape.num_layers % (pipeline * virtual):
        chunks = f"parallel.pipeline={pipeline}" + (f" x parallel.virtual_pipeline={virtual}" if virtual > 1 else "")
        raise UserError(f"{chunks} does not divide num_hidden_layers={shape.num_layers}")
    if world_size % (tensor * pipeline):
        raise UserError(
            f"parallel.tensor={tensor} x parallel.pipeline={pipeline} does not divide the {world_size} "
            f"process{'es' if world_size > 1 else ''} of this run; start a multiple of {tensor * pipeline}"
        )


def initialize_parallel(parallel: ParallelConfig, shape: ModelShape, world_size: int, seed: int) -> None:
    """Validates the layout, builds the process groups and seeds megatron-core's random states.

    torch.distributed must be initialised (platform.distributed). Called again it replaces the earlier layout.
    """
    validate_layout(parallel, shape, world_size)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.cuda.is_available():
        cpu_patches.install()  # the random states below are the CPU generator's
    destroy_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
    )
    model_parallel_cuda_manual_seed(seed)


def destroy_parallel() -> None:
    """Forgets megatron-core's process groups where there are any."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
