"""Part (f): the whole vocabulary of 151,936 words with sequences of 4,096 tokens: log-probs, the head's memory, updates.

May import: everything but vLLM.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_nsr.types import WeightedSample
from tools.acceptance import huggingface
from tools.acceptance.flops import update_flops
from tools.acceptance.limits import measure_limits, meter_of
from tools.acceptance.models import write_model
from tools.acceptance.policies import (
    build_policy_of,
    free_device_memory,
    made_up,
    packed,
    policy_config,
    response_logprobs,
    this_backend,
    update_on,
)
from tools.acceptance.policy import LOGPROB_BOUND, OF_HF_ERROR, mean_gap
from tools.acceptance.record import Goal, NotRun, Record, Step
from tools.acceptance.runs import PeakMemory, timed
from tools.benchmarks.fused_head import TRAINING, Case
from tools.benchmarks.fused_head_measure import Problem, Shape, make_problem
from tools.benchmarks.fused_head_peers import BASELINES, OURS, Variant

GOALS: dict[str, Goal] = {}
VOCABULARY = 151936
CUT = 65536  # what 16 bits count
LARGEST_SHARE = 0.5  # of a whole [tokens, vocabulary] matrix of fp32, that the head may hold


@dataclass(frozen=True, slots=True)
class Settings:
    """prompt + response tokens a sequence; micro_batches of one sequence an update. head: tokens and width of the head's own problem."""

    shape: str
    dtype: str
    prompt: int
    response: int
    micro_batches: int
    head_tokens: int
    head_hidden: int


GPU = Settings("1.5b", "bfloat16", 512, 3585, 4, 4096, 1536)
DRY = Settings("tiny", "float32", 4, 13, 2, 256, 32)


def run(record: Record, work: Path) -> None:
    settings = DRY if record.dry else GPU
    record.settings = asdict(settings)
    device = this_backend().device
    measure_limits(record, device)
    with record.step("memory of the head") as step:
        head_memory(step, settings, device)
    free_device_memory()
    model = write_model(work / "vocabulary", settings.shape, vocab_size=VOCABULARY)
    with record.step("log-probs beside Hugging Face") as step:
        huggingface.write_random_weights(model, getattr(torch, settings.dtype))
        logprobs(step, model, settings, device)
    free_device_memory()
    with record.step("updates") as step:
        updates(record, step, model, settings)


def head_memory(step: Step, settings: Settings, device: torch.device) -> None:
    """The peak above the inputs, of our head and of materialised logits, over the bytes of one matrix of logits."""
    shape = Shape(settings.head_tokens, settings.head_hidden, VOCABULARY)
    problem = make_problem(shape, device, getattr(torch, settings.dtype))
    matrix = 4 * shape.tokens * shape.vocabulary
    ours = next(variant for variant in OURS if variant.name == "policy_head, main_grad")
    peaks = {variant.name: peak_bytes(variant, problem, device) for variant in (ours, BASELINES[0])}
    step.figure(peak_bytes=peaks, bytes_of_one_matrix=matrix)
    whole = peaks[BASELINES[0].name] / matrix
    step.check("peak over one matrix of logits", peaks[ours.name] / matrix, at_most=LARGEST_SHARE, wrong=whole)


def peak_bytes(variant: Variant, problem: Problem, device: torch.device) -> int:
    """Of forward and backward, after a call that warms up. An fp32 gradient that the head adds to counts as an input."""
    case = Case(variant, variant.build(device), TRAINING, entropy=True)
    case.prepare(problem)
    case.run(problem)
    case.prepare(problem)
    found = meter_of(device).peak_bytes(lambda: case.run(problem))
    if found is None:
        raise NotRun("no way to measure memory on this system")
    return found


def logprobs(step: Step, model: Path, settings: Settings, device: torch.device) -> None:
    """Of one whole sequence. Wrong: a softmax over the words that 16 bits can count."""
    config = policy_config(model, model={"dtype": settings.dtype})
    actor, shape = build_policy_of(config)
    (sample,) = made_up(shape.vocab_size, settings.prompt, (settings.response,), seed=4)
    mine = response_logprobs(actor, packed([sample], actor))
    exact = huggingface.load(model, torch.float32, device)
    right, cut = full_and_cut(exact, sample)
    bound = LOGPROB_BOUND
    if settings.dtype != "float32":
        del exact
        bound = OF_HF_ERROR * mean_gap(full_and_cut(huggingface.load(model, torch.bfloat16, device), sample)[0], right)
    step.check("log-probs, mean error in nats", mean_gap(mine, right), at_most=bound, wrong=mean_gap(cut, right))


@torch.no_grad()
def full_and_cut(model: Any, sample: WeightedSample) -> tuple[torch.Tensor, torch.Tensor]:
    """The response's log-probs [response] over all words, and with the sum over the first CUT words alone."""
    device, trajectory = next(model.parameters()).device, sample.trajectory
    ids = torch.tensor([*trajectory.prompt_ids, *trajectory.response_ids.tolist()], device=device)
    start = len(trajectory.prompt_ids)
    logits = model(ids[None, :-1]).logits[0, start - 1 :].float()
    picked = logits.gather(1, ids[start:, None])[:, 0]
    return picked - logits.logsumexp(-1), picked - logits[:, :CUT].logsumexp(-1)


def updates(record: Record, step: Step, model: Path, settings: Settings) -> None:
    actor, shape = build_policy_of(policy_config(model, model={"dtype": settings.dtype}))
    batches = [
        packed(made_up(shape.vocab_size, settings.prompt, (settings.response,), seed=5 + index), actor)
        for index in range(settings.micro_batches)
    ]
    with PeakMemory() as memory:
        laps = [timed(lambda: update_on(actor, batches, 1e-5)) for _ in range(6)]
    seconds = statistics.median(lap for lap, _ in laps[2:])
    losses = [metrics["policy/loss"] for _, metrics in laps]
    tokens = sum(len(batch.tokens) for batch in batches)
    rate = update_flops(shape, batches) / seconds / 1e12
    step.figure(
        seconds=[lap for lap, _ in laps], tokens_per_s=tokens / seconds, model_tflops=rate, peak_memory_gib=memory.gib, losses=losses
    )
    if "bf16_tflops" in record.limits:
        step.figure(share_of_measured_bf16_products=rate / record.limits["bf16_tflops"])
    step.check("the log-probs of samples that are reinforced rise", laps[-1][1]["policy/logprob"] > laps[0][1]["policy/logprob"])
