"""Part (e): the main job, colocated on one device: `Trainer.train_step` on a briefly trained base.

May import: everything. The part exists twice: the 1.5B shape for the update's utilization, the 0.5B shape for 50 steps of log-prob gaps.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_nsr.components import Components, Inputs
from megatron_nsr.config import Config
from megatron_nsr.models.hf_config import ModelShape
from megatron_nsr.observability.run_directory import open_run
from megatron_nsr.planning.hardware import GPUS, find_gpu
from megatron_nsr.planning.plan import make_plan
from megatron_nsr.planning.workload import Lengths
from megatron_nsr.platform.signals import StopRequest
from megatron_nsr.trainer import Trainer
from megatron_nsr.types import TrainBatch
from tools.acceptance.bases import Base, made_base
from tools.acceptance.curves import Lesson
from tools.acceptance.flops import sequence_lengths, update_flops
from tools.acceptance.limits import measure_limits
from tools.acceptance.policies import free_device_memory, this_backend
from tools.acceptance.record import Goal, NotRun, Record, Step
from tools.acceptance.runs import PeakMemory, RunSettings, built, run_config

UTILIZATION = Goal("update of the 1.5B shape, micro-batches of 4,096 tokens: share of the measured bf16 products", at_least=0.45)
GAP = Goal("log-prob gap of engine and policy over 50 steps: largest mean of a step, nats", at_most=0.01)
DRIFT = Goal("the same, mean of the last ten steps over that of the first ten", at_most=1.25)
WARM_UP = 2  # steps that compile, allocate and pin
PHASES = ("offload", "rollout", "reward", "old_logprobs", "update", "weight_sync", "other")
FLOAT32_GAP = 2e-4  # nats, of a mean; in bf16 the goal's
STEP_MARGIN = 3.0  # steps' time that must be left for another one


@dataclass(frozen=True, slots=True)
class Settings:
    base: Base
    run: RunSettings
    steps: int


def run(record: Record, work: Path, settings: Settings) -> None:
    record.settings = asdict(settings)
    device = this_backend().device
    model = None
    with record.step("base model") as step:
        model = made_base(record, step, settings.base, work)
    measure_limits(record, device)
    free_device_memory()
    with record.step("colocated training") as step:
        if model is None:
            raise NotRun("there is no base model")
        config = run_config(model, work, settings.run, steps=settings.steps)
        with PeakMemory() as memory, built(config) as (inputs, parts):
            watch = UpdateWatch(parts)
            steps = take_steps(record, config, inputs, parts, watch)
        step.figure(peak_memory_gib=memory.gib)
        report(record, step, config, inputs.shape, steps)


@dataclass(frozen=True, slots=True)
class TakenStep:
    """metrics: the trainer's own. flops: of the update. prompts, responses: tokens of each trained sequence.

    misaligned: mean |difference| in nats of the engine's log-probs to those of the token before: what a shift by one would show as a gap.
    """

    metrics: Mapping[str, float]
    flops: float
    prompts: np.ndarray
    responses: np.ndarray
    micro_batches: int
    misaligned: float


class UpdateWatch:
    """Keeps the micro-batches of the actor's updates, without a look at them while the trainer's clock runs."""

    def __init__(self, parts: Components) -> None:
        self.batches: list[TrainBatch] = []
        inner = parts.actor.update

        def update(prepared: Any, learning_rate: float) -> dict[str, float]:
            self.batches += [batch for mini_batch in prepared.mini_batches for batch in mini_batch]
            return inner(prepared, learning_rate)

        setattr(parts.actor, "update", update)  # noqa: B010  # on this object alone

    def taken(self, shape: ModelShape, metrics: Mapping[str, float]) -> TakenStep:
        batches, self.batches = self.batches, []
        engine = torch.cat([batch.rollout_logprobs[batch.response_mask] for batch in batches])
        misaligned = float(engine.diff().abs().mean())
        return TakenStep(metrics, update_flops(shape, batches), *sequence_lengths(batches), len(batches), misaligned)


def take_steps(record: Record, config: Config, inputs: Inputs, parts: Components, watch: UpdateWatch) -> list[TakenStep]:
    """As many of the run's steps as the part has time for."""
    trainer = Trainer(config, open_run(config), inputs, parts, StopRequest())
    parts.push(0)
    steps: list[TakenStep] = []
    while len(steps) < config.run.steps:
        if steps and record.remaining_s < STEP_MARGIN * max(taken.metrics["time/step_s"] for taken in steps[-5:]) + 10:
            break
        steps.append(watch.taken(inputs.shape, trainer.train_step()))
    return steps


def report(record: Record, step: Step, config: Config, shape: ModelShape, steps: list[TakenStep]) -> None:
    counted = steps[WARM_UP:] or steps
    seconds = {phase: median(counted, f"time/{phase}_s") for phase in PHASES}
    whole = median(counted, "time/step_s")
    step.figure(steps=len(steps), seconds_by_phase=seconds, seconds_a_step=whole, tokens_per_s=median(counted, "perf/tokens_per_s"))
    responses = statistics.median(float(taken.responses.sum()) for taken in counted)
    inputs = statistics.median(float(taken.responses.sum() + taken.prompts.sum()) for taken in counted)
    step.figure(
        sequences=len(counted[0].responses),
        prompt_tokens_mean=float(counted[-1].prompts.mean()),
        response_tokens_mean=float(counted[-1].responses.mean()),
        tokens_a_micro_batch=inputs / counted[-1].micro_batches,
        rollout_response_tokens_per_s=responses / seconds["rollout"],
        update_tokens_per_s=inputs / seconds["update"],
        push_bytes=counted[-1].metrics["rollout/push_bytes"],
    )
    for taken in steps:
        if not all(np.isfinite(value) for value in taken.metrics.values()):
            step.check("every metric is a number", False)
    step.check("an optimizer step each", min(taken.metrics["policy/updates"] for taken in steps), at_least=1)
    step.check("seconds of no phase over those of the step", seconds["other"] / whole, at_most=0.2)
    rate = statistics.median(taken.flops / taken.metrics["time/update_s"] for taken in counted) / 1e12
    step.figure(update_model_tflops=rate)
    if "bf16_tflops" in record.limits:
        share = rate / record.limits["bf16_tflops"]
        step.figure(utilization_of_measured_products=share)
        if torch.cuda.is_available():  # a CPU multiplies float32 faster than what stands as its limit here
            step.check("utilization is a share", share, at_most=1.0, at_least=0.0)
        reach(record, "utilization", share)
    gaps(record, step, config, steps)
    predicted(step, config, shape, counted[-1])


def gaps(record: Record, step: Step, config: Config, steps: list[TakenStep]) -> None:
    means = [taken.metrics["rollout/logprob_gap_mean"] for taken in steps]
    largest = max(taken.metrics["rollout/logprob_gap_max"] for taken in steps)
    step.figure(logprob_gap_mean_by_step=means, logprob_gap_max=largest)
    bound = FLOAT32_GAP if config.model.dtype == "float32" else 2 * (GAP.at_most or 0.0)
    step.check("mean log-prob gap of the worst step, nats", max(means), at_most=bound, wrong=steps[-1].misaligned)
    first, last = statistics.mean(means[:10]), statistics.mean(means[-10:])
    step.figure(gap_of_first_ten_steps=first, gap_of_last_ten_steps=last)
    if len(steps) >= 50 or record.dry:
        reach(record, "gap", max(means))
        reach(record, "drift", last / first)
    else:
        for name in ("gap", "drift"):
            if record.has_goal(name):
                record.open_goal(name, f"{len(steps)} steps were taken in the time, not 50")


def predicted(step: Step, config: Config, shape: ModelShape, taken: TakenStep) -> None:
    """The planner's numbers for these lengths, so that its shares of the peak can be set by what was measured."""
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else "cpu"
    known = next((key for key in GPUS if key in name), None)
    if known is None:
        return
    spread = float(taken.responses.std() / taken.responses.mean())
    lengths = Lengths(float(taken.prompts.mean()), float(taken.responses.mean()), spread, config.rollout.max_response_tokens)
    plan = make_plan(config, shape, 1, find_gpu(known), lengths)
    step.figure(
        planned_seconds_by_phase={phase: planned.seconds for phase, planned in plan.phases.items()},
        planned_peak_memory_gib=plan.memory.peak / 2**30,
    )


def reach(record: Record, name: str, value: float) -> None:
    """Where the part has this goal."""
    if record.has_goal(name):
        record.goal(name, value)


def median(steps: list[TakenStep], name: str) -> float:
    return statistics.median(taken.metrics.get(name, 0.0) for taken in steps)


DRY_LESSON = Lesson(60, 16, 4, 1e-2)
DRY_BASE = Base("tiny", "float32", DRY_LESSON, 4096)
DRY_RUN = RunSettings("float32", 4, 4, 4, 256, 1e-3, sleep_level=0, offload="all", kv_cache_mib=16)
