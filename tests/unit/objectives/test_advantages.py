"""Rewards and values of tokens to advantages, against the published recursion written out as a sum, in plain Python floats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nsr.objectives.advantages import generalized_advantages, token_rewards, whitened

NUMBERS = st.floats(-3, 3, width=32)
RESPONSES = st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=9), min_size=1, max_size=4)
SHARES = st.floats(0, 1)


def columns(responses: list[list[float]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(response, dtype=torch.float64) for response in responses])


def by_the_sum(rewards: list[float], values: list[float], gamma: float, lambda_: float) -> list[float]:
    """A_t = sum over k of (gamma lambda)^k delta_(t+k) (arXiv 1506.02438, equation 16)."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lambda_) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@settings(deadline=None)
@given(RESPONSES, SHARES, SHARES)
def test_advantages_are_the_discounted_sum_of_what_each_token_changed(
    responses: list[list[tuple[float, float]]], gamma: float, lambda_: float
) -> None:
    rewards, values = ([[pair[i] for pair in response] for response in responses] for i in (0, 1))
    found = generalized_advantages(columns(rewards), columns(values), gamma, lambda_)
    for place, (reward, value) in enumerate(zip(rewards, values, strict=True)):
        want = by_the_sum(reward, value, gamma, lambda_)
        assert found[: len(want), place].tolist() == pytest.approx(want, rel=1e-12, abs=1e-12)
        assert not found[len(want) :, place].any()  # another response's length changes nothing


@settings(deadline=None)
@given(RESPONSES)
def test_with_gamma_and_lambda_of_one_the_return_is_the_outcome_at_every_token(responses: list[list[tuple[float, float]]]) -> None:
    values = columns([[pair[1] for pair in response] for response in responses])
    lengths = torch.tensor([len(response) for response in responses])
    outcomes = torch.tensor([response[0][0] for response in responses], dtype=torch.float64)
    returns = generalized_advantages(token_rewards(outcomes, lengths), values, 1.0, 1.0) + values
    for place, length in enumerate(lengths):
        torch.testing.assert_close(returns[:length, place], outcomes[place].expand(length))


def test_lambda_zero_looks_one_token_ahead() -> None:
    rewards, values = columns([[0.0, 0.0, 1.0]]), columns([[0.5, 0.2, 0.6]])
    found = generalized_advantages(rewards, values, 0.9, 0.0)[:, 0]
    assert found.tolist() == pytest.approx([0.9 * 0.2 - 0.5, 0.9 * 0.6 - 0.2, 1 - 0.6])


def test_the_outcome_is_the_last_token_s_reward_and_penalties_are_each_token_s_own() -> None:
    outcomes, lengths = torch.tensor([1.0, -1.0]), torch.tensor([1, 3])
    assert token_rewards(outcomes, lengths).tolist() == [[1, 0], [0, 0], [0, -1]]
    penalties = torch.tensor([[0.5, 0.25], [0, -0.25], [0, 0.125]])
    assert token_rewards(outcomes, lengths, penalties).tolist() == [[0.5, -0.25], [0, 0.25], [0, -1.125]]
    assert token_rewards(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0, 0)


def test_whitening_leaves_no_mean_and_no_scale_and_makes_nothing_of_equal_advantages() -> None:
    advantages = torch.tensor([3.0, 5.0, 10.0], dtype=torch.float64)
    found = whitened(advantages, float(advantages.mean()), float(advantages.var()))
    assert float(found.mean()) == pytest.approx(0, abs=1e-9) and float(found.var()) == pytest.approx(1)
    assert whitened(torch.full((3,), -1.0), -1.0, 0.0).tolist() == [0, 0, 0]
