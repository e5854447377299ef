"""What is asked of sampled responses: are two sets the same, are the log-probs possible, what would a shift by one token look like.

May import: megatron_nsr.types, numpy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_nsr.types import Trajectory


def equal_share(first: Sequence[Trajectory], second: Sequence[Trajectory]) -> float:
    """Share of responses that are the same tokens; another number of responses is none."""
    return equal_lists([t.response_ids.tolist() for t in first], [t.response_ids.tolist() for t in second])


def equal_lists(first: Sequence[list[int]], second: Sequence[list[int]]) -> float:
    if len(first) != len(second) or not first:
        return 0.0
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def plausible(trajectories: Sequence[Trajectory]) -> bool:
    """Finite log-probs of at most 0, one a token."""
    return all(
        len(t.rollout_logprobs) == t.length and bool(np.isfinite(t.rollout_logprobs).all()) and float(t.rollout_logprobs.max()) <= 1e-6
        for t in trajectories
    )


def misaligned(trajectories: Sequence[Trajectory]) -> float:
    """Mean |difference| of each log-prob to that of the token before, nats: the gap that a shift by one token would show."""
    return float(np.concatenate([np.abs(np.diff(t.rollout_logprobs)) for t in trajectories]).mean())
