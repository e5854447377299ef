"""What group-relative objectives share: sums over a prompt's judged samples, and which of them are kept.

May import: objectives.objective.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from megatron_nsr.objectives.objective import SampleWeights


def centred(
    rewards: Float[Tensor, "prompts samples"], judged: Bool[Tensor, "prompts samples"]
) -> tuple[Float[Tensor, "prompts samples"], Float[Tensor, "prompts 1"]]:
    """(r - mean of the prompt's judged samples, 0 where not judged; their number)."""
    mask = judged.to(rewards.dtype)
    count = mask.sum(1, keepdim=True)
    mean = (rewards * mask).sum(1, keepdim=True) / count.clamp_min(1)
    return (rewards - mean) * mask, count


def kept_where_needed(
    advantages: Float[Tensor, "prompts samples"], judged: Bool[Tensor, "prompts samples"], *, regularized: bool
) -> SampleWeights:
    """Without an entropy bonus or a KL term (`regularized`) a sample of advantage 0 has no loss and is dropped."""
    return SampleWeights(advantages, judged if regularized else judged & (advantages != 0))
