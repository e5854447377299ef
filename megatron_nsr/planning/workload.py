"""What a step has to do: sequences, their lengths and the passes over them, from a config and an assumption on lengths.

May import: config, planning.layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_nsr.config import Config
from megatron_nsr.planning.layout import Layout
from megatron_nsr.types import UserError

ONE_SIGN_KEPT = 0.5  # of the samples, where an objective trains on one sign only: half the answers are correct
PROMPT_SHARE, RESPONSE_SHARE, RESPONSE_SPREAD = 1 / 4, 1 / 3, 0.7  # of the budgets, and of the mean, where nothing is said


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and response tokens. Responses are lognormal with this mean and this standard deviation over the mean, cut at `cap`."""

    prompt_mean: float
    response_mean: float
    response_spread: float
    cap: int

    @property
    def sequence_mean(self) -> float:
        return self.prompt_mean + self.response_mean


@dataclass(frozen=True, slots=True)
class Workload:
    """One training step. kept: share of the samples that train. critic_mini_batches: updates of PPO's critic, 0 where there is none."""

    prompts: int
    samples: int
    mini_batches: int
    kept: float
    lengths: Lengths
    old_logprobs: bool
    reference: bool
    critic_mini_batches: int

    @property
    def critic(self) -> bool:
        return self.critic_mini_batches > 0

    @property
    def packings(self) -> int:
        """Parts of the samples that are packed by themselves: the critic's mini-batches cut the policy's."""
        return max(self.mini_batches, self.critic_mini_batches)

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    @property
    def tokens(self) -> float:
        """Of all sequences, prompts included."""
        return self.sequences * self.lengths.sequence_mean

    @property
    def kept_tokens(self) -> float:
        return self.tokens * self.kept

    @property
    def response_share(self) -> float:
        """Of a sequence's tokens those that the head computes."""
        return self.lengths.response_mean / self.lengths.sequence_mean


def lengths_of(config: Config, *, prompt_mean: float | None, response_mean: float | None, response_spread: float | None) -> Lengths:
    """Raises UserError for a mean that the budget does not allow."""
    cap = config.rollout.max_response_tokens
    response = response_mean if response_mean is not None else max(1.0, cap * RESPONSE_SHARE)
    prompt = prompt_mean if prompt_mean is not None else max(1.0, config.data.max_prompt_tokens * PROMPT_SHARE)
    for option, value, name, budget in (
        ("--response-mean", response, "rollout.max_response_tokens", cap),
        ("--prompt-mean", prompt, "data.max_prompt_tokens", config.data.max_prompt_tokens),
    ):
        if not 1 <= value <= budget:
            raise UserError(f"{option} {value:g}: give 1 to {name}={budget}")
    return Lengths(prompt, response, RESPONSE_SPREAD if response_spread is None else response_spread, cap)


def workload_of(config: Config, lengths: Lengths) -> Workload:
    objective, supervised = config.objective, config.objective.name == "supervised"
    mini_batches = 1 if supervised else config.data.prompts_per_step // objective.mini_batch_prompts
    critic_prompts = config.critic.mini_batch_prompts or objective.mini_batch_prompts
    critic_mini_batches = config.data.prompts_per_step // critic_prompts if objective.name == "ppo" else 0
    return Workload(
        prompts=config.data.prompts_per_step,
        samples=1 if supervised else config.rollout.samples_per_prompt,
        mini_batches=mini_batches,
        kept=ONE_SIGN_KEPT if objective.name in ("psr", "nsr") else 1.0,
        lengths=lengths,
        # PPO's rewards hold the distance to the reference; packed for the critic, a step of several parts is scored too.
        old_logprobs=max(mini_batches, critic_mini_batches) > 1 or (critic_mini_batches > 0 and objective.kl_coefficient > 0),
        reference=objective.kl_coefficient > 0,
        critic_mini_batches=critic_mini_batches,
    )


def micro_batches(workload: Workload, layout: Layout) -> int:
    """Of one packing on one data-parallel rank. An interleaved schedule wants a multiple of the stages."""
    tokens = workload.kept_tokens / workload.packings / layout.data
    count = max(1, math.ceil(tokens / layout.micro_batch_tokens))
    return count + (-count % layout.pipeline if layout.virtual_pipeline > 1 else 0)
