"""The per-token policy loss and its gradient in closed form: formulas on [tokens] vectors, no model, no process group.

May import: types. Sources: arXiv 2506.01347, sections 2 and D.1; PPO's clip, arXiv 1707.06347; dual clip, arXiv 1912.09729;
k3, J. Schulman, "Approximating KL divergence" (2020); truncated importance sampling between engine and policy, F. Yao et al., "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Keeps exp() finite, of ratios and of the KL term. Where w > 0 the clip's bound acts long before. Where w < 0 the clip has no upper
# bound: this alone (or dual_clip) bounds the loss, and a ratio beyond e^20 gets no gradient without counting as clipped.
MAX_LOG_RATIO = 20.0

Form = Literal["clipped", "reinforce", "probability"]


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What the loss of a token with signed weight w and probability pi consists of; a coefficient of zero costs nothing.

    form: clipped `-min(rho w, clip(rho, 1 - eps_low, 1 + eps_high) w)` with rho = pi / pi_old; reinforce `-w log pi`; probability
    `-w pi` (the paper's equation 6). eps_high acts on positive weights only, eps_low and dual_clip on negative ones only.
    """

    form: Form = "clipped"
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None  # above 1: where w < 0 the ratio counts no more than this
    entropy_coefficient: float = 0.0
    kl_coefficient: float = 0.0  # of k3, e^d - d - 1 with d = log pi_ref - log pi
    correction_cap: float | None = None  # w is multiplied by min(pi_old / pi_rollout, cap)

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"form={self.form!r} is none of {', '.join(get_args(Form))}")


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What is known of each token before the forward pass."""

    weights: Float[Tensor, "tokens"]  # signed
    scale: Float[Tensor, "tokens"]  # of the token in the loss; 0 masks it, whatever its log-prob is
    old_logprobs: Float[Tensor, "tokens"] | None = None  # None: on-policy, the ratio is 1 with the gradient of the log-prob
    reference_logprobs: Float[Tensor, "tokens"] | None = None  # for the KL term
    rollout_logprobs: Float[Tensor, "tokens"] | None = None  # for the correction


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """The loss of each token, its gradient, and whether the clip took its gradient away."""

    loss: Float[Tensor, "tokens"]
    grad_logprob: Float[Tensor, "tokens"]
    grad_entropy: Float[Tensor, "tokens"] | None  # None without an entropy bonus
    clipped: Bool[Tensor, "tokens"]


def token_terms(logprobs: Float[Tensor, "tokens"], entropy: Float[Tensor, "tokens"], tokens: TokenInputs, terms: LossTerms) -> TokenTerms:
    """`scale (policy loss - c_H H + c_KL k3)` and its derivatives by log-prob and entropy.

    The entropy bonus and the KL term are not multiplied by w, so lambda leaves them alone.
    """
    loss, grad, clipped = _policy_terms(logprobs, tokens, terms)
    loss = regularized(loss, logprobs, entropy, tokens.reference_logprobs, terms)
    if terms.kl_coefficient:
        assert tokens.reference_logprobs is not None, "a KL term needs reference_logprobs"
        distance, bounded = _kl_distance(logprobs, tokens.reference_logprobs)
        grad = grad - terms.kl_coefficient * bounded.expm1() * (distance == bounded)
    kept = tokens.scale > 0
    zero = torch.zeros_like(loss)
    return TokenTerms(
        torch.where(kept, tokens.scale * loss, zero),
        torch.where(kept, tokens.scale * grad, zero),
        torch.where(kept, -terms.entropy_coefficient * tokens.scale, zero) if terms.entropy_coefficient else None,
        clipped & kept,
    )


def regularized(
    loss: Float[Tensor, "tokens"],
    logprobs: Float[Tensor, "tokens"],
    entropy: Float[Tensor, "tokens"],
    reference_logprobs: Float[Tensor, "tokens"] | None,
    terms: LossTerms,
) -> Float[Tensor, "tokens"]:
    """`loss - c_H H + c_KL k3`, differentiable."""
    if terms.kl_coefficient:
        assert reference_logprobs is not None, "a KL term needs reference_logprobs"
        loss = loss + terms.kl_coefficient * k3(logprobs, reference_logprobs)
    if terms.entropy_coefficient:
        loss = loss - terms.entropy_coefficient * entropy
    return loss


def k3(logprobs: Float[Tensor, "tokens"], reference_logprobs: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """e^d - d - 1 with d = log pi_ref - log pi: an estimate of KL(pi || pi_ref) at tokens drawn from pi; never negative."""
    _, bounded = _kl_distance(logprobs, reference_logprobs)
    return bounded.expm1() - bounded


def _kl_distance(logprobs: Tensor, reference_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    distance = reference_logprobs - logprobs
    return distance, distance.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _policy_terms(logprobs: Tensor, tokens: TokenInputs, terms: LossTerms) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, derivative by the log-prob and clip flag of the signed term alone, before `scale`."""
    old = logprobs if tokens.old_logprobs is None else tokens.old_logprobs
    weights = tokens.weights.to(logprobs.dtype)
    if terms.correction_cap is not None:
        assert tokens.rollout_logprobs is not None, "a rollout correction needs rollout_logprobs"
        drift = (old - tokens.rollout_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        weights = weights * drift.exp().clamp(max=terms.correction_cap)
    unclipped = torch.zeros_like(logprobs, dtype=torch.bool)
    if terms.form == "reinforce":
        return -weights * logprobs, -weights, unclipped
    if terms.form == "probability":
        loss = -weights * logprobs.exp()
        return loss, loss, unclipped
    return _clipped_terms(logprobs - old, weights, terms)


def _clipped_terms(log_ratio: Tensor, weights: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor, Tensor]:
    """For w > 0 the loss is `-w min(rho, 1 + eps_high)`, for w < 0 `-w max(rho, 1 - eps_low)`: each sign meets one bound."""
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = bounded.exp()
    positive = weights >= 0
    bound = torch.where(positive, ratio.new_tensor(1.0 + terms.eps_high), ratio.new_tensor(1.0 - terms.eps_low))
    clipped = torch.where(positive, ratio > bound, ratio < bound)
    counted = torch.where(clipped, bound, ratio)
    if terms.dual_clip is not None:
        beyond = ~positive & (ratio > terms.dual_clip)
        counted = torch.where(beyond, ratio.new_tensor(terms.dual_clip), counted)
        clipped = clipped | beyond
    flows = ~clipped & (bounded == log_ratio)
    return -weights * counted, torch.where(flows, -weights * ratio, torch.zeros_like(ratio)), clipped & (weights != 0)
