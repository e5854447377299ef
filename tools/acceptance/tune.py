"""What the measurements can set: chunks of the head, tiles of its kernels, the packing budget, CUDA graphs in vLLM.

May import: everything. A sweep names the fastest value and changes nothing; every value must give the same numbers.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_nsr.config_files import parse_config
from megatron_nsr.losses.head_tensors import HeadInputs, HeadOptions
from megatron_nsr.losses.policy_head import policy_head
from megatron_nsr.losses.shard import VocabularyShard
from megatron_nsr.losses.terms import LossTerms
from tools.acceptance.bases import Base, made_base
from tools.acceptance.job import DRY_BASE, DRY_RUN
from tools.acceptance.job_small import BASE, RUN
from tools.acceptance.limits import seconds_of
from tools.acceptance.models import write_model
from tools.acceptance.policies import build_policy_of, free_device_memory, made_up, policy_config, this_backend, update_on
from tools.acceptance.record import Goal, NotRun, Record, Step
from tools.acceptance.rollout_gap import gap_of
from tools.acceptance.runs import RunSettings, run_config, timed
from tools.benchmarks.fused_head_measure import Problem, Shape, make_problem

GOALS: dict[str, Goal] = {}
TERMS = LossTerms(eps_low=0.2, eps_high=0.28, entropy_coefficient=0.01)
SAME_NUMBERS = 0.01  # relative: other sums, the same numbers


@dataclass(frozen=True, slots=True)
class Settings:
    """head: tokens, width, vocabulary. The packing budgets share `sequences` of the same length out."""

    head: tuple[int, int, int]
    chunks: tuple[int, ...]
    tiles: tuple[int, ...]
    shape: str
    dtype: str
    sequences: int
    response: int
    budgets: tuple[int, ...]
    base: Base
    run: RunSettings


GPU = Settings(
    (16384, 3584, 151936), (256, 512, 1024, 2048, 4096), (1024, 2048, 4096, 8192, 16384), "1.5b", "bfloat16", 64, 960,
    (4096, 8192, 16384, 32768), BASE, RUN,
)  # fmt: skip
DRY = Settings((64, 16, 512), (8, 32), (1024,), "tiny", "float32", 8, 12, (64, 256), DRY_BASE, DRY_RUN)


def run(record: Record, work: Path) -> None:
    settings = DRY if record.dry else GPU
    record.settings = asdict(settings)
    device = this_backend().device
    problem = make_problem(Shape(*settings.head), device, getattr(torch, settings.dtype))
    with record.step("training.head_chunk_tokens") as step:
        head_chunks(step, settings, problem, device)
    with record.step("tiles of the row kernels") as step:
        if device.type != "cuda":
            raise NotRun("no CUDA: the kernels run on a GPU alone")
        tiles(step, settings, problem, device)
    del problem
    free_device_memory()
    with record.step("training.tokens_per_micro_batch") as step:
        budgets(step, settings, work)
    with record.step("rollout.push_bucket_mib"):
        raise NotRun("one rank has the whole model: nothing travels in buckets")
    with record.step("overlap of the reduction of gradients"):
        raise NotRun("one rank reduces nothing")
    free_device_memory()
    with record.step("rollout.enforce_eager") as step:
        graphs(record, step, settings, work)


def head_chunks(step: Step, settings: Settings, problem: Problem, device: torch.device) -> None:
    """Forward and backward of the head with each chunk; `default` is the key's null."""
    sweep: dict[str, Callable[[], Tensor]] = {"default": partial(head_loss, problem, None)}
    sweep |= {str(chunk): partial(head_loss, problem, chunk) for chunk in settings.chunks}
    swept(step, sweep, device)


def tiles(step: Step, settings: Settings, problem: Problem, device: torch.device) -> None:
    """Columns that a program of each kernel holds at once."""
    for name in ("statistics", "gradient"):
        kernels: Any = importlib.import_module(f"megatron_nsr.losses.triton_{name}")
        shipped = kernels._TILE
        found = Step(name)
        try:
            for tile in settings.tiles:
                kernels._TILE = tile
                found.figures[str(tile)] = seconds_of(device, lambda: head_loss(problem, None))
        finally:
            kernels._TILE = shipped
        step.figure(**{f"{name}_seconds": found.figures, f"{name}_shipped": shipped})


def head_loss(problem: Problem, chunk: int | None) -> Tensor:
    inputs = HeadInputs(problem.targets, weights=problem.weights, scale=problem.scale, old_logprobs=problem.old_logprobs)
    problem.hidden.grad = problem.weight.grad = None
    shard = VocabularyShard(0, problem.shape.vocabulary)
    loss = policy_head(problem.hidden, problem.weight, inputs, shard, TERMS, HeadOptions(chunk=chunk)).loss
    loss.backward()
    return loss.detach()


def swept(step: Step, sweep: dict[str, Callable[[], Tensor]], device: torch.device) -> None:
    seconds = {name: seconds_of(device, call) for name, call in sweep.items()}
    results = {name: float(call()) for name, call in sweep.items()}
    first = next(iter(results.values()))
    step.figure(seconds=seconds, fastest=min(seconds, key=lambda name: seconds[name]))
    step.check("largest difference of the results, relative", max(abs(r / first - 1) for r in results.values()), at_most=SAME_NUMBERS)


def budgets(step: Step, settings: Settings, work: Path) -> None:
    """The same samples in micro-batches of each size; memory is what sets the largest."""
    model = write_model(work / "budgets", settings.shape)
    config = policy_config(model, model={"initialization": "random", "dtype": settings.dtype})
    actor, shape = build_policy_of(config)
    samples = made_up(shape.vocab_size, 64, (settings.response,) * settings.sequences, seed=6)
    seconds, norms, peaks = {}, {}, {}
    for budget in settings.budgets:
        actor.budget = budget
        batches = actor.pack(samples)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            laps = [timed(lambda: update_on(actor, batches, 0.0)) for _ in range(4)]  # noqa: B023  # called at once
        except torch.cuda.OutOfMemoryError:
            step.figure(out_of_memory_at=budget)
            break
        seconds[str(budget)] = statistics.median(lap for lap, _ in laps[1:])
        norms[str(budget)] = laps[-1][1]["policy/grad_norm"]
        peaks[str(budget)] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    first = next(iter(norms.values()))
    step.figure(seconds=seconds, fastest=min(seconds, key=lambda name: seconds[name]), peak_gib=peaks)
    step.check("largest difference of the gradient norms, relative", max(abs(n / first - 1) for n in norms.values()), at_most=SAME_NUMBERS)


def graphs(record: Record, step: Step, settings: Settings, work: Path) -> None:
    """Tokens a second with CUDA graphs and without."""
    if not torch.cuda.is_available():
        raise NotRun("no CUDA: vLLM on a CPU is always eager")
    config = run_config(made_base(record, step, settings.base, work), work, settings.run, steps=1)
    values = config.model_dump(by_alias=True)
    for eager in (False, True):
        changed = parse_config(values | {"rollout": values["rollout"] | {"enforce_eager": eager, "sleep_level": 0}})
        step.figure(**{f"enforce_eager_{eager}".lower(): gap_of(record, changed, work)})
