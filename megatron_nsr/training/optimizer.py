"""megatron-core's data-parallel wrapper and optimizer around a policy's model chunks. May import: config, megatron-core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_nsr.config import OptimizerConfig


def wrap_data_parallel(chunks: Sequence[Any], *, distributed_optimizer: bool) -> list[DistributedDataParallel]:
    """Wraps each model chunk; gradients are accumulated and reduced in fp32 whatever the parameters' dtype is."""
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer)
    # Only the first chunk's backward pass comes last, so only it gains from buckets (as in megatron-core's own training loop).
    return [DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]


def build_optimizer(
    wrapped: Sequence[DistributedDataParallel], settings: OptimizerConfig, *, dtype: torch.dtype, distributed_optimizer: bool
) -> MegatronOptimizer:
    """AdamW with fp32 main weights; biases and norms are never decayed. Hooks it into the model's schedule config."""
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        clip_grad=settings.gradient_clip,
        use_distributed_optimizer=distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, list(wrapped), config_overrides=get_standard_config_overrides(config))
    for group in optimizer.param_groups:  # upstream leaves this to its scheduler, which we do not use (optimizer_param_scheduler.py)
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    for chunk in wrapped:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
