"""Engine settings that the engine in the trainer and a rollout server share.

May import: config, types; vLLM only in functions.
"""

from __future__ import annotations

import os
from typing import Any

from megatron_nsr.config import Config
from megatron_nsr.types import UserError

CPU_BATCHED_TOKENS = 4096  # tokens of one forward pass
# One scale a row of a weight and one a token, which 0.26 and 0.32 both know; their "fp8" is not the same thing, and in 0.32 for files only.
QUANTIZATIONS = {None: None, "fp8": "fp8_per_channel"}


def longest_sequence(config: Config, max_positions: int) -> int:
    """Tokens of the longest prompt with its response, in training and evaluation, as far as the model can read."""
    response = max(config.rollout.max_response_tokens, config.evaluation.max_response_tokens or 0)
    return min(config.data.max_prompt_tokens + response, max_positions)


def cpu_options(max_model_len: int) -> dict[str, Any]:
    """What vLLM needs on a CPU."""
    # A prompt split over two passes makes vLLM turn back the generator of a seeded request, which raises on CPU: "CPU Generator
    # does not use offset" (vllm/v1/worker/gpu_model_runner.py, _bookkeeping_sync, 0.32.0). So prompts are never split.
    return {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, max_model_len)}


def check_quantization(config: Config, *, experts: bool, on_cpu: bool) -> None:
    """Raises UserError where vLLM cannot round this model's weights, or a push of them would go unverified without anyone having asked."""
    rollout = config.rollout
    if rollout.quantization is None:
        return
    field = f"rollout.quantization={rollout.quantization}"
    if experts and on_cpu:
        raise UserError(f"{field}: vLLM rounds the weights of experts on a GPU only")
    if rollout.verify_push != "never" and (experts or rollout.tensor_parallel > 1):
        what = "a model with experts" if experts else f"rollout.tensor_parallel={rollout.tensor_parallel}"
        raise UserError(
            f"{field}: what an engine holds of {what} cannot be compared with the policy; set rollout.verify_push=never to go on without, "
            f"not {rollout.verify_push}"
        )


def config_overrides(*, untie: bool) -> dict[str, Any]:
    """What vLLM takes instead of what config.json says. untie: the head has weights of its own, whatever the model has.

    Its logits are float32, as the trainer's are: log-probs of bfloat16 logits, of which one near 20 has a rounding error of 0.06, would be
    those of another distribution. On a GPU vLLM makes no float32 copy of the weights for that; nothing changes for a float32 model.
    """
    return {"head_dtype": "float32"} | ({"tie_word_embeddings": False} if untie else {})


def check_allocator() -> None:
    """Raises UserError where torch's allocator is set so that an engine cannot sleep.

    Expandable segments would take vLLM's memory out of its own pool. vLLM turns them off there where PYTORCH_CUDA_ALLOC_CONF asks for them;
    0.26 does not look into the variable's newer name, 0.32 does (vllm/device_allocator/cumem.py).
    """
    settings = os.environ.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:True" in settings:
        raise UserError(
            f"PYTORCH_ALLOC_CONF={settings}: with rollout.sleep_level vLLM needs to see it as PYTORCH_CUDA_ALLOC_CONF; rename it, or leave "
            "expandable_segments out"
        )


def check_head_size(head_dim: int) -> None:
    """Raises UserError where vLLM's attention on a CPU has no kernel for heads of that size; it would tell when it first samples.

    Imports vLLM.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in sizes:
        raise UserError(
            f"model.path: config.json: head_dim={head_dim} (hidden_size / num_attention_heads unless it is given): vLLM samples on a CPU "
            f"with heads of {', '.join(map(str, sizes))} only"
        )
