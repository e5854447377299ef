"""Reads what a report needs from run directories, whatever state they are in, and computes Pass@k bands and differences from it.

May import: observability, types and numpy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_nsr.evaluation.bootstrap import interval
from megatron_nsr.evaluation.pass_at_k import pass_at_k
from megatron_nsr.observability.metrics import read_metrics
from megatron_nsr.observability.run_directory import RunDirectory, flatten
from megatron_nsr.observability.samples import SampleRow, read_samples
from megatron_nsr.observability.state import RunState, read_state
from megatron_nsr.types import UserError

T = TypeVar("T")
PASS_KEYS = ("pass_at_k", "ci_low", "ci_high")
VOTE_KEYS = ("cons_at_k", "cons_ci_low", "cons_ci_high")
SUPERVISED = "supervised"  # the objective that samples nothing while it trains


@dataclass(frozen=True)
class Curve:
    """Shares by k, and their 95 % intervals (low, high) as far as they are known."""

    values: Mapping[int, float]
    intervals: Mapping[int, tuple[float, float]]


@dataclass(frozen=True)
class Group:
    """The problems of one level or subject."""

    problems: int
    curve: Curve


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark's entry in eval/step_N.json, see evaluation/results.py. ids, correct, total: one entry a problem.

    n: samples a problem, 0 where unknown; vote: cons@k, without values where there is none; groups: by column (level, subject) and
    its value.
    """

    n: int
    ids: tuple[str, ...]
    correct: tuple[int, ...]
    total: tuple[int, ...]
    curve: Curve
    vote: Curve
    greedy: float | None
    no_verdict: int
    groups: Mapping[str, Mapping[str, Group]]

    @property
    def pass_at_k(self) -> Mapping[int, float]:
        return self.curve.values

    @cached_property
    def intervals(self) -> Mapping[int, tuple[float, float]]:
        """95 % intervals of `pass_at_k`: the file's own, or else from the counts; empty where it holds neither."""
        if self.curve.intervals or not self.ids:
            return self.curve.intervals
        low, high = interval(self.per_problem)
        return dict(zip(self.pass_at_k, zip(low.tolist(), high.tolist(), strict=True), strict=True))

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


@dataclass(frozen=True)
class RunData:
    """Everything of a run that a report shows. config: dotted keys; samples: the last kept step's; damaged: messages of files left out."""

    name: str
    run: RunDirectory
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[EvaluationResult]
    samples: Sequence[SampleRow]
    environment: Mapping[str, Any] | None
    state: RunState | None
    damaged: Sequence[str]

    @property
    def objective(self) -> str:
        return str(self.config.get("objective.name", ""))

    @property
    def steps(self) -> int:
        """Training steps completed."""
        return max((record["step"] for record in self.metrics), default=self.state.step if self.state else 0)

    def final(self, benchmark: str) -> BenchmarkResult | None:
        """The benchmark's result in the last evaluation that holds it."""
        found = [evaluation.benchmarks[benchmark] for evaluation in self.evaluations if benchmark in evaluation.benchmarks]
        return found[-1] if found else None

    @property
    def final_entropy(self) -> float | None:
        found = [evaluation.heldout_entropy for evaluation in self.evaluations if evaluation.heldout_entropy is not None]
        return found[-1] if found else None

    @property
    def missing(self) -> list[str]:
        """A line for everything that a complete run has and this one has not."""
        return [*self.damaged, *_lacks(self)]

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged and finite."""
        points = [(record["step"], record[name]) for record in self.metrics if record.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]


def load_runs(paths: Sequence[Path]) -> list[RunData]:
    """Reads run directories in the given order. A file that is absent or damaged is left out; `RunData.missing` says so.

    Raises UserError naming the argument that is missing or no run, or whose config cannot be read.
    """
    if not paths:
        raise UserError("report: no run given; name at least one run directory")
    for path in paths:
        if not path.is_dir():
            raise UserError(f"run {path}: no such directory")
        if not RunDirectory(path).config.is_file():
            raise UserError(f"run {path}: not a run directory, it holds no config.yaml")
    return [_load_run(path, name) for path, name in zip(paths, run_names(paths), strict=True)]


def run_names(paths: Sequence[Path]) -> list[str]:
    """The shortest trailing part of each path, at least its last name, that tells it from the others."""
    parts = [path.absolute().resolve().parts for path in paths]
    names = []
    for mine in parts:
        others = [other for other in parts if other != mine]
        length = next((n for n in range(1, len(mine)) if all(other[-n:] != mine[-n:] for other in others)), len(mine))
        names.append("/".join(mine[-length:]))
    return names


def benchmark_names(runs: Sequence[RunData]) -> list[str]:
    """Every benchmark that any run was evaluated on, in the order of first appearance."""
    return list(dict.fromkeys(name for run in runs for evaluation in run.evaluations for name in evaluation.benchmarks))


def difference_interval(result: BenchmarkResult, base: BenchmarkResult) -> dict[int, tuple[float, float]]:
    """95 % interval of `result - base` for each common k, paired over problems; empty where the problems differ."""
    if result.ids != base.ids or not result.ids:
        return {}
    common = [k for k in result.pass_at_k if k in base.pass_at_k]
    columns = [list(result.pass_at_k).index(k) for k in common]
    base_columns = [list(base.pass_at_k).index(k) for k in common]
    low, high = interval(result.per_problem[:, columns] - base.per_problem[:, base_columns])
    return {k: (float(low[index]), float(high[index])) for index, k in enumerate(common)}


def _load_run(path: Path, name: str) -> RunData:
    run = RunDirectory(path)
    damaged: list[str] = []

    def attempt(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except UserError as error:
            damaged.append(str(error).replace(f"{path}/", ""))
            return None

    evaluations = [attempt(partial(_read_evaluation, run.evaluation(step))) for step in run.evaluation_steps()]
    samples = (attempt(partial(read_samples, run.samples(step))) for step in reversed(run.sample_steps()))
    return RunData(
        name=name,
        run=run,
        config=_read_config(run.config),
        metrics=attempt(partial(read_metrics, run.metrics)) or [],
        evaluations=[evaluation for evaluation in evaluations if evaluation is not None],
        samples=next((rows for rows in samples if rows), []),
        environment=attempt(partial(_read_object, run.environment)) if run.environment.is_file() else None,
        state=attempt(partial(read_state, run)),
        damaged=damaged,
    )


def _lacks(run: RunData) -> list[str]:
    lines = []
    if run.state is not None and run.state.status != "done":
        reason = f": {run.state.reason}" if run.state.reason else ""
        lines.append(f"{run.state.status} at step {run.state.step} of {run.config.get('run.steps', 'an unknown number')}{reason}")
    if not run.metrics:
        lines.append("no training step (metrics.jsonl)")
    if not run.evaluations:
        lines.append("no evaluation (eval/step_N.json)")
    elif run.steps > run.evaluations[-1].step > 0:
        lines.append(f"last evaluated at step {run.evaluations[-1].step} of the {run.steps} done")
    lines += [f"no counts per problem for {name}, hence no interval" for name in benchmark_names([run]) if not _has_intervals(run, name)]
    if run.metrics and not run.samples and run.objective != SUPERVISED:
        lines.append("no responses to read (samples/step_N.parquet)")
    if run.environment is None:
        lines.append("no versions (environment.json)")
    return lines


def _has_intervals(run: RunData, benchmark: str) -> bool:
    result = run.final(benchmark)
    return result is not None and bool(result.intervals)


def _read_config(path: Path) -> dict[str, Any]:
    # Not validated against the schema: a report also compares runs of earlier versions.
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: not a config ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a config (no mapping of sections)")
    return flatten({str(key): value for key, value in values.items()})


def _read_evaluation(path: Path) -> EvaluationResult:
    content = _read_object(path)
    try:
        benchmarks = {name: _parse_benchmark(result) for name, result in content["benchmarks"].items()}
        return EvaluationResult(content["step"], content.get("heldout_entropy"), benchmarks)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not an evaluation ({type(error).__name__}: {error})") from None


def _parse_benchmark(content: Mapping[str, Any]) -> BenchmarkResult:
    problems = content.get("problems", [])
    correct, total = ([int(problem[key]) for problem in problems] for key in ("correct", "n"))
    if "pass_at_k" not in content:
        raise KeyError("pass_at_k")
    return BenchmarkResult(
        n=int(content.get("n") or 0),
        ids=tuple(str(problem["id"]) for problem in problems),
        correct=tuple(correct),
        total=tuple(total),
        curve=_parse_curve(content, *PASS_KEYS),
        vote=_parse_curve(content, *VOTE_KEYS),
        greedy=content.get("greedy_accuracy"),
        no_verdict=int(content.get("no_verdict") or 0),
        groups={
            column: {value: Group(int(scores["problems"]), _parse_curve(scores, *PASS_KEYS)) for value, scores in groups.items()}
            for column, groups in content.get("groups", {}).items()
        },
    )


def _parse_curve(content: Mapping[str, Any], value: str, low: str, high: str) -> Curve:
    values, lows, highs = ({int(k): float(share) for k, share in content.get(key, {}).items()} for key in (value, low, high))
    return Curve({k: values[k] for k in sorted(values)}, {k: (lows[k], highs[k]) for k in values if k in lows and k in highs})


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
