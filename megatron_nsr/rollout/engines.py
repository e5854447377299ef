"""From a configuration to a rollout engine: in the training processes, or servers.

May import: config, types, models, platform, this package, torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial

import torch

from megatron_nsr.config import Config
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.platform import distributed
from megatron_nsr.rollout.engine import RolloutEngine
from megatron_nsr.rollout.server_check import Needed, check_servers, compare
from megatron_nsr.rollout.server_client import Server
from megatron_nsr.rollout.server_engine import ServerEngine
from megatron_nsr.rollout.server_worker import FILE_TRANSPORT
from megatron_nsr.rollout.vllm_engine import VllmEngine, check_tensor_parallel
from megatron_nsr.rollout.vllm_options import QUANTIZATIONS, check_allocator, check_quantization, longest_sequence
from megatron_nsr.types import UserError

MIB = 1 << 20


def check_engine(config: Config, shape: ModelShape, *, world_size: int, samples: bool) -> frozenset[str]:
    """Finds out whether the engine can be had; returns the HF names of the weights that servers hold, none where there are none.

    Rank 0 alone asks the servers, and only for a run that samples. Raises UserError naming what does not fit.
    """
    rollout = config.rollout
    if samples:
        check_quantization(config, experts=shape.moe is not None, on_cpu=not torch.cuda.is_available())
    if rollout.mode == "colocated":
        check_tensor_parallel(rollout.tensor_parallel, world_size=world_size, attention_heads=shape.heads)
        if samples and rollout.sleep_level and not torch.cuda.is_available():
            raise UserError(f"rollout.sleep_level={rollout.sleep_level}: vLLM cannot sleep on a CPU; it must be 0 here")
        if samples and rollout.sleep_level:
            check_allocator()
    elif samples and distributed.launched_rank() == 0:
        return check_servers(_servers(config), _needed(config, shape), rollout.server_timeout_s)
    return frozenset()


def build_engine(config: Config, shape: ModelShape, server_weights: frozenset[str]) -> RolloutEngine:
    """Every rank makes one, at the same time. server_weights: as `check_engine` returned it."""
    rollout = config.rollout
    if rollout.mode == "server":
        return ServerEngine(
            _servers(config),
            run=config.run.dir,
            names=server_weights,
            tied=shape.tie_embeddings,
            vocabulary=shape.vocab_size,
            dtype=getattr(torch, config.model.dtype),
            bucket_bytes=rollout.push_bucket_mib * MIB,
            timeout_s=rollout.server_timeout_s,
            speaks=distributed.rank() == 0,
            fits=partial(compare, needed=_needed(config, shape)),
        )
    return VllmEngine(
        config.model.path,
        dtype=config.model.dtype,
        max_model_len=longest_sequence(config, shape.max_positions),
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_mib=rollout.kv_cache_mib,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enforce_eager=rollout.enforce_eager,
        can_sleep=rollout.sleep_level > 0,
        tensor_parallel=rollout.tensor_parallel,
        quantization=QUANTIZATIONS[rollout.quantization],
    )


def engine_ranks(config: Config, world_size: int) -> int:
    """Ranks that one engine answers for: all, where it is servers that rank 0 talks to."""
    return world_size if config.rollout.mode == "server" else config.rollout.tensor_parallel


def _servers(config: Config) -> list[Server]:
    return [Server(url, f"rollout.servers[{index}]={url}") for index, url in enumerate(config.rollout.servers)]


def _needed(config: Config, shape: ModelShape) -> Needed:
    return Needed(
        transport="nccl" if torch.cuda.is_available() else FILE_TRANSPORT,
        dtype=config.model.dtype,
        quantization=QUANTIZATIONS[config.rollout.quantization],
        workers=config.rollout.tensor_parallel,
        max_model_len=longest_sequence(config, shape.max_positions),
        model=json.loads(json.dumps(asdict(shape))),
    )
