"""Memory of vLLM on one GPU. May import: config, models, planning."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_nsr.config import Config
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.planning.hardware import GIB, Gpu
from megatron_nsr.planning.parameters import layer_elements, model_elements

# vLLM 0.32 takes 16,384 tokens a pass on GPUs of this size where it is not told otherwise (engine/arg_utils.py), 4,096 on a CPU.
BATCHED_TOKENS = {"te": 16384, "cpu": 4096}
CUDA_GRAPHS = 1 * GIB  # an assumption; nothing with rollout.enforce_eager


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes on one GPU while the engine is awake."""

    weights: float
    cache: float  # keys and values
    workspace: float
    cache_per_token: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.workspace

    @property
    def cached_tokens(self) -> int:
        return max(0, int(self.cache // self.cache_per_token))


def engine_memory(config: Config, shape: ModelShape, gpu: Gpu, element: int) -> EngineMemory:
    """rollout.kv_cache_mib sets the cache; without it the cache is what gpu_memory_utilization leaves, which may be negative."""
    rollout, tensor = config.rollout, config.rollout.tensor_parallel
    weights = engine_weights(shape, element, fp8=rollout.quantization == "fp8") / tensor
    workspace = _workspace(shape, rollout.max_num_seqs, tensor, element, BATCHED_TOKENS[gpu.backend])
    if gpu.backend == "te" and not rollout.enforce_eager:
        workspace += CUDA_GRAPHS
    cache = rollout.gpu_memory_utilization * gpu.memory_bytes - weights - workspace
    if rollout.kv_cache_mib is not None:
        cache = float(rollout.kv_cache_mib << 20)
    return EngineMemory(weights, cache, workspace, cache_per_token(shape, tensor, element))


def engine_weights(shape: ModelShape, element: int, *, fp8: bool) -> float:
    """Bytes of all ranks of an engine; fp8 rounds the layers, not the embedding and the head."""
    layers = layer_elements(shape, 1, 1).total * shape.num_layers
    return float(model_elements(shape) * element - (layers * (element - 1) if fp8 else 0))


def cache_per_token(shape: ModelShape, tensor: int, element: int) -> float:
    """Key and value of every layer. With more ranks than key-value heads each rank has one head whole."""
    return float(2 * shape.num_layers * max(1, shape.query_groups // tensor) * shape.head_dim * element)


def _workspace(shape: ModelShape, sequences: int, tensor: int, element: int, tokens: int) -> float:
    """One layer's activations in a full pass, and three fp32 copies of the logits that are sampled from (logits, sorted, log-probs)."""
    ffn = shape.moe.ffn * shape.moe.experts_per_token if shape.moe else shape.ffn
    layer = tokens * element * (2 * shape.hidden + 3 * ffn / tensor)
    return layer + 3 * 4 * sequences * shape.vocab_size
