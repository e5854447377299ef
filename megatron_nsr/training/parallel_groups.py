"""This rank's place in the parallel layout, and the few reductions that metrics need. May import: megatron-core."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True, slots=True)
class ParallelGroups:
    """Ranks and sizes of the groups; built once, after megatron-core's groups exist."""

    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int
    last_stage: bool
    device: torch.device
    tensor_group: dist.ProcessGroup | None
    context_rank: int = 0
    context_size: int = 1
    context_group: dist.ProcessGroup | None = None

    @classmethod
    def current(cls, device: torch.device) -> ParallelGroups:
        tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        context_size = parallel_state.get_context_parallel_world_size()
        return cls(
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            tensor_size=tensor_size,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
            device=device,
            tensor_group=parallel_state.get_tensor_model_parallel_group() if tensor_size > 1 else None,
            context_rank=parallel_state.get_context_parallel_rank(),
            context_size=context_size,
            context_group=parallel_state.get_context_parallel_group() if context_size > 1 else None,
        )

    def sum_over_last_stages(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over data-parallel ranks, on every rank. Tensor- and context-parallel ranks hold equal values: one speaks."""
        if dist.get_world_size() == 1:
            return values
        speaks = self.last_stage and self.tensor_rank == 0 and self.context_rank == 0
        values = (values if speaks else torch.zeros_like(values)).to(self.device)
        dist.all_reduce(values)
        return values.cpu()

    def sum_over_world(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over all ranks, on every rank."""
        if dist.get_world_size() == 1:
            return values
        values = values.to(self.device)
        dist.all_reduce(values)
        return values.cpu()

    def max_over_world(self, values: torch.Tensor) -> torch.Tensor:
        if dist.get_world_size() == 1:
            return values
        values = values.to(self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.cpu()
