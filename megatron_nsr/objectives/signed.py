"""Sign-decomposed objectives: PSR, NSR, W-REINFORCE and REINFORCE (arXiv 2506.01347, equations 3 to 5 and section 5).

May import: types, objectives.objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_nsr.objectives.objective import SampleWeights


@dataclass(frozen=True, slots=True)
class SignedObjective:
    """Weight `positive` on correct samples and `-negative` on wrong ones; a sign of weight 0 is dropped.

    PSR is (1, 0), NSR (0, 1), W-REINFORCE (lambda, 1), REINFORCE (1, 1). No baseline and no normalisation.
    """

    positive: float
    negative: float

    def weigh(self, rewards: Float[Tensor, "prompts samples"], judged: Bool[Tensor, "prompts samples"]) -> SampleWeights:
        weights = torch.where(rewards > 0, self.positive, -self.negative).to(rewards.dtype)
        weights = torch.where(judged, weights, torch.zeros_like(weights))
        return SampleWeights(weights, judged & (weights != 0))
