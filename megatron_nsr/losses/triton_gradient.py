"""Kernel: the gradient of a shard of logits from its softmax, in a second pass over the rows.

May import: losses.shard, losses.triton_launch.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from megatron_nsr.losses.shard import Distribution
from megatron_nsr.losses.triton_launch import LAUNCH, check_logits

_TILE = 4096  # columns that a program holds at once, 16 a thread
# One number a row is read of each: to compile again for each way they happen to be aligned would gain nothing.
_VECTORS = ["targets", "maxima", "log_totals", "entropies", "grads_logprob", "grads_entropy"]


def d_logits(
    logits: Float[Tensor, "rows columns"],
    softmax: Distribution,
    targets: Int[Tensor, "rows"],
    grad_logprob: Float[Tensor, "rows"],
    grad_entropy: Float[Tensor, "rows"] | None,
    inverse_temperature: float,
    out: Float[Tensor, "rows columns"],
) -> Float[Tensor, "rows columns"]:
    """The gradient of the logits, written to `out`: `logits` itself, or a buffer of another dtype, to which it is rounded once.

    dL/dz_v = g_logp (1[v=y] - p_v) - g_H p_v (log p_v + H), times inverse_temperature. Raises TypeError unless logits are float32.
    """
    check_logits(logits)
    rows, columns = logits.shape
    gradient_kernel[(rows,)](
        logits, out, targets.contiguous(), softmax.maximum, softmax.log_total, softmax.entropy, grad_logprob.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(), columns, logits.stride(0), out.stride(0), inverse_temperature,
        _TILE, **LAUNCH,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize_on_alignment=_VECTORS)
@no_type_check
def gradient_kernel(
    logits, out, targets, maxima, log_totals, entropies, grads_logprob, grads_entropy,
    columns, row_stride, out_stride, inverse_temperature, TILE: tl.constexpr,
):  # fmt: skip
    """A tile is read whole before it is written, so that `out` may be `logits`; a missing grads_entropy is compiled away."""
    row = tl.program_id(0).to(tl.int64)  # a chunk may hold more than 2^31 logits
    logits += row * row_stride
    out += row * out_stride
    target = tl.load(targets + row)
    maximum = tl.load(maxima + row)
    log_total = tl.load(log_totals + row)
    grad_logprob = tl.load(grads_logprob + row) * inverse_temperature
    if grads_entropy is not None:
        entropy = tl.load(entropies + row)
        grad_entropy = tl.load(grads_entropy + row) * inverse_temperature
    for start in range(0, columns, TILE):
        column = start + tl.arange(0, TILE)
        real = column < columns
        z = tl.load(logits + column, mask=real, other=0.0) * inverse_temperature
        log_p = z - maximum - log_total  # never z - (maximum + log_total): an offset common to all logits would cost precision
        factor = grad_logprob
        if grads_entropy is not None:
            factor += grad_entropy * (log_p + entropy)
        gradient = tl.where(column == target, grad_logprob, 0.0) - tl.exp(log_p) * factor
        tl.store(out + column, gradient, mask=real)
