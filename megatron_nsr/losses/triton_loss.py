"""Kernel: each row's distribution from all shards' statistics, its loss, and the loss's derivatives, in one launch.

May import: losses.shard, losses.terms.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from megatron_nsr.losses.shard import Distribution
from megatron_nsr.losses.terms import MAX_LOG_RATIO, LossTerms, TokenInputs, TokenTerms

_BLOCK = 128  # rows a program
# Compiled once, not again for each way these happen to be aligned.
_TOKENS = ["weights", "scales", "old_logprobs", "reference_logprobs", "rollout_logprobs"]
_LARGEST = tl.constexpr(MAX_LOG_RATIO)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_EVERY_NAN = tl.constexpr(tl.PropagateNan.ALL)  # a bound must not turn "no number" into one


def loss_terms(gathered: Float[Tensor, "shards 4 rows"], tokens: TokenInputs, terms: LossTerms) -> tuple[Distribution, TokenTerms]:
    """`shard.merge` and `terms.token_terms` of float32 statistics; what `terms` leaves out is compiled away."""
    shards, _, rows = gathered.shape
    vectors = gathered.new_empty(7 if terms.entropy_coefficient else 6, rows)
    clipped = torch.empty(rows, dtype=torch.bool, device=gathered.device)
    loss_kernel[(triton.cdiv(rows, _BLOCK),)](
        gathered.contiguous(), vectors, clipped, _fp32(tokens.weights), _fp32(tokens.scale), _fp32(tokens.old_logprobs),
        _fp32(tokens.reference_logprobs), _fp32(tokens.rollout_logprobs), rows, 1.0 - terms.eps_low, 1.0 + terms.eps_high,
        terms.dual_clip, terms.entropy_coefficient or None, terms.kl_coefficient or None, terms.correction_cap,
        shards, terms.form, _BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    maximum, log_total, logprob, entropy, loss, grad_logprob, *rest = vectors.unbind(0)
    return Distribution(maximum, log_total, logprob, entropy), TokenTerms(loss, grad_logprob, rest[0] if rest else None, clipped)


def _fp32(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to(torch.float32).contiguous()


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=_TOKENS)
@no_type_check
def loss_kernel(
    gathered, vectors, clipped, weights, scales, old_logprobs, reference_logprobs, rollout_logprobs, rows,
    low, high, dual_clip, entropy_coefficient, kl_coefficient, correction_cap,
    SHARDS: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A coefficient or tensor that is None is off. vectors: maximum, log_total, logprob, entropy, loss and its derivatives by the two."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = row < rows
    maximum, log_total, logprob, entropy = _merged(gathered, row, rows, SHARDS, BLOCK)
    weight = tl.load(weights + row, mask=real, other=0.0)
    old = logprob
    if old_logprobs is not None:
        old = tl.load(old_logprobs + row, mask=real, other=0.0)
    if correction_cap is not None:
        drift = tl.exp(_bounded(old - tl.load(rollout_logprobs + row, mask=real, other=0.0)))
        weight = weight * tl.minimum(drift, correction_cap, propagate_nan=_EVERY_NAN)
    loss, grad_logprob, stopped = _signed_term(logprob, old, weight, low, high, dual_clip, FORM)
    if kl_coefficient is not None:
        distance = tl.load(reference_logprobs + row, mask=real, other=0.0) - logprob
        bounded = _bounded(distance)
        excess = _expm1(bounded)
        loss += kl_coefficient * (excess - bounded)
        grad_logprob -= kl_coefficient * excess * (distance == bounded).to(tl.float32)
    if entropy_coefficient is not None:
        loss -= entropy_coefficient * entropy
    scale = tl.load(scales + row, mask=real, other=0.0)
    kept = scale > 0
    tl.store(vectors + row, maximum, mask=real)
    tl.store(vectors + rows + row, log_total, mask=real)
    tl.store(vectors + 2 * rows + row, logprob, mask=real)
    tl.store(vectors + 3 * rows + row, entropy, mask=real)
    tl.store(vectors + 4 * rows + row, tl.where(kept, scale * loss, 0.0), mask=real)
    tl.store(vectors + 5 * rows + row, tl.where(kept, scale * grad_logprob, 0.0), mask=real)
    if entropy_coefficient is not None:
        tl.store(vectors + 6 * rows + row, tl.where(kept, -entropy_coefficient * scale, 0.0), mask=real)
    tl.store(clipped + row, stopped & kept, mask=real)


@triton.jit
@no_type_check
def _merged(gathered, row, rows, SHARDS: tl.constexpr, BLOCK: tl.constexpr):
    """shard.merge: centred on the maximum over all shards."""
    real = row < rows
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    target = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    centred = tl.zeros([BLOCK], tl.float32)
    for shard in tl.static_range(SHARDS):
        part = gathered + shard * 4 * rows + row
        maximum = tl.maximum(maximum, tl.load(part, mask=real, other=0.0), propagate_nan=_EVERY_NAN)
        target = tl.maximum(target, tl.load(part + 3 * rows, mask=real, other=0.0), propagate_nan=_EVERY_NAN)
    for shard in tl.static_range(SHARDS):
        part = gathered + shard * 4 * rows + row
        shift = tl.load(part, mask=real, other=0.0) - maximum
        shift = tl.maximum(shift, _LOWEST, propagate_nan=_EVERY_NAN)  # -inf * 0 of a shard of padding only is no number
        factor = tl.exp(shift)
        shard_total = tl.load(part + rows, mask=real, other=1.0)
        total += factor * shard_total
        centred += factor * (tl.load(part + 2 * rows, mask=real, other=0.0) + shift * shard_total)
    log_total = tl.log(total)
    return maximum, log_total, target - maximum - log_total, log_total - centred / total


@triton.jit
@no_type_check
def _signed_term(logprob, old, weight, low, high, dual_clip, FORM: tl.constexpr):
    """Loss, derivative by the log-prob and clip flag of the term with the signed weight, before `scale`."""
    if FORM == "reinforce":
        loss = -weight * logprob
        grad = -weight
        clipped = tl.zeros_like(weight).to(tl.int1)
    elif FORM == "probability":
        loss = -weight * tl.exp(logprob)
        grad = loss
        clipped = tl.zeros_like(weight).to(tl.int1)
    else:
        log_ratio = logprob - old
        bounded = _bounded(log_ratio)
        ratio = tl.exp(bounded)
        positive = weight >= 0
        bound = tl.where(positive, high, low)
        clipped = tl.where(positive, ratio > bound, ratio < bound)
        counted = tl.where(clipped, bound, ratio)
        if dual_clip is not None:
            beyond = (weight < 0) & (ratio > dual_clip)
            counted = tl.where(beyond, dual_clip, counted)
            clipped = clipped | beyond
        loss = -weight * counted
        grad = tl.where(clipped | (bounded != log_ratio), 0.0, -weight * ratio)
        clipped = clipped & (weight != 0)
    return loss, grad, clipped


@triton.jit
@no_type_check
def _bounded(log_ratio):
    return tl.clamp(log_ratio, -_LARGEST, _LARGEST, propagate_nan=_EVERY_NAN)


@triton.jit
@no_type_check
def _expm1(x):
    """exp(x) - 1: near 0, where the subtraction cancels, by Taylor's series, whose rest is below 2e-8 of it up to 1/2."""
    series = 1.0 + x / 8
    series = 1.0 + x / 7 * series
    series = 1.0 + x / 6 * series
    series = 1.0 + x / 5 * series
    series = 1.0 + x / 4 * series
    series = 1.0 + x / 3 * series
    series = 1.0 + x / 2 * series
    return tl.where(tl.abs(x) <= 0.5, x * series, tl.exp(x) - 1.0)
