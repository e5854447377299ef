"""How one policy learns under two settings: the loss of every step, and how far apart their log-probs of the same tokens go.

May import: everything but vLLM.
"""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_nsr.data.tokenizers import Tokenizer, load_tokenizer
from megatron_nsr.types import Trajectory, WeightedSample
from tools.acceptance.policies import build_policy_of, free_device_memory, packed, policy_config, response_logprobs, update_on
from tools.acceptance.record import Step
from tools.acceptance.task import one_problem


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is learned: `sequences` right answers of `numbers` terms a step."""

    steps: int
    sequences: int
    numbers: int
    learning_rate: float


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """losses: nats a token, of each step. probes: {step: log-probs [tokens]} of sequences that are not trained on."""

    losses: list[float]
    probes: dict[int, Tensor]


def learn(model: Path, lesson: Lesson, **settings: Any) -> Curve:
    """Maximum likelihood from random weights; the same data and weights whatever the settings are."""
    config = policy_config(model, model={"initialization": "random", **settings}, objective={"entropy_coefficient": 0.0})
    actor, _ = build_policy_of(config)
    tokenizer = load_tokenizer(str(model))
    probe = packed(answers(tokenizer, lesson, seed=10**6), actor)
    losses, probes = [], {}
    for step in range(1, lesson.steps + 1):
        metrics = update_on(actor, [packed(answers(tokenizer, lesson, seed=step), actor)], lesson.learning_rate)
        losses.append(-metrics["policy/logprob"])
        if step % max(1, lesson.steps // 10) == 0:
            probes[step] = response_logprobs(actor, probe)
    del actor
    gc.collect()
    free_device_memory()
    return Curve(losses, probes)


def answers(tokenizer: Tokenizer, lesson: Lesson, seed: int) -> list[WeightedSample]:
    """Right answers of the task, each of their tokens with the same weight."""
    draw, found = random.Random(seed), list[Trajectory]()
    for _ in range(lesson.sequences):
        row = one_problem(draw, lesson.numbers)
        response = np.array([*tokenizer.encode(row["response"]), tokenizer.stop_ids[0]], np.int32)
        prompt = tuple(tokenizer.encode(row["question"]))
        found.append(Trajectory(len(found), 0, prompt, response, np.zeros(len(response), np.float32), "stop", 0))
    total = sum(trajectory.length for trajectory in found)
    return [WeightedSample(trajectory, 1.0, 1.0 / total) for trajectory in found]


def compare_curves(step: Step, base: Curve, other: Curve, *, largest_share: float) -> None:
    """Both must learn, and alike: the mean distance of the two losses is held against what was learned.

    Wrong: a model that stays at its first loss. A gap of nothing at all would mean that the setting had no effect.
    """
    first, last = np.mean(base.losses[:3]), np.mean(base.losses[-3:])
    apart = np.abs(np.subtract(base.losses, other.losses))
    stays = np.abs(np.subtract(base.losses, base.losses[0]))
    gaps = {at: float((other.probes[at] - base.probes[at]).abs().mean()) for at in base.probes}
    step.figure(losses=other.losses, logprob_gap_mean_by_step=gaps)
    step.check("nats learned by the base", float(first - last), at_least=0.3)
    step.check("distance of the losses over what was learned", float(apart.mean() / (first - last)), at_most=largest_share,
               wrong=float(stays.mean() / (first - last)))  # fmt: skip
    step.check("log-prob gap at the end, nats: the setting has an effect", max(gaps.values()), at_least=1e-9)
    step.check("every loss is a number", bool(np.isfinite(other.losses).all()))
