"""Where a step's training data comes from: rollouts that are graded and weighed, or reference responses.

May import: everything below the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_nsr.clock import PhaseClock
from megatron_nsr.config import Config
from megatron_nsr.data.references import reference_trajectory
from megatron_nsr.data.tokenizers import Tokenizer
from megatron_nsr.objectives.mini_batches import StepBatch, build_step_batch, token_scales
from megatron_nsr.objectives.objective import Objective
from megatron_nsr.observability.response_metrics import response_metrics
from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.rewards.sharing import grade_shared
from megatron_nsr.rollout.engine import Sampling
from megatron_nsr.rollout.rollouts import Rollouts
from megatron_nsr.types import Prompt, Trajectory, UserError, Verdict, WeightedSample


@dataclass(frozen=True, slots=True)
class Experience:
    """A step's batch, what it was made of (for the kept samples) and its metrics."""

    batch: StepBatch
    trajectories: Sequence[Trajectory]
    verdicts: Sequence[Verdict]
    metrics: dict[str, float]


class ExperienceSource(Protocol):
    def collect(self, prompts: Sequence[Prompt], step: int, clock: PhaseClock) -> Experience: ...

    def draw_ahead(self, prompts: Sequence[Prompt], step: int) -> None:
        """Begins to sample for a later step's `collect`, from the engine's present weights."""
        ...

    def settle(self) -> None:
        """Waits until what was begun is sampled."""
        ...

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """The policy's metrics of the step as they are to be logged."""
        ...


class GradedRollouts:
    """Reinforcement learning: sample, grade, weigh."""

    def __init__(self, rollouts: Rollouts, graders: GraderPool, objective: Objective, config: Config, stop_ids: tuple[int, ...]) -> None:
        self.rollouts, self.graders, self.objective, self.config = rollouts, graders, objective, config
        rollout = config.rollout
        self.sampling = Sampling(
            temperature=rollout.temperature, top_p=1.0, top_k=-1, max_tokens=rollout.max_response_tokens, stop_ids=stop_ids
        )

    def collect(self, prompts: Sequence[Prompt], step: int, clock: PhaseClock) -> Experience:
        samples, settings = self.config.rollout.samples_per_prompt, self.config.objective
        with clock("rollout"):
            trajectories = self.rollouts.generate(prompts, step=step, samples=samples, sampling=self.sampling, purpose="train")
        with clock("reward"):
            verdicts = grade_shared(trajectories, prompts, self.graders, self.config.reward.truncated)
        batch = build_step_batch(
            trajectories,
            verdicts,
            self.objective,
            samples_per_prompt=samples,
            mini_batch_prompts=settings.mini_batch_prompts,
            aggregation=settings.aggregation,
            normalization=settings.normalization,
        )
        kept = sum(len(mini_batch) for mini_batch in batch.mini_batches)
        metrics = {**response_metrics(trajectories, verdicts, samples), "policy/kept_ratio": kept / len(trajectories)}
        metrics["rollout/staleness"] = float(np.mean([step - 1 - trajectory.weight_version for trajectory in trajectories]))
        return Experience(batch, trajectories, verdicts, metrics)

    def draw_ahead(self, prompts: Sequence[Prompt], step: int) -> None:
        self.rollouts.draw_ahead(prompts, step=step, samples=self.config.rollout.samples_per_prompt, sampling=self.sampling)

    def settle(self) -> None:
        self.rollouts.ahead.settle()

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics


class References:
    """Supervised learning: the data's own responses, each reinforced with weight 1, one optimizer step a batch."""

    def __init__(self, tokenizer: Tokenizer, config: Config) -> None:
        self.tokenizer, self.aggregation = tokenizer, config.objective.aggregation

    def collect(self, prompts: Sequence[Prompt], step: int, clock: PhaseClock) -> Experience:
        trajectories = [reference_trajectory(self.tokenizer, index, prompt) for index, prompt in enumerate(prompts)]
        scales = token_scales(trajectories, trajectories, self.aggregation)
        samples = (WeightedSample(trajectory, 1.0, scale) for trajectory, scale in zip(trajectories, scales, strict=True))
        return Experience(StepBatch((tuple(samples),), ()), trajectories, (), {})

    def draw_ahead(self, prompts: Sequence[Prompt], step: int) -> None:
        """Nothing is sampled."""

    def settle(self) -> None:
        """Nothing is sampled."""

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """The loss is the mean negative log-prob; what compares with an engine or splits by sign has no meaning here."""
        kept = ("policy/learning_rate", "policy/updates", "policy/grad_norm", "policy/entropy", "policy/logprob")
        return {"supervised/loss": -metrics["policy/logprob"], **{name: metrics[name] for name in kept}}


def require_responses(prompts: Sequence[Prompt], path: str) -> None:
    """Raises UserError unless every problem of data.train=`path` has the response that supervised learning needs."""
    for prompt in prompts:
        if prompt.response is None:
            raise UserError(f"data.train={path}: problem {prompt.id} has no `response`, which objective.name=supervised learns from")
