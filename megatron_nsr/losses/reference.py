"""The policy head written plainly in float64 with materialised logits: what the tests hold everything against.

May import: types, the rest of losses (only their data classes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_nsr.losses.head_tensors import HeadInputs
from megatron_nsr.losses.terms import LossTerms


def reference_loss(hidden: Tensor, weight: Tensor, inputs: HeadInputs, terms: LossTerms, temperature: float = 1.0) -> dict[str, Tensor]:
    """Loss, log-probs and entropy of the whole vocabulary [vocab, hidden] in float64, by autograd-friendly operations."""
    assert inputs.weights is not None and inputs.scale is not None
    log_p = torch.log_softmax(hidden.double() @ weight.double().t() / temperature, -1)
    logprobs = log_p.gather(1, inputs.targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    losses = _policy_loss(logprobs, inputs, terms) - terms.entropy_coefficient * entropy
    if terms.kl_coefficient:
        assert inputs.reference_logprobs is not None
        distance = inputs.reference_logprobs.double() - logprobs
        losses = losses + terms.kl_coefficient * (distance.exp() - distance - 1)
    losses = inputs.scale.double() * losses
    return {"loss": losses.sum() * inputs.gradient_scale, "losses": losses, "logprobs": logprobs, "entropy": entropy}


def _policy_loss(logprobs: Tensor, inputs: HeadInputs, terms: LossTerms) -> Tensor:
    """The signed term as the papers write it, by minima and clamps."""
    assert inputs.weights is not None
    weights = inputs.weights.double()
    old = logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs.double()
    if terms.correction_cap is not None:
        assert inputs.rollout_logprobs is not None
        weights = weights * (old - inputs.rollout_logprobs.double()).exp().clamp(max=terms.correction_cap)
    if terms.form == "reinforce":
        return -weights * logprobs
    if terms.form == "probability":
        return -weights * logprobs.exp()
    ratio = (logprobs - old).exp()
    surrogate = torch.minimum(ratio * weights, ratio.clamp(1 - terms.eps_low, 1 + terms.eps_high) * weights)
    if terms.dual_clip is not None:
        surrogate = torch.where(weights < 0, torch.maximum(surrogate, terms.dual_clip * weights), surrogate)
    return -surrogate
