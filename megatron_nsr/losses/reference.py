"""The policy head written plainly in float64 with materialised logits: what the tests hold everything against.

May import: types, the rest of losses (only their data classes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_nsr.losses.policy_head import HeadInputs
from megatron_nsr.losses.terms import LossTerms


def reference_loss(hidden: Tensor, weight: Tensor, inputs: HeadInputs, terms: LossTerms, temperature: float = 1.0) -> dict[str, Tensor]:
    """Loss, log-probs and entropy of the whole vocabulary [vocab, hidden] in float64, by autograd-friendly operations."""
    assert inputs.weights is not None and inputs.scale is not None
    log_p = torch.log_softmax(hidden.double() @ weight.double().t() / temperature, -1)
    logprobs = log_p.gather(1, inputs.targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    old = logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs.double()
    ratio, weights = (logprobs - old).exp(), inputs.weights.double()
    surrogate = torch.minimum(ratio * weights, ratio.clamp(1 - terms.eps_low, 1 + terms.eps_high) * weights)
    losses = inputs.scale.double() * (-surrogate - terms.entropy_coefficient * entropy)
    return {"loss": losses.sum() * inputs.gradient_scale, "logprobs": logprobs, "entropy": entropy}
