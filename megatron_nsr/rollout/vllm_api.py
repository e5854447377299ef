"""All that depends on vLLM's version outside an engine in this process: its HTTP endpoints, and its weight transfer.

May import: this package, numpy, torch and the standard library; vLLM only in functions. Versions 0.26 and 0.32 are both tested
(`make test`, `make test-vllm-0.26`); a comment says where they differ, and what is written here suits both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from packaging.version import Version

from megatron_nsr.rollout.engine import Completion, SampleRequest, Sampling

API_SERVER = "vllm.entrypoints.openai.api_server"  # 0.32 says it is deprecated; 0.26 has no other module that takes the same arguments
SCALE_OUT_FLAG_SINCE = Version("0.32")  # 0.26 has no such flag and always serves GENERATE
ROUNDS_ON_CPU_SINCE = Version("0.32")  # 0.26 has no kernel there that rounds weights to FP8
FINAL_ONLY = 2  # vllm.sampling_params.RequestOutputKind.FINAL_ONLY

# Paths and queries of requests; all but GENERATE need VLLM_SERVER_DEV_MODE=1.
GENERATE = "/inference/v1/generate"
CALL_WORKERS = "/collective_rpc"
PAUSE, RESUME = "/pause?mode=wait", "/resume"
INIT_TRANSFER = "/init_weight_transfer_engine"
START_UPDATE, UPDATE, FINISH_UPDATE = "/start_weight_update", "/update_weights", "/finish_weight_update"
RESET_PREFIX_CACHE = "/reset_prefix_cache"

Tensors = Iterable[tuple[str, torch.Tensor]]


def version_arguments(vllm_version: str) -> list[str]:
    """What an API server of that version must be told beside what all versions understand."""
    return ["--enable-scale-out"] if _release(vllm_version) >= SCALE_OUT_FLAG_SINCE else []


def rounds_on_cpu(vllm_version: str) -> bool:
    """Whether vLLM of that version rounds the weights of linear layers to FP8 on a CPU."""
    return _release(vllm_version) >= ROUNDS_ON_CPU_SINCE


def _release(vllm_version: str) -> Version:
    return Version(Version(vllm_version).base_version)


def sampling_fields(request: SampleRequest, sampling: Sampling) -> dict[str, Any]:
    """vLLM's sampling parameters of one request, every one that shapes the distribution explicit."""
    return {
        "n": request.n,
        "seed": request.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": sampling.max_tokens,
        "min_tokens": 0,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,  # the stop ids alone end a response, not what the model's config calls its end
        "detokenize": False,
        "logprobs": 0,  # of the sampled id only
        "flat_logprobs": True,  # plain lists instead of a dict and an object a token: 5 % of a small model's CPU time
    }


def generate_body(request: SampleRequest, sampling: Sampling) -> dict[str, Any]:
    """The body of a GENERATE request: token ids in, token ids out, so that nothing is tokenised twice."""
    # without FINAL_ONLY 0.26 answers with one of the n responses (token_in_token_out/serving.py); 0.32 sets it itself
    return {"token_ids": list(request.prompt_ids), "sampling_params": sampling_fields(request, sampling) | {"output_kind": FINAL_ONLY}}


def read_completions(answer: Mapping[str, Any], n: int) -> list[Completion]:
    """The answer to GENERATE, in the order of the seeds. Raises RuntimeError where it does not hold `n` finished responses."""
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    if len(choices) != n:
        raise RuntimeError(f"vLLM returned {len(choices)} responses, not {n}")
    return [read_completion(c["token_ids"], [t["logprob"] for t in c["logprobs"]["content"]], c["finish_reason"]) for c in choices]


def read_completion(token_ids: Sequence[int], logprobs: Sequence[float], finish_reason: str) -> Completion:
    """Raises RuntimeError where the response did not end, or a token has no log-prob."""
    if finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with {finish_reason!r}, not with stop or length")
    if len(logprobs) != len(token_ids):
        raise RuntimeError(f"vLLM returned {len(logprobs)} log-probs for {len(token_ids)} tokens")
    return Completion(np.asarray(token_ids, dtype=np.int32), np.asarray(logprobs, dtype=np.float32), finish_reason)


@dataclass
class FilePlace:
    """What our CPU transport sends as init_info (empty) and update_info: the safetensors file with the next tensors."""

    path: str = ""


def register_file_transport(name: str, read: Callable[[str], Tensors]) -> None:
    """Makes vLLM know a weight transfer backend that loads what `read` yields of each file it is told of. For a server's workers."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    class FileTransferEngine(WeightTransferEngine[FilePlace, FilePlace]):
        init_info_cls, update_info_cls = FilePlace, FilePlace

        def init_transfer_engine(self, init_info: FilePlace) -> None:
            """Each file stands for itself: there is no connection to make."""

        # 0.32 sets the current config around these calls (gpu_worker.py), 0.26 does not
        def start_weight_update(self) -> None:
            with set_current_vllm_config(self.vllm_config):
                initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            """The base class's waits for an accelerator afterwards, and raises without one."""
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: FilePlace) -> None:
            with set_current_vllm_config(self.vllm_config):
                self.model.load_weights(read(update_info.path))

        def finish_weight_update(self) -> None:
            with set_current_vllm_config(self.vllm_config):
                finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            """Holds nothing."""

        @staticmethod
        def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
            """Abstract in 0.26, gone in 0.32; our trainer sends by itself (weight_transport.py)."""
            raise NotImplementedError

    WeightTransferEngineFactory.register_engine(name, FileTransferEngine)


def nccl_init_info(address: str, port: int, *, first_rank: int, world_size: int) -> dict[str, Any]:
    """INIT_TRANSFER's init_info of one server for vLLM's own NCCL backend: its workers are ranks `first_rank` onwards."""
    return {"master_address": address, "master_port": port, "rank_offset": first_rank, "world_size": world_size}


def nccl_update_info(tensors: Sequence[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """UPDATE's update_info for vLLM's NCCL backend: the tensors follow as one broadcast each.

    Packed broadcasts are off by default in both versions, which set them in different places (0.26 here, 0.32 in init_info).
    """
    return {
        "names": [name for name, _ in tensors],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }


def join_nccl_group(address: str, port: int, world_size: int) -> Any:
    """The trainer's end, as rank 0: a PyNcclCommunicator. Returns once all workers have joined."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    return trainer_init({"master_address": address, "master_port": port, "world_size": world_size})
