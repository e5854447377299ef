"""Rewards and values of tokens to advantages (PPO, arXiv 1707.06347, with GAE, arXiv 1506.02438).

May import: torch. Everything here is [tokens, samples]: responses stand in columns, from their first token down, zeros below the last.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Added to a variance that is divided by: a batch without spread has advantages of zero.
MIN_VARIANCE = 1e-8


def token_rewards(
    outcomes: Float[Tensor, "samples"], lengths: Int[Tensor, "samples"], penalties: Float[Tensor, "tokens samples"] | None = None
) -> Float[Tensor, "tokens samples"]:
    """A sample's outcome at its last response token, less a penalty of each token.

    penalties: such as a coefficient times log pi_old - log pi_ref, the KL term in the reward (arXiv 1909.08593, equation 2).
    """
    longest = int(lengths.max()) if len(lengths) else 0
    rewards = outcomes.new_zeros(longest, len(lengths)) if penalties is None else -penalties
    rewards[lengths - 1, torch.arange(len(lengths))] += outcomes
    return rewards


def generalized_advantages(
    rewards: Float[Tensor, "tokens samples"], values: Float[Tensor, "tokens samples"], gamma: float, lambda_: float
) -> Float[Tensor, "tokens samples"]:
    """A_t = delta_t + gamma lambda A_(t+1) with delta_t = r_t + gamma V_(t+1) - V_t; beyond the last token both are 0.

    `values` are of the states in which the tokens were chosen. Returns, the critic's targets, are advantages + values.
    """
    following = torch.cat([values[1:], torch.zeros_like(values[:1])])
    advantages = rewards + gamma * following - values
    for t in range(len(advantages) - 2, -1, -1):
        advantages[t] += gamma * lambda_ * advantages[t + 1]
    return advantages


def whitened(advantages: Tensor, mean: float, variance: float) -> Tensor:
    """The advantages less their batch's mean, over its standard deviation."""
    return (advantages - mean) / (variance + MIN_VARIANCE) ** 0.5
