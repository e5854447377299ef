"""Packing loses nothing, repeats nothing and stays within its budget."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

from megatron_nsr.training.packing import balance, context_order, pack, pack_micro_batches, sequence_tokens, split_by_budget
from megatron_nsr.types import Trajectory, WeightedSample

SIZES = st.lists(st.integers(1, 40), min_size=0, max_size=30)


def sample(length: int, start: int = 10) -> WeightedSample:
    ids = np.arange(start, start + length, dtype=np.int32)
    return WeightedSample(Trajectory(0, 0, (1, 2, 3), ids, -ids.astype(np.float32), "stop", 0), -0.5, 0.25)


def test_a_packed_sequence_is_inputs_against_shifted_targets() -> None:
    batch = pack([sample(2), sample(3, 20)], token_multiple=4)
    assert batch.tokens.tolist() == [1, 2, 3, 10, 1, 2, 3, 20, 21, 0, 0, 0]
    assert batch.targets.tolist() == [2, 3, 10, 11, 2, 3, 20, 21, 22, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.response_mask.tolist() == [False, False, True, True, False, False, True, True, True, False, False, False]
    assert batch.scale.tolist() == [0, 0, 0.25, 0.25, 0, 0, 0.25, 0.25, 0.25, 0, 0, 0]
    assert batch.rollout_logprobs.tolist() == [0, 0, -10, -11, 0, 0, -20, -21, -22, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 9, 12] and batch.max_seqlen == 5


@given(SIZES, st.integers(1, 6))
def test_balance_spreads_every_item_once_and_evenly(sizes: list[int], bins: int) -> None:
    contents = balance(sizes, bins)
    assert sorted(item for content in contents for item in content) == list(range(len(sizes)))
    totals = [sum(sizes[i] for i in content) for content in contents]
    assert max(totals) - min(totals) <= max(sizes, default=0)


@given(st.lists(SIZES, min_size=1, max_size=3), st.integers(1, 60), st.integers(1, 3))
def test_budget_holds_unless_one_sequence_alone_exceeds_it(lists: list[list[int]], budget: int, multiple: int) -> None:
    splits = split_by_budget(lists, budget, multiple)
    assert len(splits) == len(lists) and len({len(contents) for contents in splits}) == 1
    for sizes, contents in zip(lists, splits, strict=True):
        assert len(contents) % multiple == 0 and contents
        assert sorted(item for content in contents for item in content) == list(range(len(sizes)))
        assert all(len(content) <= 1 or sum(sizes[i] for i in content) <= budget for content in contents)


@given(SIZES, st.integers(1, 100), st.sampled_from([1, 16, 32]), st.integers(1, 3))
def test_what_fills_a_micro_batch_up_is_within_its_budget(sizes: list[int], budget: int, multiple: int, ranks: int) -> None:
    batches = pack_micro_batches([sample(size) for size in sizes], budget=budget, token_multiple=multiple, context_size=ranks)
    for batch in batches:
        assert len(batch.tokens) % (multiple * ranks) == 0
        sequences = int((batch.response_mask.int().diff() == 1).sum())  # a prompt lies before each response
        assert len(batch.tokens) <= max(budget, 2 * multiple * ranks) or sequences == 1
    assert sum(int(batch.response_mask.sum()) for batch in batches) == sum(sizes)


@given(SIZES, st.integers(1, 4), st.booleans())
def test_data_parallel_ranks_share_every_token_once(sizes: list[int], ranks: int, in_step: bool) -> None:
    samples = [sample(size) for size in sizes]
    batches = [
        pack_micro_batches(samples, budget=50, data_parallel_rank=r, data_parallel_size=ranks, in_step=in_step) for r in range(ranks)
    ]
    assert all(batches)  # a rank without a sample still takes part
    assert not in_step or len({len(mine) for mine in batches}) == 1
    assert sum(int(b.response_mask.sum()) for mine in batches for b in mine) == sum(sizes)
    real = sum(int((b.scale.nonzero().numel() > 0) and b.cu_seqlens[-1]) for mine in batches for b in mine)
    assert real == sum(sequence_tokens(s.trajectory) for s in samples)


def test_an_empty_micro_batch_is_one_masked_token() -> None:
    (batch,) = pack_micro_batches([], budget=10)
    assert batch.tokens.tolist() == [0] and not batch.response_mask.any() and torch.equal(batch.scale, torch.zeros(1))


@given(SIZES.filter(bool), st.integers(2, 4), st.integers(1, 3))
def test_context_parallel_ranks_share_every_sequence_evenly(sizes: list[int], ranks: int, token_multiple: int) -> None:
    batches = [pack([sample(size) for size in sizes], token_multiple, context_rank=r, context_size=ranks) for r in range(ranks)]
    whole, lengths = pack([sample(size) for size in sizes]), batches[0].cu_seqlens.diff()
    assert (lengths % (2 * ranks) == 0).all() and batches[0].max_seqlen == lengths.max()
    for batch in batches:
        assert torch.equal(batch.targets[batch.response_rows], whole.targets[whole.response_rows])  # nothing is lost or moved
        assert batch.scale.sum() == whole.scale.sum()
        assert batch.split is not None and torch.equal(batch.split.order, batches[0].split.order)
        assert len(batch.split.mine) * ranks == len(batch.tokens) and len(batch.split.mine) % token_multiple == 0
        assert torch.equal(batch.split.mine[batch.split.response_rows], batch.split.mine[batch.response_mask[batch.split.mine]])
    assert torch.equal(torch.cat([batch.split.mine for batch in batches]), batches[0].split.order)
    assert batches[0].split.order.sort().values.tolist() == list(range(len(batches[0].tokens)))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(2, 4))
def test_tokens_are_shared_as_megatron_core_s_rotary_embedding_expects(pieces: list[int], ranks: int) -> None:
    lengths = torch.tensor(pieces) * 2 * ranks
    positions = torch.cat([torch.arange(int(length)) for length in lengths])
    order = context_order(lengths, positions, ranks).chunk(ranks)
    for rank in range(ranks):
        expected = [_get_thd_freqs_on_this_cp_rank(rank, ranks, torch.empty(int(n) // ranks), torch.arange(int(n))) for n in lengths]
        assert torch.equal(positions[order[rank]], torch.cat(expected))


def test_an_empty_micro_batch_of_context_parallel_ranks_gives_each_of_them_tokens() -> None:
    (batch,) = pack_micro_batches([], budget=10, token_multiple=2, context_rank=1, context_size=2)
    assert batch.split is not None and len(batch.split.mine) == 2 and not len(batch.split.response_rows) and not batch.scale.any()


def test_the_budget_counts_what_fills_sequences_up() -> None:
    """Two sequences of 5 tokens fit into 10, but not once each is filled up to 8."""
    samples = [sample(3), sample(3)]
    assert len(pack_micro_batches(samples, budget=10)) == 1
    assert len(pack_micro_batches(samples, budget=10, context_size=2)) == 2
