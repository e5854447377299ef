"""Group-relative advantages: GRPO (arXiv 2402.03300, equation 3 with outcome rewards) and DAPO (arXiv 2503.14476, equation 9).

May import: the rest of objectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_nsr.objectives.groups import centred, kept_where_needed
from megatron_nsr.objectives.objective import SampleWeights

# Below this spread a group's rewards are equal up to rounding: there is nothing to compare.
MIN_SPREAD = 1e-6


@dataclass(frozen=True, slots=True)
class GroupRelative:
    """A = (r - mean) / standard deviation (n - 1) over a prompt's samples that have a verdict; 0 where the spread is 0.

    What sets DAPO apart stands in the configuration: its clip range, token mean, dynamic sampling and masked truncated responses.
    """

    regularized: bool

    def weigh(self, rewards: Float[Tensor, "prompts samples"], judged: Bool[Tensor, "prompts samples"]) -> SampleWeights:
        differences, count = centred(rewards, judged)
        spread = (differences.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
        advantages = torch.where(spread > MIN_SPREAD, differences / spread.clamp_min(MIN_SPREAD), torch.zeros_like(differences))
        return kept_where_needed(advantages, judged, regularized=self.regularized)
