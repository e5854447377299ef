"""Means of paired differences and their 95 % intervals. May import: numpy.

Pass@k is averaged over bases, seeds and problems, and all three are drawn again with replacement: bases, the runs of each drawn base, and
the problems, the same ones for every run (Owen, "The pigeonhole bootstrap", 2007: it errs towards wide intervals in the problems). Few
runs are the weak side: of three, the bootstrap understates how much a fourth may differ. Entropy has no problems to draw: Student's t, over
bases where there are several, since the runs of one base share what that base is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
SEED = 20250601
# Student's t at 97.5 %, by degrees of freedom from 1; beyond the table the last one, which is too wide rather than too narrow.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval; low and high are NaN where one run says nothing about others, and all three where there is none."""

    mean: float
    low: float
    high: float

    @property
    def above(self) -> bool:
        return self.low > 0

    @property
    def below(self) -> bool:
        return self.high < 0


NO_RUN = Interval(math.nan, math.nan, math.nan)


class Resampler:
    """Draws runs and problems again, the same draws for every quantity of a comparison. bases: the base of each run."""

    def __init__(self, bases: Sequence[int], problems: int) -> None:
        self.bases = bases
        generator = np.random.default_rng(SEED)
        self.weights = np.array([1 / (len(set(bases)) * list(bases).count(base)) for base in bases])
        self.run_weights = np.array([_draw_runs(generator, bases) for _ in range(RESAMPLES)])
        self.problem_weights = generator.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES) / problems

    def intervals(self, values: np.ndarray) -> list[Interval]:
        """values: float64 [runs, problems, columns]; one interval a column. Bases count alike, however many runs each has."""
        if not len(values):
            return [NO_RUN] * values.shape[2]
        by_problem = np.einsum("sr,rpc->spc", self.run_weights, values)
        means = np.einsum("sp,spc->sc", self.problem_weights, by_problem)
        low, high = np.percentile(means, [2.5, 97.5], axis=0)
        return [
            Interval(*map(float, triple))
            for triple in zip(np.einsum("r,rpc->pc", self.weights, values).mean(axis=0), low, high, strict=True)
        ]


def run_interval(values: Sequence[float], bases: Sequence[int]) -> Interval:
    """Mean and Student's t interval, over the means of the bases or, of a single base, over its runs. bases: the base of each value."""
    if not values:
        return NO_RUN
    names = sorted(set(bases))
    if len(names) > 1:
        values = [float(np.mean([value for value, base in zip(values, bases, strict=True) if base == name])) for name in names]
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    half = T_975[min(count - 1, len(T_975)) - 1] * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def _draw_runs(generator: np.random.Generator, bases: Sequence[int]) -> np.ndarray:
    """Weights of the runs, which sum to 1: bases are drawn, then the runs of each."""
    names = sorted(set(bases))
    weights = np.zeros(len(bases))
    for base in generator.choice(names, size=len(names)):
        members = np.flatnonzero(np.asarray(bases) == base)
        drawn = generator.choice(members, size=len(members))
        np.add.at(weights, drawn, 1 / (len(names) * len(drawn)))
    return weights
