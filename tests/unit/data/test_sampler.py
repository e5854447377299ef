from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.data.sampler import PromptSampler
from megatron_nsr.types import UserError

sizes = st.integers(1, 12).flatmap(lambda batch: st.tuples(st.integers(batch, 60), st.just(batch)))


def draw(sampler: PromptSampler, batches: int) -> list[list[int]]:
    return [sampler.next() for _ in range(batches)]


@given(size=sizes, seed=st.integers(0, 2**63), shuffle=st.booleans(), before=st.integers(0, 30))
def test_resuming_anywhere_gives_the_same_sequence(size: tuple[int, int], seed: int, shuffle: bool, before: int) -> None:
    one = PromptSampler(*size, seed=seed, shuffle=shuffle)
    draw(one, before)
    two = PromptSampler(*size, seed=seed, shuffle=shuffle)
    two.load_state(json.loads(json.dumps(one.state())))
    assert two.epoch == one.epoch
    assert draw(two, 10) == draw(one, 10)


@given(size=sizes, seed=st.integers(0, 2**63), shuffle=st.booleans())
def test_an_epoch_has_distinct_prompts_and_drops_its_last_short_batch(size: tuple[int, int], seed: int, shuffle: bool) -> None:
    count, batch = size
    sampler = PromptSampler(count, batch, seed=seed, shuffle=shuffle)
    for epoch in range(3):
        assert sampler.epoch == epoch
        drawn = [index for indices in draw(sampler, count // batch) for index in indices]
        assert len(drawn) == len(set(drawn)) == count - count % batch
        assert set(drawn) <= set(range(count))
    assert sampler.epoch == 3


def test_without_shuffling_the_order_is_the_files() -> None:
    assert draw(PromptSampler(5, 2, seed=1, shuffle=False), 3) == [[0, 1], [2, 3], [0, 1]]


def test_epochs_and_seeds_differ() -> None:
    first, second = draw(PromptSampler(100, 100, seed=1, shuffle=True), 2)
    assert first != second
    assert first != PromptSampler(100, 100, seed=2, shuffle=True).next()


def test_the_order_is_pinned() -> None:
    """A change here breaks the resume of every run there is."""
    assert draw(PromptSampler(7, 3, seed=5, shuffle=True), 3) == [[2, 4, 3], [1, 5, 0], [4, 5, 1]]


def test_no_global_random_state_is_read_or_written() -> None:
    np.random.seed(0)
    random.seed(0)
    expected = (np.random.random(), random.random())
    np.random.seed(0)
    random.seed(0)
    first = PromptSampler(50, 5, seed=1, shuffle=True).next()
    assert (np.random.random(), random.random()) == expected
    assert PromptSampler(50, 5, seed=1, shuffle=True).next() == first


def test_too_few_prompts() -> None:
    with pytest.raises(UserError, match=r"data\.prompts_per_step=8: there are only 5 prompts; choose 5 or fewer"):
        PromptSampler(5, 8, seed=0, shuffle=True)


@pytest.mark.parametrize(
    ("count", "batch", "seed", "shuffle", "message"),
    [
        (11, 4, 0, True, r"number of prompts in data\.train=11: the checkpoint was written with 10"),
        (10, 5, 0, True, r"data\.prompts_per_step=5: the checkpoint was written with 4"),
        (10, 4, 1, True, r"run\.seed=1: the checkpoint was written with 0"),
        (10, 4, 0, False, r"data\.shuffle=False: the checkpoint was written with True"),
    ],
)
def test_a_state_of_other_data_is_refused(count: int, batch: int, seed: int, shuffle: bool, message: str) -> None:
    state = PromptSampler(10, 4, seed=0, shuffle=True).state()
    with pytest.raises(UserError, match=message):
        PromptSampler(count, batch, seed=seed, shuffle=shuffle).load_state(state)
