"""Cases for two ranks: what a 50-million-parameter model holds while it trains, by part, at each layout, and what the planner says."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.objectives.mini_batches import StepBatch, build_step_batch
from megatron_nsr.objectives.registry import build_objective
from megatron_nsr.planning.hardware import find_gpu
from megatron_nsr.planning.layout import layout_of
from megatron_nsr.planning.memory import plan_stage
from megatron_nsr.planning.workload import lengths_of, workload_of
from megatron_nsr.platform import distributed
from megatron_nsr.training.actor import Actor
from megatron_nsr.training.setup import build_actor
from megatron_nsr.types import Outcome, Reason, Trajectory, Verdict
from tests.distributed.memory_tracker import LiveBytes, storage_bytes

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "tp2_mlp_recomputed": {"tensor": 2, "recompute": "selective", "transformer": {"recompute_modules": ["mlp"]}},
    "dp2_distributed_bf16": {"distributed_optimizer": True, "dtype": "bfloat16"},
    "dp2_distributed_recompute": {"distributed_optimizer": True, "recompute": "full"},
}
PROMPT, RESPONSE, PROMPTS, SAMPLES = 32, 97, 2, 2  # 128 input tokens a sequence, all alike
BUDGET = 256


def config_of(model: Path, fields: dict[str, Any]) -> Config:
    fields = dict(fields)
    dtype, recompute, transformer = fields.pop("dtype", "float32"), fields.pop("recompute", "none"), fields.pop("transformer", {})
    return parse_config(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"path": str(model), "initialization": "random", "dtype": dtype, "transformer": transformer},
            "data": {"template": "plain", "prompts_per_step": PROMPTS, "max_prompt_tokens": PROMPT},
            "rollout": {"samples_per_prompt": SAMPLES, "max_response_tokens": RESPONSE},
            "objective": {"name": "reinforce", "mini_batch_prompts": PROMPTS},
            "parallel": fields,
            "training": {"tokens_per_micro_batch": BUDGET, "recompute": recompute, "head_chunk_tokens": 128},
            "logging": {"sign_norms_every": 0},
        }
    )


def step(vocab: int) -> StepBatch:
    draw = np.random.default_rng(1)
    verdicts = [Verdict(Outcome.CORRECT, Reason.MATCH), Verdict(Outcome.WRONG, Reason.MISMATCH)] * (PROMPTS * SAMPLES // 2)
    trajectories = [
        Trajectory(
            index // SAMPLES,
            index % SAMPLES,
            tuple(int(token) for token in draw.integers(0, vocab, PROMPT)),
            draw.integers(0, vocab, RESPONSE).astype(np.int32),
            -draw.random(RESPONSE).astype(np.float32),
            "length",
            0,
        )
        for index in range(PROMPTS * SAMPLES)
    ]
    return build_step_batch(
        trajectories,
        verdicts,
        build_objective("reinforce"),
        samples_per_prompt=SAMPLES,
        mini_batch_prompts=PROMPTS,
        aggregation="sequence_mean",
        normalization="batch",
    )


def measure(model: Path, fields: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Bytes of this rank by part, measured and planned."""
    config, shape = config_of(model, fields), read_model_shape(str(model))
    gc.collect()
    with LiveBytes() as tracker:
        actor = build_actor(config, shape, choose_backend("cpu"))
        batch = step(shape.vocab_size)
        prepared = actor.prepare(batch, 1)
        with actor.backend.phase():
            actor.optimizer.step()  # Adam makes its state in its first step
        gc.collect()
        tracker.restart()
        before = tracker.live
        actor.update(prepared, 1e-6)
        kept, peak = tracker.kept - before, tracker.peak
    measured = {**state_bytes(actor), "activations": kept, "peak": peak}
    return {"measured": measured, "planned": planned(config, shape)}


def state_bytes(actor: Actor) -> dict[str, float]:
    """Of weights, gradient buffers, and what the optimizer has beside the weights."""
    parameters = [parameter for chunk in actor.chunks for parameter in chunk.parameters()]
    buffers = [buffer for chunk in actor.wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    held = {parameter.untyped_storage()._cdata for parameter in parameters}
    states = [tensor for parts in main_states(actor.optimizer) for tensor in parts if isinstance(tensor, torch.Tensor)]
    beside = [tensor for tensor in states if tensor.untyped_storage()._cdata not in held]
    return {
        "weights": storage_bytes(parameters),
        "gradients": storage_bytes([buffer.grad_data for buffer in buffers]),
        "optimizer": storage_bytes(beside),
    }


def main_states(optimizer: Any) -> Iterator[list[Any]]:
    """Each main parameter with its moments, of every optimizer that megatron-core chains."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter, state in one.optimizer.state.items():
            yield [parameter, *state.values()]


def planned(config: Config, shape: ModelShape) -> dict[str, float]:
    """The planner's bytes for this rank, the process itself left out."""
    layout = layout_of(config, shape, distributed.world_size())
    workload = workload_of(config, lengths_of(config, prompt_mean=PROMPT, response_mean=RESPONSE - 1, response_spread=0.0))
    stage = distributed.rank() * layout.pipeline // distributed.world_size()
    parts = plan_stage(config, shape, layout, workload, find_gpu("cpu"), None, stage).parts
    update = {name: sizes[0] for name, sizes in parts.items() if name != "the process itself"}
    return {name: update[name] for name in ("weights", "gradients", "optimizer", "activations")} | {"peak": sum(update.values())}


def find(model: Path) -> dict[str, Any]:
    """By layout and rank."""
    found = {}
    for name, fields in LAYOUTS.items():
        found[name] = distributed.all_gather_object(measure(model, fields))
        gc.collect()
    return found
