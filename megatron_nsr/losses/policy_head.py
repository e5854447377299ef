"""The LM head and the policy loss as one layer: hidden states and a vocabulary shard in, log-prob, entropy and loss out.

May import: the rest of losses. Three variants behind one function; the objective decides which of them runs: the gradient formed in
the forward pass (3 matrix products), logits recomputed (4) for an objective's own loss, and measuring only (1).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_nsr.losses.gradient_in_forward import GradientInForward
from megatron_nsr.losses.head_tensors import HeadInputs, HeadOptions, HeadOutputs
from megatron_nsr.losses.recompute import LinearLogprob, distributions
from megatron_nsr.losses.shard import VocabularyShard
from megatron_nsr.losses.terms import LossTerms, regularized

__all__ = ["HeadInputs", "HeadOptions", "HeadOutputs", "policy_head"]


def policy_head(
    hidden: Float[Tensor, "part hidden"],
    weight: Float[Tensor, "vocab_shard hidden"],
    inputs: HeadInputs,
    shard: VocabularyShard,
    terms: LossTerms,
    options: HeadOptions | None = None,
) -> HeadOutputs:
    """Runs the head over a packed micro-batch of float32, float64 or bfloat16 hidden states.

    hidden: all tokens, or with `shard.sequence_parallel` this rank's part of them; its gradient is complete, already summed over the
    ranks that share the vocabulary. The gradient of `weight` goes into `weight.main_grad` where that exists (in the forward pass, if
    the loss is one of `terms`). Log-probs, entropy and losses are float32, or float64 for float64 inputs.

    Raises ValueError where `terms` needs a tensor that `inputs` lacks, and where tensors do not fit one another.
    """
    options = options or HeadOptions()
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: the head multiplies equal types")
    inputs.check_lengths(len(hidden) * (shard.ranks if shard.sequence_parallel else 1))
    if not inputs.trains:
        return _measured(hidden, weight, inputs, shard, options)
    inputs.check(terms)
    if not torch.is_grad_enabled():  # an autograd function cannot see that in its forward pass, and would add to main_grad
        hidden, weight = hidden.detach(), weight.detach()
    if inputs.own_loss is not None:
        return _with_own_loss(hidden, weight, inputs, shard, terms, options)
    return HeadOutputs(*GradientInForward.apply(hidden, weight, inputs, shard, terms, options))


def _measured(hidden: Tensor, weight: Tensor, inputs: HeadInputs, shard: VocabularyShard, options: HeadOptions) -> HeadOutputs:
    softmax = distributions(hidden, weight, inputs.targets, inputs.rows, shard, options, entropy=inputs.measure_entropy)
    zeros = torch.zeros_like(softmax.logprob)
    return HeadOutputs(zeros.new_zeros(()), softmax.logprob, softmax.entropy, zeros, zeros.bool())


def _with_own_loss(
    hidden: Tensor, weight: Tensor, inputs: HeadInputs, shard: VocabularyShard, terms: LossTerms, options: HeadOptions
) -> HeadOutputs:
    assert inputs.own_loss is not None and inputs.scale is not None
    logprobs, entropy = LinearLogprob.apply(hidden, weight, inputs.targets, inputs.rows, shard, options)
    policy_loss = inputs.own_loss(logprobs, entropy)
    if policy_loss.shape != logprobs.shape:
        raise ValueError(f"token_loss gave a tensor of shape {tuple(policy_loss.shape)}, not one loss a token, {tuple(logprobs.shape)}")
    losses = inputs.scale * regularized(policy_loss, logprobs, entropy, inputs.reference_logprobs, terms)
    kept = inputs.scale > 0
    if inputs.rows is not None:
        kept = kept & torch.zeros_like(kept).index_fill(0, inputs.rows, True)
    losses = torch.where(kept, losses, torch.zeros_like(losses))
    return HeadOutputs(losses.sum() * inputs.gradient_scale, logprobs.detach(), entropy.detach(), losses.detach(), clipped=None)
