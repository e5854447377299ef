"""Pass@k of the policy on benchmarks, and its entropy on their prompts.

May import: config, types, platform, phases, training, rollout, rewards, data, observability, the rest of evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_nsr.config import EvaluationConfig, RewardConfig
from megatron_nsr.data.prompts import PromptSet
from megatron_nsr.evaluation.generations import Generations
from megatron_nsr.evaluation.results import benchmark_result
from megatron_nsr.evaluation.votes import count_votes, same_by_math_verify
from megatron_nsr.phases import Phases
from megatron_nsr.platform import distributed
from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.rewards.sharing import grade_shared
from megatron_nsr.rollout.engine import Sampling
from megatron_nsr.rollout.rollouts import Rollouts
from megatron_nsr.training.actor import Actor
from megatron_nsr.types import Outcome, Prompt, Trajectory, Verdict


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`result` is what eval/step_N.json holds, `metrics` what the loggers get."""

    result: dict[str, Any]
    metrics: dict[str, float]


class Benchmarks:
    """Samples n responses a problem from the engine's weights and grades them; every rank calls `run` together."""

    def __init__(
        self,
        benchmarks: Mapping[str, PromptSet],
        rollouts: Rollouts,
        graders: GraderPool,
        phases: Phases,
        settings: EvaluationConfig,
        reward: RewardConfig,
        *,
        training_temperature: float,
        max_response_tokens: int,
        stop_ids: tuple[int, ...],
    ) -> None:
        self.benchmarks, self.rollouts, self.graders, self.phases = benchmarks, rollouts, graders, phases
        self.settings, self.reward = settings, reward
        self.sampling = Sampling(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_tokens=settings.max_response_tokens or max_response_tokens,
            stop_ids=stop_ids,
        )
        self.plain = Sampling(temperature=training_temperature, max_tokens=max_response_tokens, stop_ids=stop_ids)

    def run(self, step: int, actor: Actor, keep: Mapping[str, Generations] | None = None) -> Evaluation:
        """Evaluates the weights that were pushed last. The samples' seeds are the same at every step.

        keep: where the generations of each benchmark are kept; those that are there already are not sampled again.

        Entropy, and the log-prob gap that proves the push, are measured on samples of their own, drawn as in training: the
        evaluation's may be sharpened or cut.
        """
        self.phases.sample()
        result: dict[str, Any] = {"step": step, "benchmarks": {}, "heldout_entropy": None}
        metrics: dict[str, float] = {}
        for name, problems in self.benchmarks.items():
            prompts = problems.prompts
            verdicts = self._verdicts(name, prompts, keep[name] if keep else None)
            scored = self._scored(prompts, verdicts)
            result["benchmarks"][name] = {**scored, "too_long": problems.too_long}
            metrics |= {f"eval/{name}/pass@{k}": value for k, value in scored["pass_at_k"].items()}
            if self.settings.greedy:
                accuracy = self._greedy_accuracy(prompts)
                result["benchmarks"][name]["greedy_accuracy"] = metrics[f"eval/{name}/greedy_accuracy"] = accuracy
        drawn = self.draw_heldout()
        self.phases.inspect()
        heldout = actor.measure_samples(drawn)
        result["heldout_entropy"] = metrics["heldout/entropy"] = heldout["policy/entropy"]
        for name in ("mean", "max"):
            result[f"logprob_gap_{name}"] = metrics[f"heldout/logprob_gap_{name}"] = heldout[f"rollout/logprob_gap_{name}"]
        return Evaluation(result, metrics)

    def _verdicts(self, name: str, prompts: Sequence[Prompt], kept: Generations | None) -> list[list[Verdict]]:
        """The verdicts of each problem's samples; with `kept`, from what is there already and part by part to it."""
        samples, writes = self.settings.samples, distributed.rank() == 0
        done: list[list[Verdict]] = distributed.broadcast_object(kept.verdicts() if kept and writes else [])
        part = max(1, self.settings.part_samples // samples) if kept else len(prompts)
        if done and writes:
            print(f"{name}: going on after {len(done)} of {len(prompts)} problems kept", flush=True)
        for first in range(len(done), len(prompts), part):
            some = prompts[first : first + part]
            trajectories = self.rollouts.generate(some, step=0, samples=samples, sampling=self.sampling, purpose="eval")
            verdicts = grade_shared(trajectories, some, self.graders, self.reward.truncated)
            done += [verdicts[start : start + samples] for start in range(0, len(verdicts), samples)]
            if kept and writes:
                kept.append(some, trajectories, verdicts, first)
                print(f"{name}: {len(done)} of {len(prompts)} problems", flush=True)
        return done

    def draw_heldout(self) -> list[Trajectory]:
        """`entropy_samples` responses to each benchmark's problems from the weights that were pushed last, drawn as in training."""
        self.phases.sample()
        samples = self.settings.entropy_samples
        return [
            trajectory
            for problems in self.benchmarks.values()
            for trajectory in self.rollouts.generate(problems.prompts, step=0, samples=samples, sampling=self.plain, purpose="heldout")
        ]

    def _greedy_accuracy(self, prompts: Sequence[Prompt]) -> float:
        """The share of problems that one response of temperature 0 solves; one without a verdict does not."""
        greedy = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=-1)
        trajectories = self.rollouts.generate(prompts, step=0, samples=1, sampling=greedy, purpose="eval")
        verdicts = grade_shared(trajectories, prompts, self.graders, self.reward.truncated)
        return sum(verdict.outcome is Outcome.CORRECT for verdict in verdicts) / len(verdicts)

    def _scored(self, prompts: Sequence[Prompt], verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
        """The benchmark's entry in the result, on every rank; rank 0 forms it."""
        result: dict[str, Any] | None = None
        if distributed.rank() == 0:
            same = same_by_math_verify(self.graders) if self.reward.grader == "math_verify" else None
            result = benchmark_result(prompts, verdicts, count_votes(verdicts, same))
        formed: dict[str, Any] = distributed.broadcast_object(result)
        return formed
