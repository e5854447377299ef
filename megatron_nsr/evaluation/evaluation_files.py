"""eval/step_N.json, whose form evaluation/results.py describes, read back, and the difference of two such results.

May import: types, numpy and this package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nsr.evaluation.bootstrap import MIN_PROBLEMS, interval
from megatron_nsr.evaluation.pass_at_k import pass_at_k
from megatron_nsr.types import UserError

PASS_KEYS = ("pass_at_k", "ci_low", "ci_high")
CONS_KEYS = ("cons_at_k", "cons_ci_low", "cons_ci_high")
SHOWN_KS = 4  # columns of a table that has no room for every k
NO_VALUE = "–"


@dataclass(frozen=True)
class Curve:
    """Shares by k, and their 95 % intervals (low, high) as far as they are known."""

    values: Mapping[int, float]
    intervals: Mapping[int, tuple[float, float]]

    def band(self) -> tuple[list[float], list[float]] | tuple[None, None]:
        """The intervals' low and high ends in the order of `values`, NaN where one is not known; None where none is."""
        if not self.intervals:
            return None, None
        ends = [self.intervals.get(k, (math.nan, math.nan)) for k in self.values]
        return [low for low, _ in ends], [high for _, high in ends]


@dataclass(frozen=True)
class Group:
    """The problems of one level or subject."""

    problems: int
    curve: Curve
    vote: Curve


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark's entry in eval/step_N.json, see evaluation/results.py. ids, correct, total: one entry a problem.

    n: samples a problem, 0 where unknown; written: Pass@k as the file has it; vote: cons@k, without values where there is none;
    groups: by column (level, subject) and its value.
    """

    n: int
    ids: tuple[str, ...]
    correct: tuple[int, ...]
    total: tuple[int, ...]
    written: Curve
    vote: Curve
    greedy: float | None
    no_verdict: int
    groups: Mapping[str, Mapping[str, Group]]

    @property
    def pass_at_k(self) -> Mapping[int, float]:
        return self.written.values

    @cached_property
    def curve(self) -> Curve:
        """Pass@k with 95 % intervals: the file's own, or else from the counts; without where it holds neither."""
        if self.written.intervals or not self.ids:
            return self.written
        return Curve(self.pass_at_k, _intervals(self.pass_at_k, self.per_problem))

    @cached_property
    def per_problem(self) -> np.ndarray:
        """float64 [problems, ks] in the order of `pass_at_k`; NaN where a problem has fewer samples than k."""
        rows = [[pass_at_k(c, n, k) if k <= n else math.nan for k in self.pass_at_k] for c, n in zip(self.correct, self.total, strict=True)]
        return np.array(rows).reshape(len(self.ids), len(self.pass_at_k))


@dataclass(frozen=True)
class EvaluationResult:
    """One eval/step_N.json."""

    step: int
    heldout_entropy: float | None
    benchmarks: Mapping[str, BenchmarkResult]

    @property
    def prompts(self) -> frozenset[tuple[str, str]] | None:
        """(benchmark, problem id) of every held-out prompt, which the entropy is a mean over; None where the file does not name all."""
        if not self.benchmarks or not all(result.ids for result in self.benchmarks.values()):
            return None
        return frozenset((name, problem) for name, result in self.benchmarks.items() for problem in result.ids)


def read_evaluation(path: Path) -> EvaluationResult:
    """Raises UserError naming a file that is no evaluation."""
    content = read_object(path)
    try:
        benchmarks = {name: _parse_benchmark(result) for name, result in content["benchmarks"].items()}
        return EvaluationResult(int(content["step"]), content.get("heldout_entropy"), benchmarks)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not an evaluation ({type(error).__name__}: {error})") from None


def read_object(path: Path) -> dict[str, Any]:
    """Raises UserError naming a file that does not hold a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def benchmark_names(evaluations: Iterable[EvaluationResult]) -> list[str]:
    """Every benchmark, in the order of first appearance."""
    return list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.benchmarks))


def shown_ks(ks: Iterable[int]) -> list[int]:
    """At most SHOWN_KS of them, evenly over their order, both ends included."""
    ordered = sorted(set(ks))
    if len(ordered) <= SHOWN_KS:
        return ordered
    return [ordered[round(index * (len(ordered) - 1) / (SHOWN_KS - 1))] for index in range(SHOWN_KS)]


def difference(result: BenchmarkResult, base: BenchmarkResult) -> Curve:
    """Pass@k of `result` less that of `base` for each common k, intervals paired over problems; without values where problems differ."""
    if result.ids != base.ids or not result.ids:
        return Curve({}, {})
    common = [k for k in result.pass_at_k if k in base.pass_at_k]
    columns = [list(result.pass_at_k).index(k) for k in common]
    base_columns = [list(base.pass_at_k).index(k) for k in common]
    paired = result.per_problem[:, columns] - base.per_problem[:, base_columns]
    return Curve({k: result.pass_at_k[k] - base.pass_at_k[k] for k in common}, _intervals(common, paired))


def _intervals(ks: Iterable[int], values: np.ndarray) -> dict[int, tuple[float, float]]:
    """values: float64 [problems, ks]; empty where the problems are too few."""
    if len(values) < MIN_PROBLEMS:
        return {}
    low, high = interval(values)
    return dict(zip(ks, zip(low.tolist(), high.tolist(), strict=True), strict=True))


def _parse_benchmark(content: Mapping[str, Any]) -> BenchmarkResult:
    problems = content.get("problems", [])
    correct, total = ([int(problem[key]) for problem in problems] for key in ("correct", "n"))
    if "pass_at_k" not in content:
        raise KeyError("pass_at_k")
    count = len(problems)
    return BenchmarkResult(
        n=int(content.get("n") or 0),
        ids=tuple(str(problem["id"]) for problem in problems),
        correct=tuple(correct),
        total=tuple(total),
        written=_parse_curve(content, count, *PASS_KEYS),
        vote=_parse_curve(content, count, *CONS_KEYS),
        greedy=content.get("greedy_accuracy"),
        no_verdict=int(content.get("no_verdict") or 0),
        groups={
            column: {value: _parse_group(scores) for value, scores in groups.items()}
            for column, groups in content.get("groups", {}).items()
        },
    )


def _parse_group(scores: Mapping[str, Any]) -> Group:
    problems = int(scores["problems"])
    return Group(problems, _parse_curve(scores, problems, *PASS_KEYS), _parse_curve(scores, problems, *CONS_KEYS))


def _parse_curve(content: Mapping[str, Any], problems: int, value: str, low: str, high: str) -> Curve:
    """problems: 0 where their number is unknown."""
    values, lows, highs = ({int(k): float(share) for k, share in content.get(key, {}).items()} for key in (value, low, high))
    known = {k: (lows[k], highs[k]) for k in values if k in lows and k in highs}
    if 0 < problems < MIN_PROBLEMS:  # earlier versions wrote intervals of no width
        known = {}
    return Curve({k: values[k] for k in sorted(values)}, known)
