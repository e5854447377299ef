"""Advantages of packed micro-batches: each response's own, whatever lies beside it, and whitened over all of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.platform import distributed
from megatron_nsr.training.packing import pack
from megatron_nsr.training.parallel_groups import ParallelGroups
from megatron_nsr.training.token_advantages import whiten, with_advantages
from megatron_nsr.types import TrainBatch, Trajectory, WeightedSample

ONE_RANK = ParallelGroups(0, 1, 0, 1, True, torch.device("cpu"), None)
GAMMA, LAMBDA = 0.9, 0.8


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.init_process_group()
    yield
    distributed.destroy()


def sample(length: int, outcome: float, *, prompt: int = 2) -> WeightedSample:
    ids = np.arange(length, dtype=np.int32)
    return WeightedSample(Trajectory(0, 0, (1,) * prompt, ids, np.zeros(length, np.float32), "stop", 0), outcome, 0.25)


def judged(samples: list[WeightedSample], token_multiple: int = 1, penalty: float = 0.0) -> TrainBatch:
    """Each response token's value is a tenth of its place in the response; prompts hold values that must not count."""
    batch = pack(samples, token_multiple)
    values = torch.where(batch.response_mask, batch.targets / 10, torch.tensor(1e3))
    return with_advantages(batch, values, GAMMA, LAMBDA, torch.full_like(values, penalty) if penalty else None)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.sampled_from([1.0, -1.0]), st.integers(1, 3)), max_size=5), st.integers(1, 4))
def test_what_lies_beside_a_response_changes_nothing(drawn: list[tuple[int, float, int]], token_multiple: int) -> None:
    samples = [sample(length, outcome, prompt=prompt) for length, outcome, prompt in drawn]
    together = judged(samples, token_multiple)
    alone = [judged([one]) for one in samples]
    for name in ("weights", "returns"):
        parts = [getattr(batch, name)[batch.response_rows] for batch in alone]
        assert torch.equal(getattr(together, name)[together.response_rows], torch.cat([torch.zeros(0), *parts]))
        assert not getattr(together, name)[~together.response_mask].any()


def test_a_response_s_numbers_follow_from_its_outcome_and_values() -> None:
    batch = judged([sample(3, -1.0)])
    last = -1.0 - 0.2
    middle = GAMMA * 0.2 - 0.1 + GAMMA * LAMBDA * last
    first = GAMMA * 0.1 - 0.0 + GAMMA * LAMBDA * middle
    assert batch.returns is not None and batch.old_values is not None
    assert batch.weights[batch.response_rows].tolist() == pytest.approx([first, middle, last])
    assert batch.returns[batch.response_rows].tolist() == pytest.approx([first, middle + 0.1, last + 0.2])
    assert batch.old_values[batch.response_rows].tolist() == pytest.approx([0.0, 0.1, 0.2])


def test_a_penalty_is_taken_from_each_token_s_reward() -> None:
    plain, punished = judged([sample(2, 1.0)]), judged([sample(2, 1.0)], penalty=0.5)
    taken = (plain.weights - punished.weights)[plain.response_rows]
    assert taken.tolist() == pytest.approx([0.5 + GAMMA * LAMBDA * 0.5, 0.5])


def test_whitening_is_over_the_tokens_of_all_micro_batches() -> None:
    samples = [sample(3, 1.0), sample(5, -1.0), sample(1, -1.0)]
    apart = whiten([judged(samples[:1]), judged([]), judged(samples[1:], 4)], ONE_RANK)
    together = whiten([judged(samples)], ONE_RANK)
    found, want = (torch.cat([batch.weights[batch.response_rows] for batch in batches]) for batches in (apart, together))
    torch.testing.assert_close(found, want)
    assert float(want.mean()) == pytest.approx(0, abs=1e-6) and float(want.var()) == pytest.approx(1, rel=1e-5)
    assert not any(batch.weights[~batch.response_mask].any() for batch in apart)


def test_equal_advantages_whiten_to_nothing() -> None:
    (batch,) = whiten([with_advantages(pack([sample(1, -1.0), sample(1, -1.0)]), torch.zeros(4), 1.0, 1.0)], ONE_RANK)
    assert not batch.weights.any()
    assert whiten([], ONE_RANK) == []
