"""Part (d): vLLM in the process of the policy: pushes by every route, generation, sleep around training, FP8 rollouts.

May import: everything.
"""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_nsr.config import Config
from megatron_nsr.config_files import parse_config
from tools.acceptance.bases import Base, made_base
from tools.acceptance.colocated import Colocated
from tools.acceptance.job import DRY_BASE, DRY_RUN
from tools.acceptance.job_large import BASE
from tools.acceptance.limits import measure_limits
from tools.acceptance.policies import free_device_memory, this_backend
from tools.acceptance.record import Goal, Record, Step
from tools.acceptance.rollout_gap import gap_of
from tools.acceptance.runs import RunSettings, built, run_config

GOALS = {
    "rollouts": Goal("tokens a second through the project over those of bare vLLM", at_least=0.95),
    "push": Goal("push of the 1.5B shape: seconds over those of one copy and of vLLM's own load", at_most=1.5),
    "push seconds": Goal("push of the 1.5B shape, seconds", at_most=1.0),
}
FP8_GAP = 0.2  # nats, mean: the same model with rounded weights, no more
STEPS = {
    "push, colocated": Colocated.push,
    "generation": Colocated.generation,
    "rollouts beside bare vLLM": Colocated.beside_bare_vllm,
    "stale weights": Colocated.stale_weights,
    "sleep around training": Colocated.sleep,
    "push, servers": Colocated.push_to_server,
}


@dataclass(frozen=True, slots=True)
class Settings:
    base: Base
    run: RunSettings


GPU = Settings(BASE, RunSettings("bfloat16", 120, 32, 8, 4096, 1e-6, sleep_level=1, offload="none"))
DRY = Settings(DRY_BASE, DRY_RUN)


def run(record: Record, work: Path) -> None:
    settings = DRY if record.dry else GPU
    record.settings = asdict(settings)
    device = this_backend().device
    model = None
    with record.step("base model") as step:
        model = made_base(record, step, settings.base, work)
    if model is None:
        return
    measure_limits(record, device)
    free_device_memory()
    config = run_config(model, work, settings.run, steps=1)
    gap = colocated(record, config, device, work)
    gc.collect()
    free_device_memory()  # the next step's process has a policy and an engine of its own
    with record.step("FP8 rollouts") as step:
        fp8_rollouts(record, step, config, work, gap)


def colocated(record: Record, config: Config, device: torch.device, work: Path) -> float | None:
    """All that is asked of one policy and one engine; their mean log-prob gap, if it was measured."""
    with record.step("policy and engine") as step, built(config) as (inputs, parts):
        bench = Colocated(record, config, inputs, parts, device, work)
        for name, action in STEPS.items():
            with record.step(name) as inner:
                action(bench, inner)
        step.figure(pushes=bench.version)
        return bench.gap
    return None


def fp8_rollouts(record: Record, step: Step, config: Config, work: Path, gap: float | None) -> None:
    """A policy in BF16 and an engine that rounds its weights to FP8."""
    values = config.model_dump(by_alias=True)
    rollout = values["rollout"] | {"sleep_level": 0, "enforce_eager": True, "quantization": "fp8", "verify_push": "always"}
    found = gap_of(record, parse_config(values | {"rollout": rollout, "model": values["model"] | {"dtype": "bfloat16"}}), work)
    step.figure(**found)
    step.check("mean log-prob gap, nats", found["mean"], at_most=FP8_GAP, wrong=found["misaligned"])
    if gap is not None:
        step.check("its ratio to the gap without FP8: the rounding shows", found["mean"] / gap, at_least=1.2)
