"""The LM head and the policy loss as one layer: hidden states and a vocabulary shard in, log-prob, entropy and loss out.

May import: types, the rest of losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_nsr.losses.linear_logprob import VocabularyShard, linear_logprob
from megatron_nsr.losses.terms import LossTerms, token_loss


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What the head needs beside hidden states. Without `weights` it only measures: no loss, no gradient."""

    targets: Int[Tensor, "tokens"]
    weights: Float[Tensor, "tokens"] | None = None  # signed
    scale: Float[Tensor, "tokens"] | None = None  # of each token in the loss; 0 masks it
    old_logprobs: Float[Tensor, "tokens"] | None = None  # None: on-policy
    gradient_scale: float = 1.0  # multiplies the returned loss: micro-batches and data-parallel ranks are averaged later


@dataclass(frozen=True, slots=True)
class HeadOutputs:
    """All [tokens]; `loss` is the sum to call backward on, times gradient_scale; the rest is detached."""

    loss: Float[Tensor, ""]
    logprobs: Float[Tensor, "tokens"]
    entropy: Float[Tensor, "tokens"]
    token_loss: Float[Tensor, "tokens"]
    clipped: Bool[Tensor, "tokens"]


def policy_head(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab_shard hidden"],
    inputs: HeadInputs,
    shard: VocabularyShard,
    terms: LossTerms,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> HeadOutputs:
    """Runs the head over a packed micro-batch.

    hidden may need a gradient; the one it gets is this shard's part, to be summed over `shard.group` by the caller.
    """
    if inputs.weights is None or inputs.scale is None:
        with torch.no_grad():
            logprobs, entropy = linear_logprob(hidden, weight, inputs.targets, shard, temperature=temperature, chunk=chunk)
        zeros = torch.zeros_like(logprobs)
        return HeadOutputs(zeros.sum(), logprobs, entropy, zeros, zeros.bool())
    logprobs, entropy = linear_logprob(hidden, weight, inputs.targets, shard, temperature=temperature, chunk=chunk)
    losses, clipped = token_loss(logprobs, entropy, inputs.old_logprobs, inputs.weights, inputs.scale, terms)
    return HeadOutputs(losses.sum() * inputs.gradient_scale, logprobs.detach(), entropy.detach(), losses.detach(), clipped)
