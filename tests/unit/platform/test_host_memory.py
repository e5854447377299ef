"""Tensors whose memory is given away for a while: freed when it should be, and bit for bit what they were afterwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.platform.host_memory import HostMemory, is_present, require_present, storage_key


@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
    seed=st.integers(0, 99),
    rounds=st.integers(1, 3),
)
def test_every_bit_survives_and_the_memory_is_free_in_between(sizes: list[int], dtype: torch.dtype, seed: int, rounds: int) -> None:
    generator, memory = torch.Generator().manual_seed(seed), HostMemory()
    # any bits at all: numbers that are none, with their payloads, and negative zeros among them
    raw = [torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=generator) for size in sizes]
    tensors = [bits.clone().view(dtype) for bits in raw]
    for _ in range(rounds):
        memory.take(tensors)
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0] * len(sizes)
        assert not any(map(is_present, tensors)) and [len(tensor) for tensor in tensors] == sizes
        memory.give_back()
        assert all(torch.equal(tensor.view(torch.uint8), bits) for tensor, bits in zip(tensors, raw, strict=True))


def test_views_of_one_memory_stay_views_of_it() -> None:
    whole = torch.arange(12.0)
    parts, memory = [whole[:4].view(2, 2), whole[6:]], HostMemory()
    memory.take(parts)
    assert not is_present(whole) and storage_key(parts[0]) == storage_key(whole)
    memory.give_back()
    parts[0].zero_()
    assert whole.tolist() == [0, 0, 0, 0, 4, 5, 6, 7, 8, 9, 10, 11] and parts[1][0] == 6


def test_what_was_written_in_between_rounds_counts() -> None:
    tensor, memory = torch.zeros(3), HostMemory()
    for value in (1.0, 2.0):
        tensor.fill_(value)
        memory.take([tensor])
        memory.take([tensor])  # a second call must not keep the freed memory for the values
        memory.give_back()
        memory.give_back()
        assert tensor.tolist() == [value] * 3


def test_what_is_away_is_named_before_it_is_read() -> None:
    tensor, memory = torch.ones(3), HostMemory()
    require_present([tensor], "weights")
    memory.take([tensor])
    with pytest.raises(RuntimeError, match=r"weights are not on the device \(training\.offload\)"):
        require_present([torch.ones(1), tensor], "weights")
