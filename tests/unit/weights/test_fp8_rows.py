"""The rounding of rollouts in FP8: near, exact where e4m3 is, and each row by itself."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.weights.fp8_rows import is_rounded, largest_of_rows, rounded_rows


@given(st.integers(1, 9), st.integers(1, 40), st.integers(-30, 10), st.integers(0, 5))
def test_rows_are_rounded_by_themselves_and_by_no_more_than_e4m3_errs(rows: int, columns: int, exponent: int, seed: int) -> None:
    matrix = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent).bfloat16()
    rounded = rounded_rows(matrix, largest_of_rows(matrix))
    # half a unit of three mantissa bits, or of the smallest number below the normal ones (2**-9 of a scale of 1)
    allowed = torch.maximum(matrix.abs().float() * 2.0**-4, largest_of_rows(matrix).clamp_min(1 / 512) / 448 * 2.0**-10)
    assert ((rounded - matrix.float()).abs() <= allowed * 1.001).all()
    each = [rounded_rows(row[None], largest_of_rows(row[None])) for row in matrix]
    assert torch.equal(torch.cat(each), rounded)


def test_a_part_of_a_row_is_rounded_like_the_whole_by_the_whole_row_s_largest() -> None:
    matrix = torch.randn(5, 32).bfloat16()
    whole, largest = rounded_rows(matrix, largest_of_rows(matrix)), largest_of_rows(matrix)
    assert torch.equal(torch.cat([rounded_rows(part, largest) for part in matrix.split(8, dim=1)], dim=1), whole)


def test_zeros_stay_zero() -> None:
    assert not rounded_rows(torch.zeros(2, 3), torch.zeros(2, 1)).any()


def test_linear_layers_alone_are_rounded() -> None:
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight", "model.norm.weight"]
    assert [name for name in names if is_rounded(name)] == names[:1]
