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

from megatron_nsr.evaluation.pass_at_k import pass_at_k
from megatron_nsr.observability.metrics import read_metrics
from megatron_nsr.observability.run_directory import RunDirectory, flatten
from megatron_nsr.observability.samples import SampleRow, read_samples
from megatron_nsr.observability.state import RunState, read_state
from megatron_nsr.types import UserError

T = TypeVar("T")
SUPERVISED = "supervised"  # the objective that samples nothing while it trains
RESAMPLES = 1000
BOOTSTRAP_SEED = 20250601
CHUNK = 100  # resamples drawn at once: [CHUNK, problems] counts live in memory


@dataclass(frozen=True)
class BenchmarkResult:
    """Pass@k of one benchmark. n: samples a problem, 0 where unknown; ids, correct, total: one entry a problem."""

    n: int
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


def bootstrap_band(result: BenchmarkResult) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean Pass@k over problems drawn with replacement: low, high, float64 [ks]."""
    return _interval(result.per_problem)


def difference_interval(result: BenchmarkResult, base: BenchmarkResult) -> dict[int, tuple[float, float]]:
    """95 % interval of `result - base` for each common k, paired over problems; empty where the problems differ."""
    if result.ids != base.ids or not result.ids:
        return {}
    common = [k for k in result.pass_at_k if k in base.pass_at_k]
    columns = [list(result.pass_at_k).index(k) for k in common]
    base_columns = [list(base.pass_at_k).index(k) for k in common]
    low, high = _interval(result.per_problem[:, columns] - base.per_problem[:, base_columns])
    return {k: (float(low[index]), float(high[index])) for index, k in enumerate(common)}


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles 2.5 and 97.5 of the bootstrapped column means of [problems, columns], NaN entries left out."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    problems = len(values)
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    means = []
    for _ in range(RESAMPLES // CHUNK):
        counts = generator.multinomial(problems, np.full(problems, 1 / problems), size=CHUNK).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append((counts @ filled) / (counts @ known))
    low, high = np.nanpercentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return low, high


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
    lines += [f"no counts per problem for {name}, hence no interval" for name in benchmark_names([run]) if not _counted(run.final(name))]
    if run.metrics and not run.samples and run.objective != SUPERVISED:
        lines.append("no responses to read (samples/step_N.parquet)")
    if run.environment is None:
        lines.append("no versions (environment.json)")
    return lines


def _counted(result: BenchmarkResult | None) -> bool:
    return result is not None and bool(result.ids)


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
        n=int(content.get("n") or 0),
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
