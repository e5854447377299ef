"""Program for torchrun: updates on recorded trajectories, and a checkpoint in between, over the layouts of one world size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_nsr.config import Config, parse_config
from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.hf_config import read_model_shape
from megatron_nsr.objectives.mini_batches import StepBatch, build_step_batch
from megatron_nsr.objectives.registry import build_objective
from megatron_nsr.platform import distributed
from megatron_nsr.training.actor import Actor
from megatron_nsr.training.checkpoints import Checkpoints
from megatron_nsr.training.setup import build_actor
from megatron_nsr.types import Outcome, Reason, Trajectory, UserError, Verdict
from megatron_nsr.weights.gathering import gather_hf_tensors

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "one": {},
        "one_recompute": {"recompute": "full"},
        "one_selective": {"recompute": "selective"},
        "one_small_micro_batches": {"tokens_per_micro_batch": 24},
    },
    2: {
        "dp2": {},
        "dp2_distributed_optimizer": {"distributed_optimizer": True},
        "tp2": {"tensor": 2},
        "tp2_sp": {"tensor": 2, "sequence": True},
        "pp2": {"pipeline": 2},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    },
    4: {
        "tp2_pp2": {"tensor": 2, "pipeline": 2},
        "tp2_sp_dp2": {"tensor": 2, "sequence": True},
        "tp2_sp_dp2_recompute_distributed_optimizer": {
            "tensor": 2,
            "sequence": True,
            "recompute": "full",
            "distributed_optimizer": True,
        },
        "pp2_vpp2_dp2": {"pipeline": 2, "virtual_pipeline": 2},
    },
}
PROMPTS, SAMPLES = 4, 3
VERDICTS = (Verdict(Outcome.CORRECT, Reason.MATCH), Verdict(Outcome.WRONG, Reason.MISMATCH), Verdict(Outcome.NONE, Reason.TIMEOUT))


def config_of(model: Path, fields: dict[str, Any], dtype: str = "float32") -> Config:
    """Learning rate and clip range are such that some ratios leave the range in the second mini-batch."""
    training = {name: fields.pop(name) for name in ("recompute", "tokens_per_micro_batch") if name in fields}
    return parse_config(
        {
            "run": {"dir": "unused", "steps": 3},
            "model": {"path": str(model), "dtype": dtype},
            "data": {"template": "plain", "prompts_per_step": PROMPTS},
            "objective": {
                "name": "reinforce",
                "mini_batch_prompts": 2,
                "eps_low": 0.01,
                "eps_high": 0.01,
                "entropy_coefficient": 0.01,
                "rollout_correction": 1.5,
            },
            "logging": {"sign_norms_every": 1, "probe_every": 2},
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1, "gradient_clip": 1.0},
            "parallel": fields,
            "training": {"tokens_per_micro_batch": 60, "head_chunk_tokens": 16} | training,
        }
    )


def recorded_step(config: Config, vocab: int, seed: int, mini_batch_prompts: int) -> StepBatch:
    """A step's trajectories, the same wherever it is called: lengths differ, and so do verdicts."""
    draw = np.random.default_rng(seed)
    trajectories, verdicts = [], []
    for index in range(PROMPTS * SAMPLES):
        ids = draw.integers(0, vocab, draw.integers(2, 18)).astype(np.int32)
        logprobs = -draw.random(len(ids)).astype(np.float32)
        prompt = tuple(int(i) for i in draw.integers(0, vocab, 3 + index // SAMPLES))
        trajectories.append(Trajectory(index // SAMPLES, index % SAMPLES, prompt, ids, logprobs, "stop", 0))
        verdicts.append(VERDICTS[int(draw.integers(0, 5)) % 3])
    return build_step_batch(
        trajectories,
        verdicts,
        build_objective("reinforce", lambda_=0.1, entropy_coefficient=config.objective.entropy_coefficient),
        samples_per_prompt=SAMPLES,
        mini_batch_prompts=mini_batch_prompts,
        aggregation="sequence_mean",
        normalization="batch",
    )


def train(actor: Actor, config: Config, vocab: int, step: int) -> dict[str, float]:
    """Step 1 has two mini-batches, so old log-probs and clipping matter; the others are on-policy."""
    batch = recorded_step(config, vocab, seed=step, mini_batch_prompts=2 if step == 1 else PROMPTS)
    return actor.update(actor.prepare(batch, step), config.optimizer.learning_rate)


def run_layout(model: Path, fields: dict[str, Any], folder: Path, dtype: str = "float32") -> dict[str, Any]:
    config, shape, backend = config_of(model, dict(fields), dtype), read_model_shape(str(model)), choose_backend("cpu")
    actor = build_actor(config, shape, backend)
    metrics = [train(actor, config, shape.vocab_size, step) for step in (1, 2)]
    weights = {name: tensor.clone() for name, tensor in gather_hf_tensors(actor.chunks, shape, 1 << 16)}
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(2, {"weight_version": 2}, actor.wrapped, actor.optimizer, backend, model)
    third = train(actor, config, shape.vocab_size, 3)
    if distributed.rank() == 0:
        torch.save(weights, folder / "weights.pt")
    return {"metrics": metrics, "third": third, "resumed": resume(model, fields, folder / "checkpoints", dtype)}


def resume(model: Path, fields: dict[str, Any], directory: Path, dtype: str = "float32") -> dict[str, float]:
    """Step 3 of a new actor that starts from the checkpoint written after step 2."""
    config, shape, backend = config_of(model, dict(fields), dtype), read_model_shape(str(model)), choose_backend("cpu")
    actor = build_actor(config, shape, backend)
    checkpoints = Checkpoints(directory, keep=1)
    latest = checkpoints.latest()
    assert latest is not None
    saved = checkpoints.load(latest, actor.wrapped, actor.optimizer, backend)
    assert (saved["step"], saved["weight_version"]) == (2, 2)
    return train(actor, config, shape.vocab_size, 3)


def resume_or_refuse(model: Path, fields: dict[str, Any], directory: Path) -> dict[str, float] | str:
    try:
        return resume(model, fields, directory)
    except UserError as error:
        return str(error)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", help="a layout of another world size whose checkpoint every layout here loads")
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    distributed.init_process_group()
    found = {}
    for layout, fields in LAYOUTS[distributed.world_size()].items():
        for model in ("tied", "untied"):
            folder = arguments.out / layout / model
            if distributed.rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
            distributed.barrier()
            found[f"{layout}/{model}"] = run_layout(arguments.models / model, fields, folder)
        if arguments.resume:
            source = arguments.out / arguments.resume / "tied" / "checkpoints"
            found[f"{layout}/tied"]["resharded"] = resume_or_refuse(arguments.models / "tied", fields, source)
    if distributed.world_size() == 2:
        folder = arguments.out / "bf16"
        found["bf16"] = run_layout(arguments.models / "untied", {"tensor": 2}, folder, dtype="bfloat16")
    if distributed.rank() == 0:
        arguments.results.write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy()


if __name__ == "__main__":
    main()
