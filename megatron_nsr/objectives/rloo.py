"""RLOO (arXiv 2402.14740): REINFORCE with a leave-one-out baseline. May import: the rest of objectives."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from megatron_nsr.objectives.groups import centred, kept_where_needed
from megatron_nsr.objectives.objective import SampleWeights


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """A_i = r_i - mean of the other judged samples of the prompt = (r_i - mean of all n) n / (n - 1); 0 where there is no other."""

    regularized: bool

    def weigh(self, rewards: Float[Tensor, "prompts samples"], judged: Bool[Tensor, "prompts samples"]) -> SampleWeights:
        differences, count = centred(rewards, judged)
        return kept_where_needed(differences * count / (count - 1).clamp_min(1), judged, regularized=self.regularized)
