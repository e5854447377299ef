"""Kernel: what a shard of logits says about each row's softmax, in one pass.

May import: losses.triton_launch.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from megatron_nsr.losses.triton_launch import LAUNCH, check_logits

# Columns that a program holds at once, 32 a thread: each tile ends in reductions over the program, so few and large ones.
_TILE = 8192


def statistics(
    logits: Float[Tensor, "rows columns"], targets: Int[Tensor, "rows"], inverse_temperature: float, *, entropy: bool
) -> Float[Tensor, "4 rows"]:
    """(maximum m, sum exp(z - m), sum exp(z - m) (z - m), target's z) of z = logits * inverse_temperature.

    logits: float32, rows of any stride. targets: columns of this shard; the target of a row that points elsewhere is -inf. Without
    `entropy` the third is 0. A row without columns has maximum and target -inf and zeros. Raises TypeError on other dtypes.
    """
    check_logits(logits)
    rows, columns = logits.shape
    packed = logits.new_empty(4, rows)
    statistics_kernel[(rows,)](
        logits, targets.contiguous(), packed, rows, columns, logits.stride(0), inverse_temperature, entropy, _TILE, **LAUNCH
    )
    return packed


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["targets"])
@no_type_check
def statistics_kernel(
    logits, targets, packed, rows, columns, row_stride, inverse_temperature, ENTROPY: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Online softmax: when the maximum moves from m to m', with f = exp(m - m'), S becomes f S and U becomes f (U + (m - m') S)."""
    row = tl.program_id(0).to(tl.int64)  # a chunk may hold more than 2^31 logits
    logits += row * row_stride
    maximum = float("-inf")
    total = 0.0
    centred = 0.0
    for start in range(0, columns, TILE):
        column = start + tl.arange(0, TILE)
        real = column < columns
        z = tl.load(logits + column, mask=real, other=float("-inf")) * inverse_temperature
        moved = tl.maximum(maximum, tl.max(z, 0))
        shift = tl.where(maximum == float("-inf"), 0.0, maximum - moved)  # before the first tile all sums are 0
        factor = tl.exp(shift)
        exponent = z - moved
        weights = tl.exp(exponent)
        if ENTROPY:
            products = tl.where(real, weights * exponent, 0.0)  # beyond the row it is 0 * -inf
            centred = factor * (centred + shift * total) + tl.sum(products, 0)
        total = factor * total + tl.sum(weights, 0)
        maximum = moved
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < columns)
    picked = tl.load(logits + target, mask=inside, other=float("-inf")) * inverse_temperature
    tl.store(packed + row, maximum)
    tl.store(packed + rows + row, total)
    tl.store(packed + 2 * rows + row, centred)
    tl.store(packed + 3 * rows + row, picked)
