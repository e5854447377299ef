"""Methods side by side, at equal steps, at matched Pass@1, and in extended training. May import: results, intervals, numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from examples.reproduction.intervals import Interval, Resampler, run_interval
from examples.reproduction.results import KS, Evaluation, MethodResult, Results
from megatron_nsr.types import UserError

BASE = "base"


@dataclass(frozen=True)
class Field:
    """What each method reached under one way of comparing. tables: Pass@k, float64 [runs, problems, len(KS)]; entropy: [runs]."""

    tables: Mapping[str, np.ndarray]
    entropy: Mapping[str, np.ndarray]
    resampler: Resampler

    def level(self, name: str) -> list[Interval]:
        """Mean Pass@k of a method, one interval a k."""
        return self.resampler.intervals(self.tables[name])

    def difference(self, left: str, right: str) -> list[Interval]:
        """Pass@k of left - right, paired over runs and problems."""
        return self.resampler.intervals(self.tables[left] - self.tables[right])

    def entropy_level(self, name: str) -> Interval:
        return run_interval(self.entropy[name].tolist(), self.resampler.bases)

    def entropy_difference(self, left: str, right: str) -> Interval:
        return run_interval((self.entropy[left] - self.entropy[right]).tolist(), self.resampler.bases)


class Comparison:
    """Raises UserError where the methods were not run on the same bases with the same seeds."""

    def __init__(self, results: Results) -> None:
        self.results, self.methods = results, results.methods
        self.pairs = [(run.base, run.seed) for run in results.of(self.methods[0])]
        for method in self.methods:
            if (own := [(run.base, run.seed) for run in results.of(method)]) != self.pairs:
                raise UserError(f"{method} was run with (base, seed) {own}, and {self.methods[0]} with {self.pairs}: run the missing ones")
        self.problems = len(results.bases[0].evaluation.correct)
        self.resampler = Resampler([base for base, _ in self.pairs], self.problems)

    def at_equal_steps(self) -> Field:
        """Every method after the same number of steps, and the base."""
        return self.at_step(self.results.steps, self.methods)

    def at_step(self, step: int, methods: Sequence[str]) -> Field:
        """The methods after `step` steps, and the base that each run started from."""
        chosen = {method: [run.at(step) for run in self.results.of(method)] for method in methods}
        chosen[BASE] = [self.results.base(base) for base, _ in self.pairs]
        return self._field({name: [(each.table, each.entropy) for each in row] for name, row in chosen.items()}, self.resampler)

    def at_matched_pass_1(self) -> Field:
        """Each method where it first reaches the highest Pass@1 that all methods of the same base and seed reach, over `matched_levels`.

        Between two evaluations Pass@k of each problem, and the entropy, are interpolated. No pair left: every interval is NaN.
        """
        levels = self.matched_levels()
        points = {
            method: [crossing(self._path(self.results.of(method)[position]), level) for position, level in levels.items()]
            for method in self.methods
        }
        resampler = Resampler([self.pairs[position][0] for position in levels], self.problems)
        return self._field(points, resampler)

    def matched_levels(self) -> dict[int, float]:
        """The common Pass@1 by position in `pairs`.

        A pair in which some method never beats the base has no entry: every method would stand at the base, and all differences be 0.
        """
        levels = {}
        for position, (base, _) in enumerate(self.pairs):
            paths = [self._path(self.results.of(method)[position]) for method in self.methods]
            level = min(max(pass_1(each) for each in path) for path in paths)
            if level > pass_1(self.results.base(base)):
                levels[position] = level
        return levels

    def long_steps(self, method: str) -> list[int]:
        """The steps at which every run of a method was evaluated."""
        steps = [{evaluation.step for evaluation in run.evaluations} for run in self.results.of(method)]
        return sorted(set.intersection(*steps))

    def long_change(self, method: str) -> list[Interval]:
        """Pass@k after the last step - after the comparison's step, one interval a k."""
        last = self.long_steps(method)[-1]
        late, early = (self.at_step(step, [method]).tables[method] for step in (last, self.results.steps))
        return self.resampler.intervals(late - early)

    def _path(self, run: MethodResult) -> list[Evaluation]:
        """The base, then the run's evaluations up to the comparison's step."""
        return [self.results.base(run.base), *(each for each in run.evaluations if each.step <= self.results.steps)]

    def _field(self, rows: Mapping[str, Sequence[tuple[np.ndarray, float]]], resampler: Resampler) -> Field:
        shape = -1, self.problems, len(KS)  # also where there is no run
        return Field(
            tables={name: np.array([table for table, _ in row]).reshape(shape) for name, row in rows.items()},
            entropy={name: np.array([entropy for _, entropy in row]) for name, row in rows.items()},
            resampler=resampler,
        )


def pass_1(evaluation: Evaluation) -> float:
    """Mean Pass@1."""
    return float(evaluation.table[:, KS.index(1)].mean())


def crossing(path: Sequence[Evaluation], level: float) -> tuple[np.ndarray, float]:
    """Pass@k table and entropy where the path first reaches a Pass@1 of `level`, which some point of it does."""
    first = next(index for index, each in enumerate(path) if pass_1(each) >= level)
    after, before = path[first], path[max(first - 1, 0)]
    rise = pass_1(after) - pass_1(before)
    share = (level - pass_1(before)) / rise if rise > 0 else 1.0
    return before.table + share * (after.table - before.table), before.entropy + share * (after.entropy - before.entropy)
