"""An objective with a loss of its own: NSR by the ratio of whole responses (GSPO's ratio, arXiv 2507.18071, equations 5 to 7).

    megatron-nsr train configs/quickstart.yaml objective.name=examples.own_objective:SequenceRatio run.dir=runs/sequence_ratio

A response's ratio is exp(mean over its tokens of log pi - log pi_old). It depends on all of them, so the gradient of one token is not
known when its logits are: the head computes them again in the backward pass. Nothing else of the run changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_nsr.objectives.objective import SampleWeights
from megatron_nsr.types import TrainBatch

# The ratio of a whole response, a geometric mean, moves far less than a token's: the paper's clip range.
EPS_LOW, EPS_HIGH = 3e-4, 4e-4


class SequenceRatio:
    """Wrong responses count -1, correct ones are dropped, as in NSR."""

    def weigh(self, rewards: Tensor, judged: Tensor) -> SampleWeights:
        wrong = judged & (rewards < 0)
        return SampleWeights(-wrong.to(rewards.dtype), wrong)

    def token_loss(self, logprobs: Tensor, entropy: Tensor, batch: TrainBatch) -> Tensor:
        """The loss of a response, once for each of its tokens: `batch.scale` makes a mean of them."""
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        log_ratio = torch.where(batch.response_mask, logprobs - old, 0.0)
        lengths = batch.cu_seqlens.diff()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        tokens = torch.zeros(len(lengths), device=logprobs.device).index_add(0, sequence, batch.response_mask.float())
        total = torch.zeros(len(lengths), device=logprobs.device).index_add(0, sequence, log_ratio)
        ratio = (total / tokens.clamp_min(1)).exp()[sequence]
        return -torch.minimum(ratio * batch.weights, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * batch.weights)
