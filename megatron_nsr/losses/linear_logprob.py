"""LM head to log-prob and entropy in chunks of tokens over a vocabulary shard; no [tokens, vocabulary] tensor exists.

May import: types. The backward pass recomputes each chunk's logits (4 GEMMs); the gradient of the logits z is
`dL/dz_v = g_logp (1[v=y] - p_v) - g_H p_v (log p_v + H)` with p the softmax and H the entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """Which rows of the LM head this rank holds: global rows start ... start + len(weight), of which those below `size` are real."""

    start: int
    size: int
    group: dist.ProcessGroup | None = None

    def real_rows(self, rows: int) -> int:
        """How many of this shard's rows are real; the rest pads the vocabulary to a multiple of the ranks."""
        return max(0, min(rows, self.size - self.start))


class LinearLogprob(torch.autograd.Function):
    """(hidden, weight, targets) -> (log-prob [tokens], entropy [tokens]), fp32 (float64 for float64 inputs).

    The gradient of `hidden` is this shard's part of it: whoever split the vocabulary sums it over the group.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, temperature: float, chunk: int) -> Any:
        real = weight[: shard.real_rows(len(weight))]
        accumulate = _accumulation_dtype(hidden)
        lse = hidden.new_empty(len(hidden), dtype=accumulate)
        target_logit, entropy = torch.empty_like(lse), torch.empty_like(lse)
        for rows in _chunks(len(hidden), chunk):
            logits = _logits(hidden[rows], real, temperature)
            lse[rows], target_logit[rows], entropy[rows] = _statistics(logits, targets[rows], shard)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.shard, ctx.temperature, ctx.chunk = shard, temperature, chunk
        return target_logit - lse, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_logprob, grad_entropy = grads
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        shard = ctx.shard
        real = weight[: shard.real_rows(len(weight))]
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=lse.dtype)
        for rows in _chunks(len(hidden), ctx.chunk):
            log_p = _logits(hidden[rows], real, ctx.temperature).sub_(lse[rows, None])
            d_logits = log_p.exp()
            log_p.add_(entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(grad_logprob[rows, None])
            d_logits.mul_(log_p.neg_())
            _add_at_targets(d_logits, targets[rows], grad_logprob[rows], shard.start)
            d_logits = d_logits.div_(ctx.temperature).to(hidden.dtype)
            torch.mm(d_logits, real, out=d_hidden[rows])
            d_weight[: len(real)] += _matmul(d_logits.t(), hidden[rows])
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None


def linear_logprob(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab_shard hidden"],
    targets: Int[Tensor, "tokens"],
    shard: VocabularyShard,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"]]:
    """Log-prob of each target and entropy of each distribution, of the softmax over logits / temperature."""
    return LinearLogprob.apply(hidden, weight, targets, shard, temperature, chunk)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in fp32: log-probs are never taken from logits rounded to bf16."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = _matmul(hidden, weight.t())
    return logits if temperature == 1.0 else logits.div_(temperature)


def _statistics(logits: Tensor, targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, target logit and entropy over all shards of the vocabulary; overwrites `logits`.

    Entropy is log S - U / S with S = sum exp(z - m) and U = sum exp(z - m) (z - m): centred on the maximum m, so that
    an offset common to all logits costs no precision.
    """
    rows, columns = logits.shape
    if columns == 0:  # a shard of padding only
        maximum, total, centred, target = logits.new_full((4, rows), -torch.inf).unbind(0)
        total, centred = torch.zeros_like(total), torch.zeros_like(centred)
    else:
        local = targets - shard.start
        inside = (local >= 0) & (local < columns)
        target = logits.gather(1, local.clamp(0, columns - 1)[:, None])[:, 0].where(inside, -torch.inf)
        maximum = logits.amax(-1)
        exponent = logits.sub_(maximum[:, None])
        weights = exponent.exp()
        total, centred = weights.sum(-1), torch.linalg.vecdot(weights, exponent)
    return _merge(maximum, total, centred, target, shard.group)


def _merge(
    maximum: Tensor, total: Tensor, centred: Tensor, target: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Joins the shards' statistics with one packed all-gather of four numbers a token."""
    if group is not None and dist.get_world_size(group) > 1:
        packed = torch.stack((maximum, total, centred, target))
        gathered = packed.new_empty(dist.get_world_size(group) * 4, packed.shape[1])
        dist.all_gather_into_tensor(gathered, packed, group=group)
        maxima, totals, centreds, candidates = gathered.view(-1, 4, packed.shape[1]).unbind(1)
        maximum = maxima.amax(0)
        shift = (maxima - maximum).clamp_min(torch.finfo(packed.dtype).min)  # -inf * 0 of a padding-only shard is no number
        factor = shift.exp()
        total = (factor * totals).sum(0)
        centred = (factor * (centreds + shift * totals)).sum(0)
        target = candidates.amax(0)
    log_total = total.log()
    return maximum + log_total, target, log_total - centred / total


def _add_at_targets(d_logits: Tensor, targets: Tensor, grad_logprob: Tensor, start: int) -> None:
    local = targets - start
    rows = ((local >= 0) & (local < d_logits.shape[1])).nonzero()[:, 0]
    d_logits[rows, local[rows]] += grad_logprob[rows]
