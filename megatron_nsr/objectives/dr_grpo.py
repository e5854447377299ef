"""Dr. GRPO (arXiv 2503.20783, section 3.2): GRPO without its two normalisations. May import: the rest of objectives."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from megatron_nsr.objectives.groups import centred, kept_where_needed
from megatron_nsr.objectives.objective import SampleWeights


@dataclass(frozen=True, slots=True)
class GroupCentred:
    """A = r - mean over a prompt's samples that have a verdict: no division by their standard deviation.

    The other normalisation, by a response's length, is left out by objective.aggregation=budget_mean.
    """

    regularized: bool

    def weigh(self, rewards: Float[Tensor, "prompts samples"], judged: Bool[Tensor, "prompts samples"]) -> SampleWeights:
        advantages, _ = centred(rewards, judged)
        return kept_where_needed(advantages, judged, regularized=self.regularized)
