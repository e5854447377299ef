"""Cases for several ranks: PPO's steps on recorded trajectories, critic and policy, over layouts of four, and checkpoints in between."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.platform import distributed
from megatron_nsr.training.actor import Actor
from megatron_nsr.training.checkpoints import Checkpoints
from megatron_nsr.training.critic import Critic, joined
from megatron_nsr.training.setup import build_actor, build_critic
from megatron_nsr.weights.gathering import gather_hf_tensors
from tests.distributed import training_cases
from tests.distributed.training_cases import PROMPTS, make_folder, recorded_step, updated_weights

LAYOUTS = training_cases.LAYOUTS | {"tp2_sp_dp2_ep2": {"tensor": 2, "sequence": True, "expert": 2}}
# layout/model on four ranks: those that a layout leaves over are data-parallel. The last ones also write a checkpoint.
TRAINED = [
    "tp2/tied",
    "pp2/untied",
    "dp2_distributed/tied",
    "tp2_sp_dp2_distributed_recompute/tied",
    "tp2_sp_dp2_ep2/experts",
    "tp2_sp_cp2/untied",
    "cp2_pp2/tied",
]
SAVED = ["tp2_pp2/tied", "tp2_sp_dp2/untied", "pp2_vpp2_dp2_distributed/tied"]
CASES = [*TRAINED, *SAVED]
# (case that wrote a checkpoint, layout that continues it) on four ranks, and on one.
MOVES = [("tp2_pp2/tied", "tp2_sp_dp2_distributed_recompute"), ("pp2_vpp2_dp2_distributed/tied", "tp2_pp2")]
MOVES_TO_ONE = [("tp2_sp_dp2/untied", "one"), ("pp2_vpp2_dp2_distributed/tied", "one")]
BF16 = ["tp2_sp_dp2_distributed_recompute/tied"]
CRITIC_RATE, POLICY_RATE = 1e-2, 1e-3


def config_of(model: Path, fields: dict[str, Any], dtype: str) -> Config:
    """Learning rate and clip range are such that some values leave the range in the second mini-batch.

    With Adam's usual eps a single weight whose gradient happens to be next to nothing would follow its rounding.
    """
    fields = dict(fields)
    recompute = fields.pop("recompute", "none")
    return parse_config(
        {
            "run": {"dir": "unused", "steps": 3},
            "model": {"path": str(model), "dtype": dtype},
            "data": {"template": "plain", "prompts_per_step": PROMPTS},
            "objective": {"name": "ppo", "mini_batch_prompts": 2},
            "critic": {"gamma": 0.95, "lambda": 0.9, "value_clip": 0.05},
            "optimizer": {"weight_decay": 0.1, "eps": 1e-6},
            "parallel": fields,
            "training": {"tokens_per_micro_batch": 60, "head_chunk_tokens": 16, "recompute": recompute},
        }
    )


def new_models(config: Config, shape: ModelShape) -> tuple[Actor, Critic]:
    gc.collect()  # earlier models' process groups keep their threads until they go
    backend = choose_backend("cpu")
    actor = build_actor(config, shape, backend)
    return actor, build_critic(config, shape, backend, actor.chunks)


def train(actor: Actor, critic: Critic, config: Config, vocab: int, step: int) -> dict[str, float]:
    """A step of two mini-batches of the policy and four of the critic, so that values clip."""
    batch = recorded_step(vocab, step, 2, "ppo", critic_mini_batch_prompts=1)
    prepared = actor.prepare(batch, step)
    judged = critic.judge(prepared.mini_batches)
    metrics = critic.update(judged, CRITIC_RATE)
    return metrics | actor.update(replace(prepared, mini_batches=joined(judged, batch.shares)), POLICY_RATE)


def critic_weights(critic: Critic, shape: ModelShape) -> dict[str, torch.Tensor]:
    """The trunk under Hugging Face names, and the value head, which all ranks of the last stage must hold alike."""
    weights = {name: tensor.clone() for name, tensor in gather_hf_tensors(critic.chunks, replace(shape, tie_embeddings=True), 1 << 16)}
    mine = critic.chunks[-1].output_layer.weight.detach().clone() if critic.groups.last_stage else None
    first, *others = [head for head in distributed.all_gather_object(mine) if head is not None]
    assert all(torch.equal(first, head) for head in others)
    return weights | {"value_head": first}


def save_weights(path: Path, actor: Actor, critic: Critic, shape: ModelShape) -> None:
    both = critic_weights(critic, shape) | {f"policy.{name}": tensor for name, tensor in updated_weights(actor, shape).items()}
    if distributed.rank() == 0:
        torch.save(both, path)


def two_steps(config: Config, shape: ModelShape, folder: Path) -> tuple[list[dict[str, float]], Actor, Critic]:
    """Metrics of both; `folder` gets the weights after them."""
    make_folder(folder)
    actor, critic = new_models(config, shape)
    metrics = [train(actor, critic, config, shape.vocab_size, step) for step in (1, 2)]
    save_weights(folder / "weights.pt", actor, critic, shape)
    return metrics, actor, critic


def run_layout(model: Path, fields: dict[str, Any], folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Two steps, a checkpoint, and the third step both undisturbed and by new models; `folder` gets the weights after each."""
    config, shape = config_of(model, fields, dtype), read_model_shape(str(model))
    metrics, actor, critic = two_steps(config, shape, folder)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(2, {}, actor.wrapped, actor.optimizer, actor.backend, model, critic=critic)
    third = train(actor, critic, config, shape.vocab_size, 3)
    save_weights(folder / "third.pt", actor, critic, shape)
    del actor, critic
    return {"metrics": metrics, "third": third, "resumed": resume(model, fields, folder, folder / "resumed.pt", dtype)}


def resume(model: Path, fields: dict[str, Any], folder: Path, weights: Path, dtype: str = "float32") -> dict[str, float]:
    """Step 3 from the checkpoint in `folder`; the weights after it go to the file `weights`."""
    config, shape = config_of(model, fields, dtype), read_model_shape(str(model))
    actor, critic = new_models(config, shape)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    latest = checkpoints.latest()
    assert latest is not None
    checkpoints.load(latest, actor.wrapped, actor.optimizer, actor.backend, critic)
    metrics = train(actor, critic, config, shape.vocab_size, 3)
    save_weights(weights, actor, critic, shape)
    return metrics


def find(models: Path, out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in TRAINED:
        layout, model = case.split("/")
        config, shape = config_of(models / model, LAYOUTS[layout], "float32"), read_model_shape(str(models / model))
        found[case] = {"metrics": two_steps(config, shape, out / case)[0]}
    for case in SAVED:
        layout, model = case.split("/")
        found[case] = run_layout(models / model, LAYOUTS[layout], out / case)
    for case in BF16:
        layout, model = case.split("/")
        found[f"bf16/{case}"] = run_layout(models / model, LAYOUTS[layout], out / "bf16" / case, "bfloat16")
    for case, layout in MOVES:
        found[f"{case}-{layout}"] = resume(models / case.split("/")[1], LAYOUTS[layout], out / case, out / case / f"at_{layout}.pt")
    return found
