"""Group-relative advantages (GRPO, arXiv 2402.03300, equation 3 with outcome rewards).

May import: types, objectives.objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_nsr.objectives.objective import SampleWeights

# Below this spread a group's rewards are equal up to rounding: there is nothing to compare.
MIN_SPREAD = 1e-6


@dataclass(frozen=True, slots=True)
class GroupRelative:
    """(r - mean) / standard deviation (n - 1) over a prompt's samples that have a verdict; 0 where the spread is 0.

    carries_entropy: with an entropy bonus a group without spread still has a loss, so it is kept.
    """

    carries_entropy: bool

    def weigh(self, rewards: Float[Tensor, "prompts samples"], judged: Bool[Tensor, "prompts samples"]) -> SampleWeights:
        mask = judged.to(rewards.dtype)
        count = mask.sum(1, keepdim=True)
        centred = (rewards - (rewards * mask).sum(1, keepdim=True) / count.clamp_min(1)) * mask
        spread = (centred.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
        advantages = torch.where(spread > MIN_SPREAD, centred / spread.clamp_min(MIN_SPREAD), torch.zeros_like(centred))
        kept = judged if self.carries_entropy else judged & (advantages != 0)
        return SampleWeights(advantages, kept)
