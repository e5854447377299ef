"""Cases for several ranks: updates on recorded trajectories, and a checkpoint in between, over the layouts of one world size."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.own_objective import SequenceRatio
from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from megatron_nsr.models.backends import choose_backend
from megatron_nsr.models.hf_config import ModelShape, read_model_shape
from megatron_nsr.objectives.mini_batches import StepBatch, build_step_batch
from megatron_nsr.objectives.registry import build_objective
from megatron_nsr.platform import distributed
from megatron_nsr.training.actor import Actor
from megatron_nsr.training.checkpoints import Checkpoints
from megatron_nsr.training.offload import Offload
from megatron_nsr.training.setup import build_actor
from megatron_nsr.training.sign_probe import copied, main_gradients
from megatron_nsr.types import Outcome, Reason, Trajectory, Verdict
from megatron_nsr.weights.gathering import gather_hf_tensors
from tests.plain_entropy import random_responses

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "one_recompute": {"recompute": "full"},
    "one_selective": {"recompute": "selective"},
    "one_small_micro_batches": {"tokens_per_micro_batch": 24},
    "dp2": {},
    "dp2_distributed": {"distributed_optimizer": True},
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
    "tp2_sp_dp2": {"tensor": 2, "sequence": True},
    "tp2_sp_dp2_distributed_recompute": {"tensor": 2, "sequence": True, "distributed_optimizer": True, "recompute": "full"},
    "pp2_vpp2_dp2": {"pipeline": 2, "virtual_pipeline": 2},
    "pp2_vpp2_dp2_distributed": {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True},
    "cp4": {"context": 4},
    "tp2_sp_cp2": {"tensor": 2, "sequence": True, "context": 2},
    "cp2_pp2": {"context": 2, "pipeline": 2},
    "cp2_pp2_vpp2_selective": {"context": 2, "pipeline": 2, "virtual_pipeline": 2, "recompute": "selective"},
    "cp2_dp2_distributed_recompute": {"context": 2, "distributed_optimizer": True, "recompute": "full"},
}
# layout/model by world size: every kind of parallelism meets tied and untied embeddings.
CASES: dict[int, list[str]] = {
    1: ["one/tied", "one/untied", "one_recompute/tied", "one_selective/untied", "one_small_micro_batches/tied"],
    2: ["dp2/tied", "dp2_distributed/untied", "tp2/untied", "tp2_sp/tied", "pp2/untied", "pp2_vpp2/tied", "cp2/tied"],
    4: [
        "tp2_pp2/tied",
        "tp2_sp_dp2/untied",
        "tp2_sp_dp2_distributed_recompute/tied",
        "pp2_vpp2_dp2/untied",
        "pp2_vpp2_dp2_distributed/tied",
        "cp4/untied",
        "tp2_sp_cp2/untied",
        "cp2_pp2/tied",
        "cp2_pp2_vpp2_selective/untied",
        "cp2_dp2_distributed_recompute/tied",
    ],
}
# (case that wrote a checkpoint, layout that continues it), by world size. The worlds run in the order 4, 1, 2.
MOVES: dict[int, list[tuple[str, str]]] = {
    4: [
        ("pp2_vpp2_dp2_distributed/tied", "tp2_sp_dp2_distributed_recompute"),
        ("tp2_sp_dp2_distributed_recompute/tied", "pp2_vpp2_dp2"),
        ("tp2_pp2/tied", "pp2_vpp2_dp2_distributed"),
        ("tp2_pp2/tied", "cp2_dp2_distributed_recompute"),
    ],
    1: [("pp2_vpp2_dp2_distributed/tied", "one"), ("tp2_sp_dp2/untied", "one"), ("cp2_dp2_distributed_recompute/tied", "one")],
    2: [
        ("one/untied", "dp2_distributed"),
        ("one/tied", "tp2_sp"),
        ("pp2_vpp2_dp2_distributed/tied", "pp2"),
        ("pp2_vpp2_dp2/untied", "tp2"),
        ("tp2_sp_cp2/untied", "cp2"),
    ],
}
# (case that wrote a bf16 checkpoint, layout that reads and writes it again), on 4 ranks
DETOURS = [
    ("pp2_vpp2_dp2_distributed/tied", "tp2_sp_dp2"),
    ("tp2_pp2/untied", "pp2_vpp2_dp2_distributed"),
    ("cp2_dp2_distributed_recompute/tied", "tp2_sp_cp2"),
]
# By world size: where the gradients of PSR and NSR are compared with that of REINFORCE.
SIGNS: dict[int, str] = {1: "one/tied", 2: "dp2_distributed/untied", 4: "pp2_vpp2_dp2_distributed/tied"}
# By world size: where a loss that looks at whole sequences trains.
OWN_LOSS: dict[int, str] = {1: "one/tied", 4: "tp2_sp_cp2/tied"}
PROMPTS, SAMPLES = 4, 3
HELDOUT = [(3, 5), (1, 1), (12, 2), (2, 40), (5, 5), (7, 1), (4, 16)]  # prompt and response tokens
VERDICTS = (Verdict(Outcome.CORRECT, Reason.MATCH), Verdict(Outcome.WRONG, Reason.MISMATCH), Verdict(Outcome.NONE, Reason.TIMEOUT))


def config_of(model: Path, fields: dict[str, Any], dtype: str = "float32") -> Config:
    """Learning rate and clip range are such that some ratios leave the range in the second mini-batch."""
    training = {name: fields.pop(name) for name in ("recompute", "tokens_per_micro_batch") if name in fields}
    router_aux_loss, gradient_clip = fields.pop("router_aux_loss", 0.0), fields.pop("gradient_clip", 1.0)
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
                "kl_coefficient": 0.05,
                "rollout_correction": 1.5,
                "router_aux_loss": router_aux_loss,
            },
            "logging": {"sign_norms_every": 1, "probe_every": 2},
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1, "gradient_clip": gradient_clip},
            "parallel": fields,
            "training": {"tokens_per_micro_batch": 60, "head_chunk_tokens": 16} | training,
        }
    )


def recorded_step(
    vocab: int, seed: int, mini_batch_prompts: int, name: str = "reinforce", critic_mini_batch_prompts: int | None = None
) -> StepBatch:
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
        build_objective(name),
        samples_per_prompt=SAMPLES,
        mini_batch_prompts=mini_batch_prompts,
        aggregation="sequence_mean",
        normalization="batch",
        critic_mini_batch_prompts=critic_mini_batch_prompts,
    )


def train(actor: Actor, config: Config, vocab: int, step: int) -> dict[str, float]:
    """Step 1 has two mini-batches, so old log-probs and clipping matter; the others are on-policy."""
    batch = recorded_step(vocab, seed=step, mini_batch_prompts=2 if step == 1 else PROMPTS)
    return actor.update(actor.prepare(batch, step), config.optimizer.learning_rate)


def updated_weights(actor: Actor, shape: ModelShape) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gather_hf_tensors(actor.chunks, shape, 1 << 16)}


def new_actor(config: Config, shape: ModelShape) -> Actor:
    gc.collect()  # an earlier actor's process groups keep their threads until it goes
    return build_actor(config, shape, choose_backend("cpu"))


def run_layout(model: Path, fields: dict[str, Any], folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Two steps, a checkpoint, and the third step both undisturbed and by a new actor; `folder` gets the weights after each."""
    config, shape, backend = config_of(model, dict(fields), dtype), read_model_shape(str(model)), choose_backend("cpu")
    make_folder(folder)
    actor = new_actor(config, shape)
    heldout = actor.measure_samples(random_responses(shape.vocab_size, HELDOUT))
    metrics = [train(actor, config, shape.vocab_size, step) for step in (1, 2)]
    weights = updated_weights(actor, shape)
    Checkpoints(folder / "checkpoints", keep=1).save(2, {"weight_version": 2}, actor.wrapped, actor.optimizer, backend, model)
    third = train(actor, config, shape.vocab_size, 3)
    third_weights = updated_weights(actor, shape)
    del actor
    if distributed.rank() == 0:
        torch.save(weights, folder / "weights.pt")
        torch.save(third_weights, folder / "third.pt")
    return {
        "heldout": heldout,
        "metrics": metrics,
        "third": third,
        "resumed": resume(model, fields, folder / "checkpoints", folder / "resumed.pt", dtype),
    }


def train_with_own_loss(model: Path, fields: dict[str, Any], weights: Path) -> dict[str, float]:
    """A step with an objective's own loss, a ratio of whole responses; the weights after it go to the file `weights`."""
    config, shape = config_of(model, dict(fields)), read_model_shape(str(model))
    gc.collect()
    actor = build_actor(config, shape, choose_backend("cpu"), own_loss=SequenceRatio())
    metrics = train(actor, config, shape.vocab_size, 1)
    after = updated_weights(actor, shape)
    make_folder(weights.parent)
    if distributed.rank() == 0:
        torch.save(after, weights)
    return metrics


def compare_signs(model: Path, fields: dict[str, Any]) -> dict[str, float]:
    """|g_PSR + g_NSR - g_REINFORCE| / |g_REINFORCE| of the main gradients over all ranks, and the clip fractions behind them.

    Three actors at equal parameters, on equal trajectories. Between old log-probs and gradient all weights grow by a fiftieth, so that
    ratios leave the clip range and the policy leaves its reference.
    """
    gradients, metrics = {}, {}
    for name in ("psr", "nsr", "reinforce"):
        config, shape = config_of(model, dict(fields)), read_model_shape(str(model))
        actor = new_actor(config, shape)
        prepared = actor.prepare(recorded_step(shape.vocab_size, 3, 2, name), 1)
        assert len(prepared.mini_batches) == 2
        with torch.no_grad():
            for parameter in (parameter for chunk in actor.chunks for parameter in chunk.parameters()):
                parameter.mul_(1.02)
        metrics |= actor.update(replace(prepared, mini_batches=prepared.mini_batches[:1]), 0.0)
        gradients[name] = [gradient for part in copied(main_gradients(actor.optimizer)) for gradient in part]
    triples = list(zip(*gradients.values(), strict=True))
    sums = torch.tensor([[float((psr + nsr - both).square().sum()), float(both.square().sum())] for psr, nsr, both in triples]).sum(0)
    error, norm = (sum(part) for part in zip(*distributed.all_gather_object(sums.tolist()), strict=True))
    clipped = {name: metrics[f"policy/{name}"] for name in ("clip_fraction_psr", "clip_fraction_nsr", "kl_reference")}
    return {"error": math.sqrt(error / norm), **clipped}


def load(model: Path, fields: dict[str, Any], directory: Path, dtype: str) -> tuple[Config, Actor]:
    """A new actor with the state of the checkpoint that was written after step 2."""
    config, shape, backend = config_of(model, dict(fields), dtype), read_model_shape(str(model)), choose_backend("cpu")
    actor = new_actor(config, shape)
    checkpoints = Checkpoints(directory, keep=1)
    latest = checkpoints.latest()
    assert latest is not None
    saved = checkpoints.load(latest, actor.wrapped, actor.optimizer, backend)
    assert (saved["step"], saved["weight_version"]) == (2, 2)
    return config, actor


def resume(model: Path, fields: dict[str, Any], directory: Path, weights: Path, dtype: str = "float32") -> dict[str, float]:
    """Step 3 from a checkpoint, after everything has left the device once; the weights after it go to the file `weights`."""
    config, actor = load(model, fields, directory, dtype)
    offload = Offload([actor], "all")
    offload.take_away()
    offload.bring_all()
    shape = read_model_shape(str(model))
    metrics = train(actor, config, shape.vocab_size, 3)
    after = updated_weights(actor, shape)
    if distributed.rank() == 0:
        torch.save(after, weights)
    return metrics


def take_detour(model: Path, layout: str, detour: str, folder: Path) -> dict[str, Any]:
    """A bf16 checkpoint of `layout` is read and written again by `detour`, and continues at `layout`."""
    found = run_layout(model, LAYOUTS[layout], folder, "bfloat16")
    _, actor = load(model, LAYOUTS[detour], folder / "checkpoints", "bfloat16")
    Checkpoints(folder / "again", keep=1).save(2, {"weight_version": 2}, actor.wrapped, actor.optimizer, choose_backend("cpu"), model)
    del actor
    return found | {"returned": resume(model, LAYOUTS[layout], folder / "again", folder / "returned.pt", "bfloat16")}


def make_folder(folder: Path) -> None:
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()


def find(models: Path, out: Path) -> dict[str, Any]:
    world = distributed.world_size()
    found: dict[str, Any] = {}
    for case in CASES[world]:
        layout, model = case.split("/")
        found[case] = run_layout(models / model, LAYOUTS[layout], out / case)
    for case, layout in MOVES[world]:
        weights = out / case / f"at_{layout}.pt"
        found[f"{case}-{layout}"] = resume(models / case.split("/")[1], LAYOUTS[layout], out / case / "checkpoints", weights)
    layout, model = SIGNS[world].split("/")
    found[f"signs/{SIGNS[world]}"] = compare_signs(models / model, LAYOUTS[layout] | {"gradient_clip": 1e9})
    if world in OWN_LOSS:
        layout, model = OWN_LOSS[world].split("/")
        found[f"own/{OWN_LOSS[world]}"] = train_with_own_loss(models / model, LAYOUTS[layout], out / "own" / OWN_LOSS[world] / "weights.pt")
    for case, detour in DETOURS if world == 4 else ():
        layout, model = case.split("/")
        found[f"bf16/{case}"] = take_detour(models / model, layout, detour, out / "bf16" / case)
    return found
