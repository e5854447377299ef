"""The numbers of a comparison: read from its run directories, and kept as one JSON file from which page and figures are made.

May import: the plan, megatron_nsr.evaluation.pass_at_k, megatron_nsr.observability, numpy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from examples.reproduction.plan import BaseRun, MethodRun
from megatron_nsr.evaluation.pass_at_k import default_ks, pass_at_k
from megatron_nsr.observability.run_directory import RunDirectory, write_json
from megatron_nsr.types import UserError

KS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: correct responses of each problem out of n, and the entropy on the same problems, nats a token."""

    step: int
    n: int
    entropy: float
    correct: tuple[int, ...]

    @cached_property
    def table(self) -> np.ndarray:
        """Pass@k, float64 [problems, len(KS)]."""
        return np.array([[pass_at_k(correct, self.n, k) for k in KS] for correct in self.correct])


@dataclass(frozen=True)
class BaseResult:
    base: int
    evaluation: Evaluation


@dataclass(frozen=True)
class MethodResult:
    """A finished run; evaluations ascend by step."""

    base: int
    method: str
    seed: int
    learning_rate: float
    evaluations: tuple[Evaluation, ...]

    def at(self, step: int) -> Evaluation:
        """Raises UserError where the run was not evaluated at that step."""
        for evaluation in self.evaluations:
            if evaluation.step == step:
                return evaluation
        steps = [evaluation.step for evaluation in self.evaluations]
        raise UserError(f"{self.method}, base {self.base}, seed {self.seed}: no evaluation at step {step}, only at {steps}")


@dataclass(frozen=True)
class Results:
    """A whole comparison. settings: what was run, for the page; cost: seconds of wall clock and CPU, measured."""

    settings: dict[str, Any]
    bases: tuple[BaseResult, ...]
    runs: tuple[MethodResult, ...]
    search: tuple[MethodResult, ...]
    cost: dict[str, float]
    environment: dict[str, Any]

    @property
    def steps(self) -> int:
        """The step of the comparison at equal steps."""
        return int(self.settings["steps"])

    @property
    def methods(self) -> list[str]:
        """In the order of the plan."""
        return [name for name in self.settings["methods"] if any(run.method == name for run in self.runs)]

    def of(self, method: str) -> list[MethodResult]:
        """A method's runs by base and seed: the same order for every method."""
        return sorted((run for run in self.runs if run.method == method), key=lambda run: (run.base, run.seed))

    def base(self, base: int) -> Evaluation:
        return next(result.evaluation for result in self.bases if result.base == base)


def read_base(run: BaseRun, split: str = "test") -> BaseResult:
    """The base's last evaluation, as step 0 of what starts from it."""
    last = read_evaluations(run.job.run, split)[-1]
    return BaseResult(run.base, Evaluation(0, last.n, last.entropy, last.correct))


def read_method(run: MethodRun, split: str = "test") -> MethodResult:
    return MethodResult(run.base, run.method, run.seed, run.learning_rate, read_evaluations(run.job.run, split))


def read_evaluations(run: RunDirectory, split: str) -> tuple[Evaluation, ...]:
    """Every RUN/eval/step_N.json, ascending. Raises UserError naming the file that does not hold what is needed, or the run without any."""
    found = []
    for step in run.evaluation_steps():
        path = run.evaluation(step)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            scores = content["benchmarks"][split]
            correct = tuple(int(problem["correct"]) for problem in scores["problems"])
            found.append(Evaluation(step, int(scores["n"]), float(content["heldout_entropy"]), correct))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not an evaluation on {split} ({type(error).__name__}: {error})") from None
    if not found:
        raise UserError(f"{run.path}: holds no evaluation; run the comparison first")
    return tuple(found)


def write_results(path: Path, results: Results) -> None:
    write_json(path, asdict(results))


def read_results(path: Path) -> Results:
    """Raises UserError where the file is not one that `write_results` wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Results(
            settings=content["settings"],
            bases=tuple(BaseResult(item["base"], _evaluation(item["evaluation"])) for item in content["bases"]),
            runs=_runs(content["runs"]),
            search=_runs(content["search"]),
            cost=content["cost"],
            environment=content["environment"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the results of a comparison ({type(error).__name__}: {error})") from None


def read_candidates(path: Path) -> list[dict[str, Any]]:
    """The candidate puzzles, each with the mean Pass@k of its base. Raises UserError where the file is another one."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["candidates"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the candidates' results ({error})") from None
    return rows


def full_curve(evaluation: Evaluation) -> dict[int, float]:
    """Mean Pass@k at every power of two up to n, beyond KS where there are samples for it."""
    problems = len(evaluation.correct)
    return {k: sum(pass_at_k(correct, evaluation.n, k) for correct in evaluation.correct) / problems for k in default_ks(evaluation.n)}


def _runs(items: Sequence[dict[str, Any]]) -> tuple[MethodResult, ...]:
    return tuple(MethodResult(**(item | {"evaluations": tuple(_evaluation(each) for each in item["evaluations"])})) for item in items)


def _evaluation(item: dict[str, Any]) -> Evaluation:
    return Evaluation(item["step"], item["n"], item["entropy"], tuple(item["correct"]))
