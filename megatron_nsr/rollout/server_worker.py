"""What runs inside the workers of a rollout server; vLLM imports it there because `megatron-nsr serve` names `WorkerExtension`.

May import: models.hf_config, this package, safetensors, torch; vLLM only in functions. The trainer calls the methods over HTTP, so that
arguments and results are JSON.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import safetensors
import torch

from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.rollout.held_weights import held_checksums, held_parts
from megatron_nsr.rollout.pushed_weights import checkpoint_names
from megatron_nsr.rollout.vllm_api import register_file_transport
from megatron_nsr.rollout.vllm_experts import repack_at_next_reload

FILE_TRANSPORT = "megatron_nsr_file"


def read_tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors file, one at a time."""
    with safetensors.safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name).clone()  # not a map of the file, which goes before vLLM has put all parts together


class WorkerExtension:
    """Methods that vLLM mixes into its worker class."""

    # vLLM's worker has these (v1/worker/gpu_worker.py)
    model_runner: Any
    vllm_config: Any
    _weight_update_active: bool
    finish_weight_update: Callable[[], None]

    def nsr_describe(self) -> dict[str, Any]:
        """What a trainer must know of this server before it uses it, and which weights it holds now."""
        config, model = self.vllm_config, self.model_runner.model
        return {
            **self.nsr_held(),
            "transport": config.weight_transfer_config.backend,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "logits": str(config.model_config.head_dtype).removeprefix("torch."),
            "quantization": config.model_config.quantization,
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "logprobs_mode": str(config.model_config.logprobs_mode),
            "model": asdict(read_model_shape(config.model_config.model)),
            "names": sorted(checkpoint_names(dict(model.named_parameters()), getattr(model, "packed_modules_mapping", {}))),
        }

    def nsr_held(self) -> dict[str, Any]:
        """Which process this is, what its weights are called (None before the first push, during one and after a failed one), and whose."""
        if not hasattr(self, "_nsr_identity"):
            self._nsr_identity: str = uuid4().hex
            self._nsr_weights: str | None = None
            self._nsr_owner: str | None = None
        return {"identity": self._nsr_identity, "label": self._nsr_weights, "owner": self._nsr_owner}

    def nsr_label(self, label: str | None, owner: str) -> None:
        """Remembers what the weights are and which run's; None before a push, which ends one that a killed trainer left open."""
        self.nsr_held()
        self._nsr_weights, self._nsr_owner = label, owner
        if label is None and self._weight_update_active:
            self.finish_weight_update()
        if label is None and not torch.cuda.is_available():
            repack_at_next_reload(self.model_runner.model)

    def nsr_sees(self, path: str, size: int) -> dict[str, bool]:
        """Whether a file of the trainer's is there, so that weights can come by file."""
        return {"sees": Path(path).is_file() and os.stat(path).st_size == size}

    def nsr_checksums(self) -> dict[str, Any]:
        """Checksums of what this worker computes with, as [HF name, first row, first column, checksum]."""
        model = self.model_runner.model
        parts = held_parts(model, getattr(model, "packed_modules_mapping", {}))
        sums = held_checksums(model, parts, self.vllm_config.model_config.dtype)
        return {"held": [[*region, share] for region, share in sums.items()]}


register_file_transport(FILE_TRANSPORT, read_tensors)
