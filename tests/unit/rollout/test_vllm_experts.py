"""Reading back experts that an engine has packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.rollout.vllm_experts import unpacked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(experts=st.integers(1, 3), rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_whatever_packing_moves_is_moved_back(dtype: torch.dtype, experts: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows * columns, generator=generator)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(1)[:, order].view(tensor.shape)

    original = torch.randn(experts, rows, columns, generator=generator).to(dtype)
    assert torch.equal(unpacked(pack(original), pack), original)
