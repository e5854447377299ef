"""Tokens per CPU second of rollouts through the project against bare vLLM: same engine, prompts, seeds and sampling parameters.

Usage: OMP_NUM_THREADS=1 python tools/benchmarks/rollout.py [--rounds N] [--out FILE]; may import megatron_nsr.rollout and transformers.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from megatron_nsr.rollout.engine import SampleRequest, Sampling
from megatron_nsr.rollout.rollouts import Rollouts
from megatron_nsr.rollout.seeds import sample_seed
from megatron_nsr.rollout.vllm_engine import VllmEngine, vllm_sampling_params
from megatron_nsr.types import Prompt

VOCABULARY, STOP, PROMPTS, SAMPLES, RUN_SEED = 160, 2, 32, 8, 1
SAMPLING = Sampling(temperature=1.0, max_tokens=40, stop_ids=(STOP,))


def cpu_seconds() -> float:
    """User and system time of this process; the engine runs in it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def random_model() -> Any:
    """The size of the quickstart's model, with random weights."""
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=64, rope_theta=10000.0, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def random_prompts() -> list[Prompt]:
    draw = random.Random(0)
    return [
        Prompt(id=f"p{i}", text="", token_ids=tuple(draw.randrange(3, VOCABULARY) for _ in range(16)), answer="") for i in range(PROMPTS)
    ]


def decode(ids: Sequence[int]) -> str:
    """A stand-in for a tokenizer, whose own cost is not the rollouts'."""
    return " ".join(map(str, ids))


def bare(llm: Any, prompts: Sequence[Prompt], step: int) -> list[list[int]]:
    """vLLM alone: parameters, generate, token ids out."""
    parameters = [
        vllm_sampling_params(SampleRequest(p.token_ids, sample_seed(RUN_SEED, step, p.id, 0), SAMPLES), SAMPLING) for p in prompts
    ]
    outputs = llm.generate([{"prompt_token_ids": list(p.token_ids)} for p in prompts], parameters, use_tqdm=False)
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


def through_project(rollouts: Rollouts, prompts: Sequence[Prompt], step: int) -> list[list[int]]:
    got = rollouts.generate(prompts, step=step, samples=SAMPLES, sampling=SAMPLING, purpose="train")
    return [trajectory.response_ids.tolist() for trajectory in got]


def tokens_per_cpu_second(run: Callable[[int], list[list[int]]], step: int) -> tuple[float, list[list[int]]]:
    start = cpu_seconds()
    ids = run(step)
    return sum(map(len, ids)) / (cpu_seconds() - start), ids


def measure(rounds: int) -> dict[str, Any]:
    """Both ways in turn, each round in the other order, after one round that is not counted."""
    model, prompts = random_model(), random_prompts()
    rates: dict[str, list[float]] = {"bare_vllm": [], "project": []}
    with tempfile.TemporaryDirectory() as directory:
        model.config.save_pretrained(directory)
        engine = VllmEngine(directory, dtype="float32", max_model_len=64, max_num_seqs=PROMPTS * SAMPLES, kv_cache_mib=64)
        with Rollouts(engine, decode, run_seed=RUN_SEED, verify_push="never") as rollouts:
            rollouts.push(((name, weight.detach()) for name, weight in model.named_parameters()), 1, lambda _: {})
            ways = {
                "bare_vllm": lambda step: bare(engine._llm, prompts, step),
                "project": lambda step: through_project(rollouts, prompts, step),
            }
            for step in range(rounds + 1):
                seen = {}
                for name in sorted(ways, reverse=bool(step % 2)):
                    rate, seen[name] = tokens_per_cpu_second(ways[name], step)
                    if step:
                        rates[name].append(rate)
                if seen["bare_vllm"] != seen["project"]:
                    raise RuntimeError(f"round {step}: the two ways sampled different tokens")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "prompts": PROMPTS,
        "samples": SAMPLES,
        "rounds": rounds,
        "tokens_per_cpu_second": {name: round(value) for name, value in medians.items()},
        "spread": {name: [round(min(values)), round(max(values))] for name, values in rates.items()},
        "ratio": round(medians["project"] / medians["bare_vllm"], 4),
        "goal": 0.9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.rounds), indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
