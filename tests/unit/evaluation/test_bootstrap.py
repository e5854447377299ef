"""Bootstrap intervals of means over problems."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nsr.evaluation.bootstrap import interval


def test_the_width_is_that_of_the_mean_s_standard_error() -> None:
    values = np.random.default_rng(0).random((200, 3))
    low, high = interval(values)
    error = values.std(axis=0) / math.sqrt(200)
    assert low == pytest.approx(values.mean(axis=0) - 1.96 * error, abs=0.3 * error.max())
    assert high == pytest.approx(values.mean(axis=0) + 1.96 * error, abs=0.3 * error.max())


def test_it_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    draws = generator.random((100, 100)) < 0.3  # 100 benchmarks of 100 problems; each interval is right or not
    bounds = [interval(draw[:, None].astype(float)) for draw in draws]
    held = np.mean([low[0] <= 0.3 <= high[0] for low, high in bounds])
    assert 0.90 <= held <= 0.98


def test_it_is_the_same_each_time_and_for_a_column_alone() -> None:
    values = np.random.default_rng(2).random((30, 4))
    low, high = interval(values)
    again_low, again_high = interval(values[:, 2:3])
    assert (low[2], high[2]) == (pytest.approx(again_low[0], abs=1e-12), pytest.approx(again_high[0], abs=1e-12))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_it_lies_between_the_extremes_and_around_the_mean(values: list[float]) -> None:
    low, high = interval(np.array(values)[:, None])
    assert min(values) - 1e-9 <= low[0] <= high[0] <= max(values) + 1e-9
    if len(values) == 1 or max(values) == min(values):
        assert low[0] == pytest.approx(high[0])


def test_missing_values_are_left_out_of_the_mean() -> None:
    low, high = interval(np.array([[0.5], [np.nan], [0.5]]))
    assert (low[0], high[0]) == (0.5, 0.5)
