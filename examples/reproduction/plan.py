"""What the reproduction compares: the puzzle, the methods, and the training runs of each scale.

May import: the quickstart's task and jobs. Every run is an ordinary `megatron-nsr train` on a file of configs/reproduction.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.quickstart.corpus import Author
from examples.quickstart.jobs import CONFIGS, Job
from examples.quickstart.prepare import prepare
from examples.quickstart.puzzle import Ranges
from megatron_nsr.observability.run_directory import RunDirectory

BASE_CONFIG, OBJECTIVES_CONFIG = CONFIGS / "reproduction" / "base.yaml", CONFIGS / "reproduction" / "objectives.yaml"
CRITIC_RATE_FACTOR = 10  # PPO's critic learns faster than its policy, as in the package's defaults
# Each method with what the paper gives to it alone.
METHODS: dict[str, tuple[str, ...]] = {
    "psr": (),
    "nsr": (),
    "w_reinforce": (),
    "reinforce": (),
    "grpo": ("objective.kl_coefficient=1e-3",),
    "ppo": ("objective.kl_coefficient=1e-3",),
}
LONG_METHODS = ("nsr", "w_reinforce")  # of the extended-training curve


@dataclass(frozen=True, slots=True)
class Task:
    """A puzzle, and how far its base model is trained."""

    ranges: Ranges
    base_steps: int
    author: Author = field(default_factory=Author)
    train: int = 256
    validation: int = 100
    test: int = 200

    def prepare(self, out: Path, corpus_size: int) -> None:
        """Writes OUT/data and OUT/model."""
        prepare(out, self.ranges, self.author, corpus_size, train=self.train, validation=self.validation, test=self.test)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run. bases, seeds: seeds of pre-training and of reinforcement learning; rates: each method's learning rate, or
    None where the search decides; samples: the n of Pass@k; every: steps between evaluations.
    """

    name: str
    task: Task
    bases: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    long_steps: int
    every: int
    samples: int
    base_samples: int = 256
    corpus_size: int = 30_000
    methods: tuple[str, ...] = tuple(METHODS)
    rates: Mapping[str, float] | None = None
    search_rates: tuple[float, ...] = ()
    search_seeds: tuple[int, ...] = ()

    def describe(self) -> dict[str, Any]:
        """What the page says of it, as JSON values."""
        task = self.task
        return {
            "numbers": task.ranges.numbers,
            "largest_operand": task.ranges.largest_operand,
            "largest_value": task.ranges.largest_value,
            "operators": task.ranges.operators,
            "right": task.author.right,
            "box_wrong": task.author.box_wrong,
            "slip": task.author.slip,
            "base_steps": task.base_steps,
            "train": task.train,
            "validation": task.validation,
            "test": task.test,
            "seeds": list(self.seeds),
            "methods": list(self.methods),
            "steps": self.steps,
            "long_steps": self.long_steps,
            "samples": self.samples,
        }

    def steps_of(self, method: str) -> int:
        return self.long_steps if method in LONG_METHODS else self.steps


@dataclass(frozen=True, slots=True)
class BaseRun:
    """The pre-training of one base model."""

    base: int
    job: Job


@dataclass(frozen=True, slots=True)
class MethodRun:
    """One reinforcement learning run."""

    base: int
    method: str
    seed: int
    learning_rate: float
    steps: int
    job: Job


def base_runs(scale: Scale, out: Path, split: str = "test") -> list[BaseRun]:
    """One run a base; its evaluation is on `split`."""
    runs = []
    for base in scale.bases:
        overrides = (
            *(f"model.path={out / 'model'}", f"data.train={out / 'data' / 'corpus.jsonl'}"),
            *(f"run.seed={base}", f"run.steps={scale.task.base_steps}", f"evaluation.samples={scale.base_samples}"),
        )
        runs.append(BaseRun(base, _job(out, f"base_{base}/base", BASE_CONFIG, split, overrides)))
    return runs


def comparison_runs(scale: Scale, out: Path, rates: Mapping[str, float]) -> list[MethodRun]:
    """Every method on every base with every seed, evaluated on the test problems. A seed is complete before the next one begins."""
    runs = [
        _method_run(scale, out, base, method, seed, rates[method], scale.steps_of(method), f"{method}/seed_{seed}", "test", scale.every)
        for base in scale.bases
        for seed in scale.seeds
        for method in scale.methods
    ]
    return sorted(runs, key=lambda run: (run.seed, run.steps))


def search_runs(scale: Scale, out: Path) -> list[MethodRun]:
    """Every method with every candidate rate, with seeds of its own, evaluated on the validation problems after the last step."""
    return [
        _method_run(scale, out, base, method, seed, rate, scale.steps, f"search/{method}_{rate:g}/seed_{seed}", "validation", 0)
        for base in scale.bases
        for method in scale.methods
        for rate in scale.search_rates
        for seed in scale.search_seeds
    ]


def jobs_of(runs: Sequence[BaseRun] | Sequence[MethodRun]) -> list[Job]:
    return [run.job for run in runs]


def _method_run(
    scale: Scale, out: Path, base: int, method: str, seed: int, rate: float, steps: int, name: str, split: str, every: int
) -> MethodRun:
    critic = (f"critic.learning_rate={CRITIC_RATE_FACTOR * rate:g}",) if method == "ppo" else ()  # no other method has one
    overrides = (
        *(f"objective.name={method}", *METHODS[method], f"optimizer.learning_rate={rate:g}", *critic),
        *(f"model.path={out / f'base_{base}' / 'base' / 'hf'}", f"data.train={out / 'data' / 'train.jsonl'}"),
        # No two runs draw alike: a run that shares its draws with another would count as half a run.
        *(f"run.seed={1000 * base + seed}", f"run.steps={steps}", f"evaluation.every={every}", f"evaluation.samples={scale.samples}"),
    )
    return MethodRun(base, method, seed, rate, steps, _job(out, f"base_{base}/{name}", OBJECTIVES_CONFIG, split, overrides))


def _job(out: Path, name: str, config: Path, split: str, overrides: tuple[str, ...]) -> Job:
    benchmarks = ("evaluation.benchmarks.test=null",) if split != "test" else ()
    benchmark = f"evaluation.benchmarks.{split}={out / 'data' / f'{split}.jsonl'}"
    command = (sys.executable, "-m", "megatron_nsr", "train", str(config), f"run.dir={out / name}", *overrides, *benchmarks, benchmark)
    return Job(name, command, RunDirectory(out / name), out / "logs" / f"{name.replace('/', '-')}.log")
