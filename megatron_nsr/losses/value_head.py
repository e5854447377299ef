"""The critic's head and its clipped loss: hidden states in, a value a token and the loss of the response tokens out.

May import: the rest of losses, torch.distributed. As in the policy's head prompts cost nothing, values are fp32, and aggregation and
denominator are in `scale`. The weight is one row, which every tensor-parallel rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_nsr.losses.products import HeadWeight, accumulation_dtype
from megatron_nsr.losses.weight_gradient import WeightGradient


@dataclass(frozen=True, slots=True)
class ValueInputs:
    """One micro-batch. Without `returns` the head only measures: no loss.

    rows: the tokens that have a value, ascending; the others have zeros in every output.
    gradient_scale: multiplies the returned loss.
    """

    rows: Int[Tensor, "rows"]
    returns: Float[Tensor, "tokens"] | None = None
    old_values: Float[Tensor, "tokens"] | None = None  # for the clip
    scale: Float[Tensor, "tokens"] | None = None  # of each token in the loss; 0 masks it
    clip: float | None = None  # None: no clip
    gradient_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ValueOutputs:
    """All [tokens]; `loss` is the sum to call backward on, times gradient_scale; the rest is detached.

    clipped: whether the loss is that of the clipped value.
    """

    loss: Float[Tensor, ""]
    values: Float[Tensor, "tokens"]
    token_loss: Float[Tensor, "tokens"]
    clipped: Bool[Tensor, "tokens"]


def value_head(
    hidden: Float[Tensor, "part hidden"], weight: Float[Tensor, "1 hidden"], inputs: ValueInputs, group: dist.ProcessGroup | None = None
) -> ValueOutputs:
    """Runs the head over a packed micro-batch of float32, float64 or bfloat16 hidden states.

    group: with sequence parallelism the ranks that each hold a part of the tokens, in rank order; they all form the whole loss, and the
    weight's gradient is then the part of this rank's tokens, to be summed over the ranks. Otherwise None: each rank holds all tokens.
    """
    values = LinearValue.apply(hidden, weight, inputs.rows, group)
    if inputs.returns is None:
        zeros = torch.zeros_like(values.detach())
        return ValueOutputs(zeros.sum(), values.detach(), zeros, zeros.bool())
    assert inputs.old_values is not None and inputs.scale is not None, "a loss needs old_values and scale beside returns"
    losses, clipped = value_losses(values, inputs.old_values, inputs.returns, inputs.clip)
    losses = torch.where(inputs.scale > 0, inputs.scale * losses, torch.zeros_like(losses))
    return ValueOutputs(losses.sum() * inputs.gradient_scale, values.detach(), losses.detach(), clipped & (inputs.scale > 0))


def value_losses(
    values: Float[Tensor, "tokens"], old_values: Float[Tensor, "tokens"], returns: Float[Tensor, "tokens"], clip: float | None
) -> tuple[Float[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
    """(loss, whether the clipped value made it) of each token before `scale`, differentiable in the values:

        0.5 max((V - R)^2, (V_clipped - R)^2)        V_clipped = V_old + clip(V - V_old, -clip, clip)

    so a value that has moved by more than `clip` towards its return gets no gradient (J. Schulman et al., the reference implementation
    of arXiv 1707.06347, where the policy's ratio is clipped likewise).
    """
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    bounded = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    clipped = bounded > plain
    return 0.5 * torch.where(clipped, bounded, plain), clipped


class LinearValue(torch.autograd.Function):
    """(hidden, weight, rows, group) -> values [tokens], zeros outside `rows`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        start = len(hidden) * (0 if group is None else dist.get_rank(group))
        mine = rows[(rows >= start) & (rows < start + len(hidden))] - start
        values = torch.zeros(len(hidden), dtype=accumulation_dtype(hidden), device=hidden.device)
        values[mine] = HeadWeight(weight).logits(hidden[mine])[:, 0]
        ctx.save_for_backward(hidden, weight, mine)
        ctx.start = start
        return values if group is None else _joined(values, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, mine = ctx.saved_tensors
        head, d_weight = HeadWeight(weight), WeightGradient(weight)
        gradient = grads[0][ctx.start + mine, None].to(hidden.dtype)
        d_hidden = torch.zeros_like(hidden)
        d_hidden[mine] = head.d_hidden(gradient)
        head.add_d_weight(d_weight.total, gradient, hidden[mine])
        return d_hidden, d_weight.for_autograd(), None, None


def _joined(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = part.new_empty(dist.get_world_size(group) * len(part))
    dist.all_gather_into_tensor(whole, part, group=group)
    return whole
