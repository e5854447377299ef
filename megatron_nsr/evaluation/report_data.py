"""Reads what a report needs from run directories, and the Pass@k bands and differences computed from it.

May import: observability, types and numpy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class BenchmarkResult:
    """Pass@k of one benchmark. ids, correct, total: one entry a problem."""

    pass_at_k: Mapping[int, float]
    ids: tuple[str, ...]
    correct: tuple[int, ...]
    total: tuple[int, ...]

    @cached_property
    def per_problem(self) -> np.ndarray:
        """float64 [problems, ks] in the order of `pass_at_k`; NaN where a problem has fewer samples than k."""
        rows = [
            [pass_at_k(correct, total, k) if k <= total else math.nan for k in self.pass_at_k]
            for correct, total in zip(self.correct, self.total, strict=True)
        ]
        return np.array(rows).reshape(len(self.ids), len(self.pass_at_k))


@dataclass(frozen=True)
class EvaluationResult:
    """One eval/step_N.json."""

    step: int
    heldout_entropy: float | None
    benchmarks: Mapping[str, BenchmarkResult]


@dataclass(frozen=True)
class RunData:
    """Everything of a run that a report shows. config: dotted keys; samples: the last kept step's."""

    name: str
    run: RunDirectory
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[EvaluationResult]
    samples: Sequence[SampleRow]
    environment: Mapping[str, Any] | None
    state: RunState | None

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

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged and finite."""
        points = [(record["step"], record[name]) for record in self.metrics if record.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]


def load_runs(paths: Sequence[Path]) -> list[RunData]:
    """Reads run directories in the given order.

    Raises UserError naming the argument that is missing or no run, or the file that cannot be read.
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


def bootstrap_band(result: BenchmarkResult) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean Pass@k over problems drawn with replacement: low, high, float64 [ks]."""
    return interval(result.per_problem)


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
    sample_steps = run.sample_steps()
    return RunData(
        name=name,
        run=run,
        config=_read_config(run.config),
        metrics=read_metrics(run.metrics),
        evaluations=[_read_evaluation(run.evaluation(step)) for step in run.evaluation_steps()],
        samples=read_samples(run.samples(sample_steps[-1])) if sample_steps else [],
        environment=_read_object(run.environment) if run.environment.is_file() else None,
        state=read_state(run),
    )


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
    return BenchmarkResult(
        pass_at_k={int(k): value for k, value in sorted(content["pass_at_k"].items(), key=lambda item: int(item[0]))},
        ids=tuple(str(problem["id"]) for problem in problems),
        correct=tuple(int(problem["correct"]) for problem in problems),
        total=tuple(int(problem["n"]) for problem in problems),
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
