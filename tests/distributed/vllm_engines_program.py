"""Under torchrun: rollouts over one engine for each `tensor_parallel` given, in turn; rank 0 writes what was seen as JSON.

Usage: torchrun ... program OUT_DIR TENSOR_PARALLEL [TENSOR_PARALLEL ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from megatron_nsr.rollout.engine import Sampling
from megatron_nsr.rollout.rollouts import Rollouts
from megatron_nsr.rollout.vllm_engine import VllmEngine
from megatron_nsr.types import Prompt, Trajectory, UserError
from tests.checksums import whole_checksums

VOCABULARY = 160
SAMPLING = Sampling(temperature=1.0, max_tokens=10, stop_ids=(3, 4, 5, 6, 7))
PROMPTS = [Prompt(id=f"p{i}", text="", token_ids=tuple(range(10 + i, 20 + 2 * i)), answer="") for i in range(5)]


def random_model(seed: int, **fields: Any) -> PreTrainedModel:
    """An untied Qwen2: fused weights with biases, and a KV head for each of two ranks."""
    config = Qwen2Config(**{
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "initializer_range": 0.25,
        "architectures": ["Qwen2ForCausalLM"],
    } | fields)  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, weight.detach()) for name, weight in model.named_parameters())


def largest_gap(model: PreTrainedModel, trajectories: Sequence[Trajectory]) -> float:
    gaps = []
    for trajectory in trajectories:
        ids = torch.tensor([*trajectory.prompt_ids, *trajectory.response_ids.tolist()])
        start = len(trajectory.prompt_ids)
        with torch.no_grad():
            logprobs = model(ids[None, :-1]).logits[0, start - 1 :].log_softmax(-1)
        gaps.append(float((logprobs.gather(1, ids[start:, None])[:, 0] - torch.from_numpy(trajectory.rollout_logprobs)).abs().max()))
    return max(gaps)


def plain(trajectories: Sequence[Trajectory]) -> list[Any]:
    return [[t.prompt, t.sample, t.response_ids.tolist(), t.finish_reason, t.weight_version, t.text] for t in trajectories]


def case(model_dir: Path, tensor_parallel: int) -> dict[str, Any]:
    """Two pushes and their rollouts; then the process group must still work."""
    decoded: list[Sequence[int]] = []

    def decode(ids: Sequence[int]) -> str:
        decoded.append(ids)
        return " ".join(map(str, ids))

    rank, world = dist.get_rank(), dist.get_world_size()
    engine = VllmEngine(
        model_dir, dtype="float32", max_model_len=64, max_num_seqs=16, kv_cache_mib=16, tensor_parallel=tensor_parallel
    )  # fmt: skip
    with Rollouts(engine, decode, run_seed=1, rank=rank, world_size=world, engine_ranks=tensor_parallel) as rollouts:
        gaps = []
        for version in (1, 2):
            model = random_model(version)
            rollouts.push(weights(model), version, partial(whole_checksums, list(weights(model))))
            trajectories = rollouts.generate(PROMPTS, step=version, samples=3, sampling=SAMPLING, purpose="train")
            gaps.append(largest_gap(model, trajectories))
        one = rollouts.generate(PROMPTS[:1], step=1, samples=1, sampling=SAMPLING, purpose="eval")
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "cpushm" in line]
    calls = torch.tensor(float(len(decoded)))
    dist.all_reduce(calls)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, plain(trajectories))
    return {
        "gaps": gaps,
        "trajectories": everyone[0],
        "same_on_every_rank": all(other == everyone[0] for other in everyone),
        "decoded": int(calls),
        "one": len(one),
        "shared_memory": mapped,
        "has_shared_memory": hasattr(torch.ops._C, "init_shm_manager"),
    }


def verified(out: Path) -> dict[str, Any]:
    """A bf16 engine over two ranks that share one KV head, its vocabulary padded, fed with fp32 weights; then with a spoiled tensor."""
    model = random_model(3, num_key_value_heads=1, vocab_size=100)
    if dist.get_rank() == 0:
        model.config.save_pretrained(out / "one_head")
    dist.barrier()
    engine = VllmEngine(out / "one_head", dtype="bfloat16", max_model_len=64, max_num_seqs=16, kv_cache_mib=16, tensor_parallel=2)
    checksums = partial(whole_checksums, list(weights(model)))
    logits = engine._llm.apply_model(_logits_dtype)[0]
    messages: dict[str, Any] = {}
    with Rollouts(
        engine, str, run_seed=1, rank=dist.get_rank(), world_size=2, engine_ranks=2, verify_push="always"
    ) as rollouts:  # fmt: skip
        messages["bytes"] = [rollouts.push(weights(model), version, checksums)["rollout/push_bytes"] for version in (1, 2)]
        for name in SPOILED:
            spoiled = [(other, last_element_doubled(weight) if other == name else weight) for other, weight in weights(model)]
            try:
                rollouts.push(iter(spoiled), 3, checksums)
            except RuntimeError as error:
                messages[name] = str(error)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, messages)
    return {"messages": everyone, "logits": logits, "model_bytes": sum(weight.nbytes for _, weight in weights(model))}


def _logits_dtype(model: torch.nn.Module) -> str:
    return str(model.compute_logits(torch.ones(1, 64, dtype=torch.bfloat16)).dtype)


def last_element_doubled(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.clone()
    weight.view(-1)[-1] *= 2
    return weight


SPOILED = ("model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight")


def main(out: Path, sizes: list[int]) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        random_model(1).config.save_pretrained(out / "model")
    dist.barrier()
    seen: dict[str, Any] = {str(size): case(out / "model", size) for size in sizes}
    seen["verified"] = verified(out)
    try:
        VllmEngine(out / "model", dtype="float32", max_model_len=64, tensor_parallel=3)
    except UserError as error:
        seen["three"] = str(error)
    if dist.get_rank() == 0:
        (out / "seen.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
