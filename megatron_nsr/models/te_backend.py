"""Layers of Transformer Engine for CUDA, from megatron-core 0.16.1's own specs.

May import: megatron.core, types, models.expert_routing. Transformer Engine is imported only when the backend is built.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from megatron_nsr.types import UserError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig


class TransformerEngineBackend:
    """The `te` backend: nccl, fused norms and attention."""

    name = "te"
    token_dispatcher = "alltoall"

    def __init__(self) -> None:
        """Raises UserError where CUDA or Transformer Engine is missing."""
        if not torch.cuda.is_available():
            raise UserError("model.backend='te': torch sees no CUDA device; use cpu or auto")
        try:
            importlib.import_module("transformer_engine.pytorch")
        except ImportError as error:
            raise UserError(f"model.backend='te': Transformer Engine cannot be imported ({error}); install the [cuda] extra") from None
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before the process group exists
        self.device = torch.device("cuda", torch.cuda.current_device())

    def config_overrides(self) -> dict[str, Any]:
        return {
            "use_cpu_initialization": False,
            "gradient_accumulation_fusion": False,  # the LM head forms its own weight gradient, in weight.grad
            "bias_activation_fusion": True,
            "bias_dropout_fusion": True,
            "apply_rope_fusion": True,
            "deallocate_pipeline_outputs": True,
            "moe_grouped_gemm": True,  # read only where there are experts
            "cp_comm_type": "p2p",  # read only with context parallelism; keys and values go round the ranks while attention runs
        }

    def block_spec(self, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, normalization="RMSNorm", vp_stage=vp_stage)
        if config.num_moe_experts is not None:
            from megatron_nsr.models.expert_routing import BalancedRouter, RoutedLayer

            for layer in spec.layer_specs:
                layer.module, layer.submodules.mlp.submodules.router = RoutedLayer, BalancedRouter
        return spec

    def phase(self) -> AbstractContextManager[Any]:
        return nullcontext()
