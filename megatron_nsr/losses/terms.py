"""The per-token policy loss and its switches: formulas on [tokens] vectors, no model, no process group.

May import: types. Source: arXiv 2506.01347, sections 2 and D.1; PPO's clip, arXiv 1707.06347.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Keeps exp() finite. Where w > 0 the clip's bound acts long before. Where w < 0 the clip has no upper bound: this alone bounds the loss,
# and a ratio beyond e^20 gets no gradient without counting as clipped.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What the loss consists of. eps_high acts on positive weights only, eps_low on negative ones only."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    entropy_coefficient: float = 0.0


def clipped_policy_loss(
    logprobs: Float[Tensor, "tokens"],
    old_logprobs: Float[Tensor, "tokens"] | None,
    weights: Float[Tensor, "tokens"],
    terms: LossTerms,
) -> tuple[Float[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
    """`-min(rho w, clip(rho, 1 - eps_low, 1 + eps_high) w)` with rho = pi / pi_old, and where it has no gradient.

    For w > 0 that is `-w min(rho, 1 + eps_high)`, for w < 0 `-w max(rho, 1 - eps_low)`: each sign meets one bound.
    Without `old_logprobs` the sample is on-policy: rho is 1 with the gradient of the log-prob.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    positive = weights >= 0
    bound = torch.where(positive, ratio.new_tensor(1.0 + terms.eps_high), ratio.new_tensor(1.0 - terms.eps_low))
    clipped = torch.where(positive, ratio > bound, ratio < bound)
    return -weights * torch.where(clipped, bound, ratio), clipped & (weights != 0)


def token_loss(
    logprobs: Float[Tensor, "tokens"],
    entropy: Float[Tensor, "tokens"],
    old_logprobs: Float[Tensor, "tokens"] | None,
    weights: Float[Tensor, "tokens"],
    scale: Float[Tensor, "tokens"],
    terms: LossTerms,
) -> tuple[Float[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
    """`scale (clipped policy loss - c_H H)`: the entropy bonus is not multiplied by the weight, so lambda leaves it alone.

    scale is 0 for masked tokens, whatever their log-prob is.
    """
    loss, clipped = clipped_policy_loss(logprobs, old_logprobs, weights, terms)
    if terms.entropy_coefficient:
        loss = loss - terms.entropy_coefficient * entropy
    kept = scale > 0
    return torch.where(kept, scale * loss, torch.zeros_like(loss)), clipped & kept
