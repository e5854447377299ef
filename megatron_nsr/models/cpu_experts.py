"""Experts on machines without CUDA: one after another, with tokens gathered over the expert-parallel ranks.

May import: megatron.core, models.expert_routing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn.functional import pad

from megatron_nsr.models.expert_routing import BalancedRouter, RoutedLayer


def experts_spec(provider: LocalSpecProvider) -> ModuleSpec:
    """What stands in place of a layer's MLP; the layer must be a `CpuRoutedLayer`."""
    module, submodules = provider.grouped_mlp_modules(moe_use_grouped_gemm=False, moe_use_legacy_grouped_gemm=False)
    assert module is SequentialMLP
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(experts=ModuleSpec(module=module, submodules=submodules), router=BalancedRouter),
    )


class CpuRoutedLayer(RoutedLayer):
    """A layer with experts, whose ranks may have different numbers of tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mlp: Any = self.mlp
        mlp.token_dispatcher = UnevenAllGather(
            mlp.num_local_experts, mlp.local_expert_indices, config=self.config, pg_collection=self.pg_collection
        )


class UnevenAllGather(MoEAllGatherTokenDispatcher):
    """megatron-core's all-gather of tokens, which takes equal numbers of them on all ranks, for numbers that differ.

    The shorter ranks add rows that no expert takes, and cut them off the experts' output again.
    """

    routing_map: Tensor  # [tokens, experts]

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens of this rank, hidden] to [tokens of all ranks, hidden]; probs, [tokens, experts], likewise."""
        self.tokens = len(hidden_states)
        if self.ep_size > 1:
            longest = torch.tensor(self.tokens)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.tp_ep_group)
            rows = (0, 0, 0, int(longest) - self.tokens)
            hidden_states, probs, self.routing_map = pad(hidden_states, rows), pad(probs, rows), pad(self.routing_map, rows)
        dispatched: tuple[Tensor, Tensor] = super().token_dispatch(hidden_states, probs)
        return dispatched

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """[tokens of all ranks, hidden], each rank's experts' part of it, to [tokens of this rank, hidden], summed over the experts."""
        combined: Tensor = super().token_combine(hidden_states)
        return combined[: self.tokens]
