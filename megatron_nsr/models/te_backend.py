"""Layers of Transformer Engine for CUDA, from megatron-core 0.16.1's own specs.

May import: megatron.core, types, models.expert_routing. Transformer Engine is imported only when the backend is built.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import layers

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
            "gradient_accumulation_fusion": _can_fuse_weight_gradients(),
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


def require_fp8(recipe: str) -> None:
    """Raises UserError where Transformer Engine cannot compute in FP8 by this recipe on this machine. Imports Transformer Engine."""
    te: Any = importlib.import_module("transformer_engine.pytorch")
    ask = te.is_fp8_block_scaling_available if recipe == "blockwise" else te.is_fp8_available
    available, reason = ask(return_reason=True)
    if not available:
        raise UserError(f"model.fp8={recipe}: Transformer Engine says of this machine: {' '.join(reason.split())}")


def _can_fuse_weight_gradients() -> bool:
    """Whether linear layers may add their weight gradients to main_grad themselves, in fp32 and without a gradient between.

    Right together with the head, because all who write main_grad tell megatron-core's data-parallel hook so by
    `grad_added_to_main_grad`, each on parameters of its own, and the hook adds `param.grad` of the others alone
    (distributed/distributed_data_parallel.py, line 436; `zero_grad_buffer` takes the flags back before every mini-batch):

    - Transformer Engine's linear layers, those of experts among them, set the flag and return a placeholder. A module's first micro-batch
      may overwrite main_grad instead of adding to it (2.11, module/linear.py, line 833): gradients are zero then, and under every schedule
      the first micro-batch is also the first whose backward pass runs.
    - The LM head is none of them: its weight is a `ColumnParallelLinear`'s, whose forward pass, and with it megatron-core's own fusion,
      is never called. It sets the flag too (losses/weight_gradient.py), also as a last stage's copy of a tied embedding, whose copies
      `finalize_model_grads` sums in main_grad. Where head and embedding are one parameter it sets none, and the embedding's gradient is
      added by the hook.
    - Embedding, norms, biases, routers and the critic's value head have plain gradients, which the hook adds.

    The condition is megatron-core's own: without Apex's kernel `ColumnParallelLinear` refuses to be built (tensor_parallel/layers.py).
    """
    return bool(layers._grad_accum_fusion_available)
