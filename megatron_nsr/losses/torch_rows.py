"""What happens to a chunk of logits between the matrix products, by torch operations on any device.

May import: losses.shard, losses.terms. `triton_rows` has the same three functions as kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_nsr.losses.shard import Distribution, merge
from megatron_nsr.losses.terms import LossTerms, TokenInputs, TokenTerms, token_terms

# On a CPU the passes over a block of rows find it in the cache: 2 MiB of fp32 logits, measured best between 1 and 4.
_CPU_BLOCK = 2**19


def statistics(
    logits: Float[Tensor, "rows columns"], targets: Int[Tensor, "rows"], inverse_temperature: float, *, entropy: bool
) -> Float[Tensor, "4 rows"]:
    """(maximum m, sum exp(z - m), sum exp(z - m) (z - m), target's z) of z = logits * inverse_temperature.

    targets: columns of this shard; the target of a row that points elsewhere is -inf. Without `entropy` the third is 0.
    """
    rows, columns = logits.shape
    packed = logits.new_zeros(4, rows)
    maximum, total, centred, target = packed.unbind(0)
    if columns == 0:  # a shard of padding only
        maximum.fill_(-torch.inf), target.fill_(-torch.inf)
        return packed
    inside, column = _columns(logits, targets)
    picked = logits.gather(1, column[:, None])[:, 0] * inverse_temperature
    target.copy_(picked.where(inside, -torch.inf))
    for block in _blocks(logits):
        exponent = logits[block] * inverse_temperature if inverse_temperature != 1 else logits[block]
        maximum[block] = exponent.amax(-1)
        exponent = exponent - maximum[block, None]
        weights = exponent.exp()
        total[block] = weights.sum(-1)
        if entropy:
            centred[block] = torch.linalg.vecdot(weights, exponent)
    return packed


def loss_terms(gathered: Float[Tensor, "shards 4 rows"], tokens: TokenInputs, terms: LossTerms) -> tuple[Distribution, TokenTerms]:
    """Joins the shards' statistics and takes the loss and its derivatives from them."""
    softmax = merge(gathered)
    return softmax, token_terms(softmax.logprob, softmax.entropy, tokens, terms)


def d_logits(
    logits: Float[Tensor, "rows columns"],
    softmax: Distribution,
    targets: Int[Tensor, "rows"],
    grad_logprob: Float[Tensor, "rows"],
    grad_entropy: Float[Tensor, "rows"] | None,
    inverse_temperature: float,
    out: Float[Tensor, "rows columns"],
) -> Float[Tensor, "rows columns"]:
    """The gradient of the logits, written to `out`, which may be `logits` itself.

    dL/dz_v = g_logp (1[v=y] - p_v) - g_H p_v (log p_v + H), times inverse_temperature.
    """
    grad_logprob = grad_logprob * inverse_temperature
    grad_entropy = None if grad_entropy is None else grad_entropy * inverse_temperature
    if logits.shape[1] == 0:
        return out
    inside, column = _columns(logits, targets)
    at_target = torch.where(inside, grad_logprob, torch.zeros_like(grad_logprob))
    for block in _blocks(logits):
        exponent = logits[block] * inverse_temperature if inverse_temperature != 1 else logits[block]
        log_p = (exponent - softmax.maximum[block, None]).sub_(softmax.log_total[block, None])
        p = log_p.exp()
        factor = grad_logprob[block, None]
        if grad_entropy is not None:
            factor = log_p.add_(softmax.entropy[block, None]).mul_(grad_entropy[block, None]).add_(factor)
        gradient = p.mul_(factor).neg_()
        gradient.scatter_add_(1, column[block, None], at_target[block, None])
        out[block] = gradient  # rounded to out's dtype once, after all is summed
    return out


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows, columns = logits.shape
    size = max(1, rows if logits.is_cuda else _CPU_BLOCK // columns)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _columns(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a row's target is a column of this shard, and a column that is safe to index."""
    columns = logits.shape[1]
    return (targets >= 0) & (targets < columns), targets.clamp(0, columns - 1)
