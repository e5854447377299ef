"""The head as log-prob and entropy with gradients of their own: logits are recomputed in the backward pass (four products).

May import: the rest of losses.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_nsr.losses.chunks import ChunkedHead
from megatron_nsr.losses.head_tensors import HeadOptions
from megatron_nsr.losses.products import accumulation_dtype
from megatron_nsr.losses.shard import Distribution, VocabularyShard, merge
from megatron_nsr.losses.weight_gradient import WeightGradient


class LinearLogprob(torch.autograd.Function):
    """(hidden, weight, targets, rows) -> (log-prob [tokens], entropy [tokens]), zeros outside `rows`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, shard: VocabularyShard, options: HeadOptions
    ) -> tuple[Tensor, Tensor]:
        softmax = distributions(hidden, weight, targets, rows, shard, options)
        ctx.save_for_backward(hidden, weight, targets, softmax.maximum, softmax.log_total, softmax.logprob, softmax.entropy)
        ctx.rows, ctx.shard, ctx.options = rows, shard, options
        return softmax.logprob, softmax.entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, targets, *vectors = ctx.saved_tensors
        softmax, shard = Distribution(*vectors), ctx.shard
        head = ChunkedHead(weight, shard, ctx.options)
        states = shard.all_tokens(hidden)
        d_hidden = torch.zeros_like(states) if ctx.needs_input_grad[0] else None
        d_weight = WeightGradient(weight) if ctx.needs_input_grad[1] else None
        for rows in head.chunks(len(states), ctx.rows):
            logits = head.logits(states[rows])
            buffer = head.gradient_buffer(logits, states)
            gradient = head.d_logits(logits, softmax.part(rows), targets[rows], (grads[0][rows], grads[1][rows]), buffer)
            if d_hidden is not None:
                d_hidden[rows] = head.weight.d_hidden(gradient)
            if d_weight is not None:
                head.weight.add_d_weight(d_weight.total[: head.real], gradient, states[rows])
        d_hidden = None if d_hidden is None else shard.reduce_to_tokens(d_hidden)
        return d_hidden, None if d_weight is None else d_weight.for_autograd(), None, None, None, None


def distributions(
    hidden: Float[Tensor, "part hidden"],
    weight: Float[Tensor, "vocab_shard hidden"],
    targets: Int[Tensor, "tokens"],
    rows: Int[Tensor, "rows"] | None,
    shard: VocabularyShard,
    options: HeadOptions,
    *,
    entropy: bool = True,
) -> Distribution:
    """The softmax of every token in `rows`, without a gradient; zeros elsewhere. One matrix product."""
    head = ChunkedHead(weight, shard, options)
    states = shard.all_tokens(hidden.detach())
    filled = Distribution(*torch.zeros(4, len(states), dtype=accumulation_dtype(states), device=states.device))
    for chunk in head.chunks(len(states), rows):
        softmax = merge(head.statistics(head.logits(states[chunk]), targets[chunk], entropy=entropy))
        filled.maximum[chunk], filled.log_total[chunk] = softmax.maximum, softmax.log_total
        filled.logprob[chunk] = softmax.logprob
        if entropy:
            filled.entropy[chunk] = softmax.entropy
    return filled
