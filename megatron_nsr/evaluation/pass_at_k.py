"""The unbiased Pass@k estimator and its curve.

May import: types and the standard library.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import comb


@lru_cache(maxsize=65536)
def pass_at_k(correct: int, n: int, k: int) -> float:
    """The probability that k of a problem's n samples, drawn without replacement, include one of its `correct` ones.

    1 - C(n - correct, k) / C(n, k) (arXiv 2107.03374, Eq. 1), in integers and rounded once: exact to the last bit at any n,
    hence monotone in `correct` and k. Raises ValueError unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= correct <= n and 1 <= k <= n, not correct={correct}, n={n}, k={k}")
    draws = comb(n, k)
    return (draws - comb(n - correct, k)) / draws


def pass_at_k_curve(correct: Sequence[int], total: Sequence[int], ks: Iterable[int]) -> dict[int, float]:
    """Pass@k by k: the mean over problems. `correct` and `total` are a problem's counts.

    A sample without a verdict belongs in `total` and not in `correct`: an evaluation counts it as not correct, so that no grader
    failure can raise a score. Raises ValueError, naming the first problem's position, where one has fewer than k samples.
    """
    if len(correct) != len(total) or not total:
        raise ValueError(f"pass_at_k_curve needs the counts of at least one problem, not {len(correct)} correct and {len(total)} total")
    curve = {}
    for k in ks:
        short = next((position for position, n in enumerate(total) if n < k), None)
        if short is not None:
            raise ValueError(f"Pass@{k} needs at least {k} samples a problem; problem {short} has {total[short]}")
        curve[k] = sum(pass_at_k(c, n, k) for c, n in zip(correct, total, strict=True)) / len(total)
    return curve


def default_ks(n: int) -> list[int]:
    """The powers of two from 1 to n."""
    return [2**power for power in range(n.bit_length())]
