from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb, isfinite

import numpy as np
import pytest

from megatron_nsr.evaluation.pass_at_k import default_ks, pass_at_k, pass_at_k_curve


def test_equals_counting_the_draws() -> None:
    for n in range(1, 8):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations(range(n), k))
                hits = sum(any(sample < correct for sample in draw) for draw in draws)
                assert pass_at_k(correct, n, k) == hits / len(draws)


@pytest.mark.parametrize("n", [1, 2, 16, 63, 64])
def test_equals_exact_fractions(n: int) -> None:
    for correct in range(n + 1):
        for k in range(1, n + 1):
            assert pass_at_k(correct, n, k) == float(1 - Fraction(comb(n - correct, k), comb(n, k)))


def test_finite_and_monotone_at_ten_thousand_samples() -> None:
    n = 10_000
    ks = [1, 2, 5, 64, 1024, 9_999, 10_000]
    for correct in [0, 1, 2, 50, 5_000, 9_999, 10_000]:
        curve = [pass_at_k(correct, n, k) for k in ks]
        assert all(isfinite(value) and 0 <= value <= 1 for value in curve)
        assert curve == sorted(curve)
    for k in ks:
        values = [pass_at_k(correct, n, k) for correct in [0, 1, 2, 50, 5_000, 9_999, 10_000]]
        assert values == sorted(values)
    assert pass_at_k(1, n, 1) == 1e-4
    assert pass_at_k(1, n, n) == 1.0


def product_form(n: int, correct: int, k: int) -> float:
    """The estimator as it is usually programmed: 1 minus the product of (1 - k / i) for i from n - correct + 1 to n."""
    if n - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def test_agrees_with_the_product_form_on_random_counts() -> None:
    generator = np.random.default_rng(0)
    for _ in range(3000):
        n = int(generator.integers(1, 300))
        correct, k = int(generator.integers(0, n + 1)), int(generator.integers(1, n + 1))
        assert pass_at_k(correct, n, k) == pytest.approx(product_form(n, correct, k), abs=1e-12)


@pytest.mark.parametrize(("correct", "n", "k"), [(-1, 4, 1), (5, 4, 1), (1, 4, 0), (1, 4, 5)])
def test_impossible_counts_are_refused(correct: int, n: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"not correct={correct}, n={n}, k={k}"):
        pass_at_k(correct, n, k)


def test_the_curve_is_the_mean_over_problems_of_any_size() -> None:
    assert pass_at_k_curve([1, 0, 2], [2, 4, 2], [1, 2]) == {1: pytest.approx((0.5 + 0 + 1) / 3), 2: pytest.approx((1 + 0 + 1) / 3)}


def test_a_problem_with_too_few_samples_is_named() -> None:
    with pytest.raises(ValueError, match=r"Pass@4 needs at least 4 samples a problem; problem 1 has 2"):
        pass_at_k_curve([1, 1], [4, 2], [1, 4])
    with pytest.raises(ValueError, match="at least one problem"):
        pass_at_k_curve([], [], [1])


@pytest.mark.parametrize(("n", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2]), (64, [1, 2, 4, 8, 16, 32, 64]), (100, [1, 2, 4, 8, 16, 32, 64])])
def test_default_ks_are_powers_of_two(n: int, ks: list[int]) -> None:
    assert default_ks(n) == ks
