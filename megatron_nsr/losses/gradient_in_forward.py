"""The head with its loss, at three matrix products: the gradient is formed while a chunk of logits is alive.

May import: the rest of losses. The weights of the loss are known before the forward pass, so the gradient of the logits is too once
their softmax is; a backward pass that recomputed the logits would add a fourth product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_nsr.losses.chunks import ChunkedHead, Rows
from megatron_nsr.losses.head_tensors import HeadInputs, HeadOptions, HeadOutputs
from megatron_nsr.losses.products import accumulation_dtype
from megatron_nsr.losses.shard import VocabularyShard
from megatron_nsr.losses.terms import LossTerms
from megatron_nsr.losses.weight_gradient import WeightGradient

_TOLERANCE = 1e-5  # of the loss's gradient against loss_gradient: what fp32 makes of 1 / micro-batches


class GradientInForward(torch.autograd.Function):
    """(hidden, weight) -> HeadOutputs as a tuple, of which only the loss has a gradient, once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, inputs: HeadInputs, shard: VocabularyShard, terms: LossTerms, options: HeadOptions
    ) -> tuple[Tensor | None, ...]:
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError("the policy head must not run inside a recomputed (checkpointed) region: its gradient would be added twice")
        states = shard.all_tokens(hidden)
        head = _TrainingHead(weight, shard, options, states, inputs, terms, ctx.needs_input_grad[:2])
        for rows in head.chunks(len(states), inputs.rows):
            head.add_chunk(rows)
        outputs = head.outputs
        outputs.loss.copy_(outputs.token_loss.sum() * inputs.gradient_scale)
        ctx.d_hidden = None if head.d_hidden is None else shard.reduce_to_tokens(head.d_hidden)
        ctx.d_weight, ctx.loss_gradient, ctx.spent = head.d_weight, inputs.loss_gradient, False
        ctx.mark_non_differentiable(*(x for x in outputs.astuple()[1:] if x is not None))
        return outputs.astuple()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> Any:
        if ctx.spent:
            raise RuntimeError("the policy head's gradient was formed in its forward pass and can be taken once only")
        expected = ctx.loss_gradient
        # Asynchronous: on CUDA no step waits for it.
        torch._assert_async(
            (grad_loss - expected).abs() <= _TOLERANCE * abs(expected),
            f"the loss's gradient is not loss_gradient={expected}, with which the policy head formed its gradient in the forward pass",
        )
        d_hidden, d_weight = ctx.d_hidden, None if ctx.d_weight is None else ctx.d_weight.for_autograd()
        ctx.spent, ctx.d_hidden, ctx.d_weight = True, None, None
        return d_hidden, d_weight, None, None, None, None


class _TrainingHead(ChunkedHead):
    """Fills the outputs and sums both gradients, a chunk at a time."""

    def __init__(
        self,
        weight: Tensor,
        shard: VocabularyShard,
        options: HeadOptions,
        states: Tensor,
        inputs: HeadInputs,
        terms: LossTerms,
        wanted: tuple[bool, bool],
    ) -> None:
        super().__init__(weight, shard, options)
        self.states, self.inputs, self.terms = states, inputs, terms
        self.factor = inputs.gradient_scale * inputs.loss_gradient
        self.outputs = HeadOutputs.zeros(len(states), accumulation_dtype(states), states.device, sign_norms=inputs.sign_norms)
        assert self.outputs.clipped is not None
        self.clipped: Tensor = self.outputs.clipped
        self.d_hidden = torch.zeros_like(states) if wanted[0] else None
        self.d_weight = WeightGradient(weight) if wanted[1] else None

    def add_chunk(self, rows: Rows) -> None:
        """Logits, loss and gradient of some tokens."""
        outputs, inputs, states, targets = self.outputs, self.inputs, self.states[rows], self.inputs.targets[rows]
        logits = self.logits(states)
        entropy = inputs.measure_entropy or self.terms.entropy_coefficient > 0
        gathered = self.statistics(logits, targets, entropy=entropy)
        softmax, token = self.path.loss_terms(gathered, inputs.tokens(rows), self.terms)
        outputs.logprobs[rows] = softmax.logprob
        if entropy:
            outputs.entropy[rows] = softmax.entropy
        outputs.token_loss[rows], self.clipped[rows] = token.loss, token.clipped
        if self.d_hidden is None and self.d_weight is None and outputs.input_grad_sq is None:
            return
        grad_logprob = token.grad_logprob * self.factor
        grad_entropy = None if token.grad_entropy is None else token.grad_entropy * self.factor
        buffer = self.gradient_buffer(logits, states)
        if outputs.input_grad_sq is not None and grad_entropy is not None:
            spare = torch.empty_like(buffer) if buffer is logits else buffer
            main = self.d_logits(logits, softmax, targets, (grad_logprob, None), spare)
            outputs.input_grad_sq[rows] = self._norm_sq(self.weight.d_hidden(main))
        gradient = self.d_logits(logits, softmax, targets, (grad_logprob, grad_entropy), buffer)
        d_states = self.weight.d_hidden(gradient)
        if outputs.input_grad_sq is not None and grad_entropy is None:
            outputs.input_grad_sq[rows] = self._norm_sq(d_states)
        if self.d_hidden is not None:
            self.d_hidden[rows] = d_states
        if self.d_weight is not None:
            self.weight.add_d_weight(self.d_weight.total[: self.real], gradient, states)

    def _norm_sq(self, part: Tensor) -> Tensor:
        """Squared norms of the tokens' gradients, whole and of the loss itself, from this shard's scaled part of them."""
        dtype = self.outputs.logprobs.dtype
        whole = self.shard.sum_over_ranks(part.to(dtype, copy=self.shard.ranks > 1))
        return (whole / self.factor).square().sum(-1)
