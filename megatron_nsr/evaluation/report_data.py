"""Reads what a report needs from run directories, whatever state they are in.

May import: observability, types and this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_nsr.evaluation.evaluation_files import BenchmarkResult, EvaluationResult, benchmark_names, read_evaluation, read_object
from megatron_nsr.observability.metrics import read_metrics
from megatron_nsr.observability.run_directory import RunDirectory, flatten
from megatron_nsr.observability.samples import SampleRow, read_samples
from megatron_nsr.observability.state import RunState, read_state
from megatron_nsr.types import UserError

T = TypeVar("T")
SUPERVISED = "supervised"  # the objective that samples nothing while it trains


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
    def final_heldout(self) -> EvaluationResult | None:
        """The last evaluation that measured held-out entropy."""
        found = [evaluation for evaluation in self.evaluations if evaluation.heldout_entropy is not None]
        return found[-1] if found else None

    @property
    def final_entropy(self) -> float | None:
        return self.final_heldout.heldout_entropy if self.final_heldout else None

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


def step_runs(runs: Sequence[RunData]) -> list[RunData]:
    """The runs that have values over training steps; supervised ones, whose steps are others, only where there are no others."""
    moving = [run for run in runs if run.metrics or len(run.evaluations) > 1]
    return [run for run in moving if run.objective != SUPERVISED] or moving


def step_limits(runs: Sequence[RunData]) -> tuple[float, float]:
    """The ends of the axis of these runs' training steps, the same for every panel."""
    return 0, max([1, *(run.steps for run in runs), *(evaluation.step for run in runs for evaluation in run.evaluations)])


def same_prompts(run: RunData, other: RunData) -> bool:
    """Whether the runs' held-out entropies are over the same prompts, and known to be."""
    mine, theirs = run.final_heldout, other.final_heldout
    return mine is not None and theirs is not None and mine.prompts is not None and mine.prompts == theirs.prompts


def prompts_remark(runs: Sequence[RunData]) -> str:
    """A sentence for a panel of held-out numbers that do not compare; empty where they do."""
    groups: list[list[RunData]] = []
    for run in runs:
        if run.final_heldout:
            fitting = next((group for group in groups if same_prompts(group[0], run)), None)
            if fitting is None:
                groups.append([run])
            else:
                fitting.append(run)
    if len(groups) < 2:
        return ""
    names = " | ".join(", ".join(run.name for run in group) for group in groups)
    return f" Measured on different prompts, so levels do not compare between: {names}."


def run_names(paths: Sequence[Path]) -> list[str]:
    """The shortest trailing part of each path, at least its last name, that tells it from the others."""
    parts = [path.absolute().resolve().parts for path in paths]
    names = []
    for mine in parts:
        others = [other for other in parts if other != mine]
        length = next((n for n in range(1, len(mine)) if all(other[-n:] != mine[-n:] for other in others)), len(mine))
        names.append("/".join(mine[-length:]))
    return names


def _load_run(path: Path, name: str) -> RunData:
    run = RunDirectory(path)
    damaged: list[str] = []

    def attempt(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except UserError as error:
            damaged.append(str(error).replace(f"{path}/", ""))
            return None

    evaluations = [attempt(partial(read_evaluation, run.evaluation(step))) for step in run.evaluation_steps()]
    samples = (attempt(partial(read_samples, run.samples(step))) for step in reversed(run.sample_steps()))
    return RunData(
        name=name,
        run=run,
        config=_read_config(run.config),
        metrics=attempt(partial(read_metrics, run.metrics)) or [],
        evaluations=[evaluation for evaluation in evaluations if evaluation is not None],
        samples=next((rows for rows in samples if rows), []),
        environment=attempt(partial(read_object, run.environment)) if run.environment.is_file() else None,
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
    lines += _without_interval(run)
    if run.metrics and not run.samples and run.objective != SUPERVISED:
        lines.append("no responses to read (samples/step_N.parquet)")
    if run.environment is None:
        lines.append("no versions (environment.json)")
    return lines


def _without_interval(run: RunData) -> list[str]:
    results = {name: run.final(name) for name in benchmark_names(run.evaluations)}
    return [
        f"{'a single problem in' if result.ids else 'no counts per problem for'} {name}, hence no interval"
        for name, result in results.items()
        if result and not result.curve.intervals
    ]


def _read_config(path: Path) -> dict[str, Any]:
    # Not validated against the schema: a report also compares runs of earlier versions.
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: not a config ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a config (no mapping of sections)")
    return flatten({str(key): value for key, value in values.items()})
