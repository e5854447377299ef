"""How the head walks over a micro-batch, and how much of it is alive at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.losses import torch_rows
from megatron_nsr.losses.chunks import ChunkedHead, default_chunk, row_operations
from megatron_nsr.losses.head_tensors import HeadOptions
from megatron_nsr.losses.shard import VocabularyShard


@given(tokens=st.integers(0, 40), chunk=st.integers(1, 50), data=st.data())
def test_every_token_is_in_one_chunk(tokens: int, chunk: int, data: st.DataObject) -> None:
    head = ChunkedHead(torch.zeros(3, 2), VocabularyShard(0, 3), HeadOptions(chunk=chunk))
    some = data.draw(st.none() | st.lists(st.integers(0, max(0, tokens - 1)), unique=True, max_size=tokens).map(sorted))
    rows = None if some is None else torch.tensor(some, dtype=torch.int64)
    parts = [torch.arange(tokens)[part] for part in head.chunks(tokens, rows)]
    assert [int(x) for part in parts for x in part] == (list(range(tokens)) if some is None else some)
    assert all(0 < len(part) <= chunk for part in parts)


@given(vocab_shard=st.integers(0, 300_000), device=st.sampled_from(["cpu", "cuda"]))
def test_a_chunks_logits_fill_a_bounded_workspace(vocab_shard: int, device: str) -> None:
    chunk = default_chunk(vocab_shard, torch.device(device))
    assert chunk % 64 == 0 and 64 <= chunk <= 8192
    budget = (640 if device == "cuda" else 32) * 2**20
    assert 4 * vocab_shard * chunk <= budget or chunk == 64


def test_the_chunk_follows_the_padded_shard_so_that_ranks_agree() -> None:
    weight = torch.zeros(100_000, 1)
    first, last = (ChunkedHead(weight, VocabularyShard(start, 100_007), HeadOptions()) for start in (0, 100_000))
    assert (first.real, last.real) == (100_000, 7)
    assert first.chunk == last.chunk


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_cpu_takes_torch_operations(kernels: str) -> None:
    assert row_operations(torch.device("cpu"), kernels) is torch_rows
