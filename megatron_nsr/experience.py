"""Where a step's training data comes from: rollouts that are graded and weighed, or reference responses.

May import: everything below the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from megatron_nsr.clock import PhaseClock
from megatron_nsr.config import Config
from megatron_nsr.data.references import reference_trajectory
from megatron_nsr.data.tokenizers import Tokenizer
from megatron_nsr.objectives.dynamic_sampling import Group, grouped, refilled
from megatron_nsr.objectives.mini_batches import StepBatch, build_step_batch, token_scales
from megatron_nsr.objectives.schedule import ObjectiveSchedule
from megatron_nsr.objectives.signed import SignedObjective
from megatron_nsr.observability.response_metrics import response_metrics
from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.rewards.sharing import grade_shared, require_verdicts
from megatron_nsr.rollout.engine import Sampling
from megatron_nsr.rollout.rollouts import Rollouts
from megatron_nsr.types import Prompt, Trajectory, UserError, Verdict, WeightedSample


@dataclass(frozen=True, slots=True)
class Experience:
    """A step's batch, what it was made of (for the kept samples) and its metrics.

    sampled_tokens: prompt and response tokens of all samples, those of groups that gave way included. prompt_batches: how many batches
    of prompts were taken.
    """

    batch: StepBatch
    prompts: Sequence[Prompt]
    trajectories: Sequence[Trajectory]
    verdicts: Sequence[Verdict]
    metrics: dict[str, float]
    sampled_tokens: int
    prompt_batches: int = 1


class ExperienceSource(Protocol):
    def collect(self, batches: Iterator[Sequence[Prompt]], step: int, clock: PhaseClock) -> Experience:
        """The step's data from the next batch of prompts, or from more of them."""
        ...

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

    def __init__(
        self, rollouts: Rollouts, graders: GraderPool, schedule: ObjectiveSchedule, config: Config, stop_ids: tuple[int, ...]
    ) -> None:
        self.rollouts, self.graders, self.schedule, self.config = rollouts, graders, schedule, config
        rollout = config.rollout
        self.sampling = Sampling(
            temperature=rollout.temperature, top_p=1.0, top_k=-1, max_tokens=rollout.max_response_tokens, stop_ids=stop_ids
        )

    def collect(self, batches: Iterator[Sequence[Prompt]], step: int, clock: PhaseClock) -> Experience:
        samples, settings, objective = self.config.rollout.samples_per_prompt, self.config.objective, self.schedule.at(step)
        most_rounds = settings.sampling_rounds if step > self.schedule.nsr_steps else 1  # NSR learns most where all is wrong
        rounds = [self._round(next(batches), step, clock)]
        groups = rounds[0]
        while len(rounds) < most_rounds and not all(group.mixed for group in groups):
            sampled = {group.prompt.id for drawn in rounds for group in drawn}
            # A new epoch may bring a prompt for the second time, and its seeds would draw the same responses.
            further = [prompt for prompt in next(batches) if prompt.id not in sampled]
            if not further:
                break  # the data has no others
            rounds.append(self._round(further, step, clock))
            groups = refilled(groups, rounds[-1])
        every = [group for drawn in rounds for group in drawn]
        require_verdicts([verdict for group in every for verdict in group.verdicts], self.graders, self.config.reward.grader)
        trajectories = [replace(trajectory, prompt=place) for place, group in enumerate(groups) for trajectory in group.trajectories]
        verdicts = [verdict for group in groups for verdict in group.verdicts]
        batch = build_step_batch(
            trajectories,
            verdicts,
            objective,
            samples_per_prompt=samples,
            mini_batch_prompts=settings.mini_batch_prompts,
            aggregation=settings.aggregation,
            normalization=settings.normalization,
            token_budget=self.config.rollout.max_response_tokens,
            critic_mini_batch_prompts=self.config.critic.mini_batch_prompts,
        )
        metrics = self._metrics(every, batch, step)
        metrics["rollout/rounds"] = float(len(rounds))
        if settings.name == "w_reinforce" and isinstance(objective, SignedObjective):
            metrics["policy/lambda"] = objective.positive
        tokens = _tokens([trajectory for group in every for trajectory in group.trajectories])
        return Experience(batch, [group.prompt for group in groups], trajectories, verdicts, metrics, tokens, len(rounds))

    def _round(self, prompts: Sequence[Prompt], step: int, clock: PhaseClock) -> list[Group]:
        samples = self.config.rollout.samples_per_prompt
        with clock("rollout"):
            trajectories = self.rollouts.generate(prompts, step=step, samples=samples, sampling=self.sampling, purpose="train")
        with clock("reward"):
            verdicts = grade_shared(trajectories, prompts, self.graders, self.config.reward.truncated)
        return grouped(prompts, trajectories, verdicts, samples)

    def _metrics(self, sampled: Sequence[Group], batch: StepBatch, step: int) -> dict[str, float]:
        """Of all that was sampled: what dynamic sampling selects would tell nothing of the policy."""
        trajectories = [trajectory for group in sampled for trajectory in group.trajectories]
        verdicts = [verdict for group in sampled for verdict in group.verdicts]
        return {
            **response_metrics(trajectories, verdicts, self.config.rollout.samples_per_prompt),
            "policy/kept_ratio": sum(len(mini_batch) for mini_batch in batch.mini_batches) / len(trajectories),
            "rollout/staleness": float(np.mean([step - 1 - trajectory.weight_version for trajectory in trajectories])),
        }

    def draw_ahead(self, prompts: Sequence[Prompt], step: int) -> None:
        self.rollouts.draw_ahead(prompts, step=step, samples=self.config.rollout.samples_per_prompt, sampling=self.sampling)

    def settle(self) -> None:
        self.rollouts.ahead.settle()

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics


class References:
    """Supervised learning: the data's own responses, each reinforced with weight 1, one optimizer step a batch."""

    def __init__(self, tokenizer: Tokenizer, config: Config) -> None:
        self.tokenizer, self.aggregation, self.token_budget = tokenizer, config.objective.aggregation, config.rollout.max_response_tokens

    def collect(self, batches: Iterator[Sequence[Prompt]], step: int, clock: PhaseClock) -> Experience:
        prompts = next(batches)
        trajectories = [reference_trajectory(self.tokenizer, index, prompt) for index, prompt in enumerate(prompts)]
        scales = token_scales(trajectories, trajectories, self.aggregation, self.token_budget)
        samples = (WeightedSample(trajectory, 1.0, scale) for trajectory, scale in zip(trajectories, scales, strict=True))
        return Experience(StepBatch((tuple(samples),), ()), prompts, trajectories, (), {}, _tokens(trajectories))

    def draw_ahead(self, prompts: Sequence[Prompt], step: int) -> None:
        """Nothing is sampled."""

    def settle(self) -> None:
        """Nothing is sampled."""

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """The loss is the mean negative log-prob; what compares with an engine or splits by sign has no meaning here."""
        kept = ("policy/learning_rate", "policy/updates", "policy/grad_norm", "policy/entropy", "policy/logprob")
        return {"supervised/loss": -metrics["policy/logprob"], **{name: metrics[name] for name in kept}}


def _tokens(trajectories: Sequence[Trajectory]) -> int:
    """Of prompts and responses."""
    return sum(len(trajectory.prompt_ids) + trajectory.length for trajectory in trajectories)


def require_responses(prompts: Sequence[Prompt], path: str) -> None:
    """Raises UserError unless every problem of data.train=`path` has the response that supervised learning needs."""
    for prompt in prompts:
        if prompt.response is None:
            raise UserError(f"data.train={path}: problem {prompt.id} has no `response`, which objective.name=supervised learns from")
