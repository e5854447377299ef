"""Checks a parallel layout against the model and the world, and sets megatron-core's process groups up.

May import: megatron.core, platform, config, types.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist

from megatron_nsr.config import ParallelConfig
from megatron_nsr.models.hf_config import MixtureOfExperts, ModelShape
from megatron_nsr.platform import cpu_patches, distributed
from megatron_nsr.platform.distributed import TIMEOUT
from megatron_nsr.types import UserError


def validate_layout(parallel: ParallelConfig, shape: ModelShape, world_size: int) -> None:
    """Raises UserError naming the first field that does not fit; needs no process group."""
    tensor, pipeline, virtual = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    split = [("num_attention_heads", shape.heads), ("num_key_value_heads", shape.query_groups)]
    if shape.moe is None:
        split.append(("intermediate_size", shape.ffn))
    for field, size in split:
        if size % tensor:
            raise UserError(f"parallel.tensor={tensor} does not divide {field}={size}")
    if shape.num_layers % (pipeline * virtual):
        chunks = f"parallel.pipeline={pipeline}" + (f" x parallel.virtual_pipeline={virtual}" if virtual > 1 else "")
        raise UserError(f"{chunks} does not divide num_hidden_layers={shape.num_layers}")
    validate_ranks(parallel, world_size)
    _validate_experts(parallel, shape.moe, world_size // pipeline)


def validate_ranks(parallel: ParallelConfig, world_size: int) -> None:
    """What can be said before the model is known. Raises UserError unless copies of the model fill the world."""
    replica = parallel.tensor * parallel.context * parallel.pipeline
    if world_size % replica:
        context = f" x parallel.context={parallel.context}" if parallel.context > 1 else ""
        raise UserError(
            f"parallel.tensor={parallel.tensor}{context} x parallel.pipeline={parallel.pipeline} does not divide the {world_size} "
            f"process{'es' if world_size > 1 else ''} of this run; start a multiple of {replica}"
        )


def _validate_experts(parallel: ParallelConfig, moe: MixtureOfExperts | None, stage_ranks: int) -> None:
    """stage_ranks: processes that a pipeline stage is spread over: tensor-, context- and data-parallel ranks."""
    if moe is None:
        if parallel.expert > 1:
            raise UserError(f"parallel.expert={parallel.expert}: the model has no experts; it must be 1")
        return
    if moe.experts % parallel.expert:
        raise UserError(f"parallel.expert={parallel.expert} does not divide num_experts={moe.experts}")
    if stage_ranks % parallel.expert:
        raise UserError(f"parallel.expert={parallel.expert} does not divide the {stage_ranks} processes of a pipeline stage")
    if parallel.tensor > 1 and not parallel.sequence:
        # Experts are whole on their rank: tensor-parallel ranks must hand them different tokens.
        raise UserError(f"parallel.tensor={parallel.tensor} of a model with experts needs parallel.sequence=true")


def initialize_parallel(parallel: ParallelConfig, shape: ModelShape, world_size: int, seed: int) -> None:
    """Validates the layout, builds the process groups and seeds megatron-core's random states.

    torch.distributed must be initialised (platform.distributed). Called again it replaces the earlier layout, unless that is the same.
    """
    validate_layout(parallel, shape, world_size)
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.cuda.is_available():
        cpu_patches.install()  # the random states below are the CPU generator's
    sizes = {
        "tensor_model_parallel_size": parallel.tensor,
        "context_parallel_size": parallel.context,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "expert_model_parallel_size": parallel.expert,
    }
    _build_groups(sizes)
    model_parallel_cuda_manual_seed(seed)


_built: list[Any] = []  # the default process group and the sizes that the groups were built for, if there are any


def _build_groups(sizes: dict[str, int | None]) -> None:
    from megatron.core import parallel_state

    asked = [dist.group.WORLD, sizes]
    if _built == asked and parallel_state.model_parallel_is_initialized():
        return
    destroy_parallel()
    minutes = int(TIMEOUT.total_seconds() // 60)
    parallel_state.initialize_model_parallel(**sizes, expert_tensor_parallel_size=1, distributed_timeout_minutes=minutes)
    _built[:] = asked


def destroy_parallel() -> None:
    """Ends megatron-core's process groups where there are any. Every rank calls it."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return
    distributed.barrier()  # a rank may still be at work in one of them
    groups = [group for group in parallel_state._global_process_group_list if group is not None]
    parallel_state.destroy_model_parallel()
    # megatron-core 0.16.1 ends a few of its groups and forgets the others (parallel_state.py, line 2085), with threads and connections.
    for group in groups:
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)
    del groups
    gc.collect()  # a group's threads end with the last reference to it, and models hold some in cycles
