"""What is asked of sampled responses: are two sets the same, are the log-probs possible, what would a shift by one token look like.

May import: megatron_nsr.types, numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_nsr.types import Trajectory


def shared_tokens(first: Sequence[Trajectory], second: Sequence[Trajectory]) -> float:
    """Share of the tokens of both that stand before the first difference of their response; another number of responses shares none.

    In bf16 another kernel (a prompt read from the cache) rounds otherwise, and a sampled token may flip: what follows is another response.
    """
    return shared_ids([t.response_ids.tolist() for t in first], [t.response_ids.tolist() for t in second])


def shared_ids(first: Sequence[list[int]], second: Sequence[list[int]]) -> float:
    if len(first) != len(second):
        return 0.0
    same = sum(_prefix(a, b) for a, b in zip(first, second, strict=True))
    return 2 * same / max(1, sum(map(len, first)) + sum(map(len, second)))


def _prefix(a: list[int], b: list[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def plausible(trajectories: Sequence[Trajectory]) -> bool:
    """Finite log-probs of at most 0, one a token."""
    return all(
        len(t.rollout_logprobs) == t.length and bool(np.isfinite(t.rollout_logprobs).all()) and float(t.rollout_logprobs.max()) <= 1e-6
        for t in trajectories
    )


def misaligned(trajectories: Sequence[Trajectory]) -> float:
    """Mean |difference| of each log-prob to that of the token before, nats: the gap that a shift by one token would show."""
    return float(np.concatenate([np.abs(np.diff(t.rollout_logprobs)) for t in trajectories]).mean())
