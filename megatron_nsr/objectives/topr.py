"""TOPR, tapered off-policy REINFORCE (arXiv 2503.14286): the importance ratio is truncated otherwise for each sign.

May import: types, objectives.objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_nsr.objectives.objective import SampleWeights
from megatron_nsr.types import TrainBatch


@dataclass(frozen=True, slots=True)
class TaperedReinforce:
    """Gradient of a response y: w clip(pi(y) / mu(y), low, high) grad log pi(y), with w = +1 if correct and -1 if wrong.

    mu is the engine that sampled y, pi(y) the product over its tokens, and the clipped ratio a constant. `positive` and `negative`
    are (low, high) for correct and for wrong responses. Published are (1, 1), so that correct ones count fully however unlikely they
    are, and (0, 1), so that a wrong one counts less the less likely it became.
    """

    positive: tuple[float, float]
    negative: tuple[float, float]

    def weigh(self, rewards: Float[Tensor, "prompts samples"], judged: Bool[Tensor, "prompts samples"]) -> SampleWeights:
        return SampleWeights(torch.where(judged, rewards, torch.zeros_like(rewards)), judged)

    def token_loss(self, logprobs: Float[Tensor, "tokens"], entropy: Float[Tensor, "tokens"], batch: TrainBatch) -> Float[Tensor, "tokens"]:
        """-w clip(ratio) log pi of each token: the ratio is that of its whole response."""
        lengths = batch.cu_seqlens.diff()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        drift = torch.where(batch.response_mask, logprobs.detach() - batch.rollout_logprobs, 0.0)
        log_ratio = drift.new_zeros(len(lengths)).index_add(0, sequence, drift)[sequence]
        ratio = log_ratio.exp()  # may be infinite: what is truncated is not
        truncated = torch.where(batch.weights > 0, ratio.clamp(*self.positive), ratio.clamp(*self.negative))
        return -batch.weights * truncated * logprobs
