"""vLLM in this process as a rollout engine: one a rank, or one over consecutive ranks (external launcher).

May import: types, models, this package, torch, transformers and, in functions only (its import takes seconds), vllm.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist

from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.rollout.engine import Completion, Region, SampleRequest, Sampling
from megatron_nsr.rollout.held_weights import HeldPart, held_checksums, held_parts
from megatron_nsr.rollout.pushed_weights import PushedWeights, checkpoint_names
from megatron_nsr.rollout.vllm_api import read_completion, sampling_fields
from megatron_nsr.rollout.vllm_environment import caller_state_kept, default_process_group_kept, prepare_environment, private_shared_memory
from megatron_nsr.rollout.vllm_experts import repack_at_next_reload
from megatron_nsr.rollout.vllm_options import check_head_size, config_overrides, cpu_options
from megatron_nsr.types import UserError


def check_tensor_parallel(tensor_parallel: int, *, world_size: int, attention_heads: int | None) -> None:
    """Raises UserError unless groups of `tensor_parallel` ranks fill the world and divide the heads, where those are known."""
    if world_size % tensor_parallel:
        raise UserError(f"rollout.tensor_parallel={tensor_parallel} does not divide the number of processes, {world_size}")
    if attention_heads is not None and attention_heads % tensor_parallel:
        raise UserError(f"rollout.tensor_parallel={tensor_parallel} does not divide num_attention_heads={attention_heads}")


class VllmEngine:
    """A RolloutEngine over vLLM.

    Under torchrun every rank makes one, at the same time, after torch.distributed is initialised; ranks
    [k * tensor_parallel, (k + 1) * tensor_parallel) host engine k. One engine a process at a time. `model_dir` needs only a
    config.json: the weights come with the first push. `kv_cache_mib` None sizes the cache from `gpu_memory_utilization`
    (on CPU: of the machine's memory). `quantization`: vLLM's name of what it rounds pushed weights to. On CPU the engine is always eager
    and never sleeps.

    Raises UserError where `tensor_parallel` does not fit, or vLLM has no attention for the model on a CPU.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int = 256,
        kv_cache_mib: int | None = None,
        gpu_memory_utilization: float = 0.5,
        enforce_eager: bool = False,
        can_sleep: bool = False,
        tensor_parallel: int = 1,
        quantization: str | None = None,
    ) -> None:
        from transformers import AutoConfig

        self._on_cpu = on_cpu = not torch.cuda.is_available()
        config = AutoConfig.from_pretrained(model_dir)
        self._distributed = dist.is_initialized()
        world_size = dist.get_world_size() if self._distributed else 1
        check_tensor_parallel(tensor_parallel, world_size=world_size, attention_heads=config.num_attention_heads)
        prepare_environment(on_cpu=on_cpu, in_process=True)
        from vllm import LLM

        if on_cpu:
            check_head_size(read_model_shape(str(model_dir)).head_dim)
        # vLLM's CPU backend repacks the head's weight; a reload renews the embedding but not the packed copy of a tied head
        # (vllm/model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm, 0.32.0): there the head is a tensor of its own
        self._copy_embedding = on_cpu and bool(config.tie_word_embeddings)
        options: dict[str, Any] = {
            "hf_overrides": config_overrides(untie=self._copy_embedding),
            "kv_cache_memory_bytes": kv_cache_mib * 2**20 if kv_cache_mib else None,
            "distributed_executor_backend": "external_launcher" if world_size > 1 else None,
            **(cpu_options(max_model_len) if on_cpu else {"enforce_eager": enforce_eager}),
        }
        gc.freeze()  # vLLM collects garbage seven times while it starts; looking through all that is imported takes 0.3 s each time
        with caller_state_kept(), private_shared_memory() if on_cpu and tensor_parallel > 1 else nullcontext():
            self._llm: Any = LLM(
                str(model_dir),
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                gpu_memory_utilization=gpu_memory_utilization,
                enable_sleep_mode=can_sleep,
                tensor_parallel_size=tensor_parallel,
                quantization=quantization,
                load_format="dummy",  # the first push brings the weights
                skip_tokenizer_init=True,  # ids in, ids out
                generation_config="vllm",  # ignores the model's own sampling defaults
                logprobs_mode="processed_logprobs",  # of the tempered distribution; measured as cheap as the raw ones
                seed=0,  # never drawn from: every request has its own
                **options,
            )
        self._max_model_len = max_model_len
        self._vocabulary = int(config.vocab_size)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._expected = self._llm.apply_model(_checkpoint_names)[0]
        self._parts: dict[str, HeldPart] = self._llm.apply_model(_held_parts)[0]
        self._version: int | None = None

    @property
    def version(self) -> int | None:
        """The version of the weights it samples from; None before the first push and after a failed one."""
        return self._version

    @property
    def holders(self) -> Sequence[str]:
        """This process; see RolloutEngine."""
        return [] if self._version is None else ["in process"]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self._dtype

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Completion]:
        """Samples; see RolloutEngine. A response also ends, as "length", where prompt and response fill max_model_len.

        Raises RuntimeError before the first push, ValueError for a prompt that leaves no room for a response.
        """
        if self._version is None:
            raise RuntimeError("the rollout engine has no weights yet: push them before generating")
        for request in requests:
            if not 0 < len(request.prompt_ids) < self._max_model_len:
                raise ValueError(f"a prompt of {len(request.prompt_ids)} tokens: 1 to {self._max_model_len - 1} fit max_model_len")
        if not requests:
            return []
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        parameters = [vllm_sampling_params(request, sampling) for request in requests]
        with caller_state_kept():
            outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [_completion(output) for request_output in outputs for output in request_output.outputs]

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> int:
        """Replaces every weight; see RolloutEngine."""
        self._version = None
        pushed = PushedWeights(tensors, self._expected, vocabulary=self._vocabulary, copy_embedding=self._copy_embedding)
        try:
            if self._on_cpu:
                self._llm.apply_model(repack_at_next_reload)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(pushed)})
        finally:
            pushed.drain()
        pushed.check()
        # cached keys and values were computed with the old weights
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")
        self._version = version
        return pushed.bytes

    def sleep(self, level: int) -> None:
        """See SleepingEngine; for an engine that was made with `can_sleep`."""
        self._llm.sleep(level=level)
        if level == 2:
            self._version = None

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """See SleepingEngine."""
        self._llm.wake_up(tags=[part])

    def held_checksums(self) -> list[dict[Region, int]]:
        """See RolloutEngine."""
        held: dict[Region, int] = self._llm.apply_model(partial(held_checksums, parts=self._parts, dtype=self._dtype))[0]
        return [held]

    def close(self) -> None:
        """Frees the engine; a second call does nothing. A process group that existed before the engine stays usable."""
        llm, self._llm, self._version = self._llm, None, None
        if llm is not None:
            with default_process_group_kept() if self._distributed else nullcontext():
                llm.llm_engine.engine_core.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def vllm_sampling_params(request: SampleRequest, sampling: Sampling) -> Any:
    """vLLM's SamplingParams of one request."""
    from vllm import SamplingParams

    return SamplingParams(**sampling_fields(request, sampling))


def _checkpoint_names(model: torch.nn.Module) -> frozenset[str]:
    return checkpoint_names(dict(model.named_parameters()), _packed(model))


def _held_parts(model: torch.nn.Module) -> dict[str, HeldPart]:
    return held_parts(model, _packed(model))


def _packed(model: torch.nn.Module) -> dict[str, list[str]]:
    return getattr(model, "packed_modules_mapping", {})


def _completion(output: Any) -> Completion:
    return read_completion(output.token_ids, output.logprobs.logprobs, output.finish_reason)
