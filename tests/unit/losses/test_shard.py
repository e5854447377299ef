"""A vocabulary cut into shards has the softmax of the whole one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.losses.shard import VocabularyShard, merge
from megatron_nsr.losses.torch_rows import statistics


def merged(logits: torch.Tensor, targets: torch.Tensor, cuts: list[int]):
    """The distribution from the statistics of the columns between `cuts`."""
    bounds = [0, *sorted(cuts), logits.shape[1]]
    return merge(torch.stack([statistics(logits[:, start:end], targets - start, 1.0, entropy=True) for start, end in pairwise(bounds)]))


@settings(max_examples=100)
@given(seed=st.integers(0, 10_000), vocab=st.integers(1, 40), spread=st.sampled_from([1.0, 30.0, 1000.0]), data=st.data())
def test_shards_of_any_size_merge_into_the_whole_softmax(seed: int, vocab: int, spread: float, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, vocab), max_size=4))  # equal cuts: shards without a real row
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(7, vocab, generator=generator).double()
    targets = torch.randint(vocab, (7,), generator=generator)
    log_p = torch.log_softmax(logits, -1)
    softmax = merged(logits, targets, cuts)
    torch.testing.assert_close(softmax.logprob, log_p.gather(1, targets[:, None])[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(softmax.entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-11, atol=1e-11)
    assert torch.equal(softmax.maximum, logits.amax(-1))
    torch.testing.assert_close(softmax.maximum + softmax.log_total, logits.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_shards_far_apart_merge_without_overflow() -> None:
    logits = torch.tensor([[-150.0, 3e4, -150.0, -149.0], [-3e4, -3e4, -3e4, -3e4]])
    softmax = merged(logits, torch.tensor([0, 2]), [1, 2, 2, 3])
    assert softmax.logprob.tolist() == pytest.approx([-30150.0, -torch.tensor(4.0).log().item()], rel=1e-6)
    assert softmax.entropy.tolist() == pytest.approx([0.0, torch.tensor(4.0).log().item()], rel=1e-6)


def test_a_part_of_a_distribution_keeps_its_rows() -> None:
    logits = torch.randn(5, 9).double()
    softmax = merged(logits, torch.arange(5), [4])
    part = softmax.part(torch.tensor([1, 3]))
    for name in ("maximum", "log_total", "logprob", "entropy"):
        assert torch.equal(getattr(part, name), getattr(softmax, name)[[1, 3]])


@pytest.mark.parametrize(("start", "rows", "real"), [(0, 8, 8), (8, 8, 5), (13, 8, 0), (16, 8, 0)])
def test_rows_beyond_the_vocabulary_are_padding(start: int, rows: int, real: int) -> None:
    assert VocabularyShard(start, 13).real_rows(rows) == real


def test_alone_a_rank_has_nothing_to_gather_or_sum() -> None:
    shard, values = VocabularyShard(0, 13, sequence_parallel=True), torch.randn(4, 3)
    before = values.clone()
    assert shard.ranks == 1
    for got in (shard.all_tokens(values), shard.sum_over_ranks(values), shard.reduce_to_tokens(values), shard.gather_statistics(values)[0]):
        assert torch.equal(got, before)
