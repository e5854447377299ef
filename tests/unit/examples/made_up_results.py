"""Results of the reproduction that were never measured: their truth is known. May import: the reproduction, numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from examples.reproduction.results import BaseResult, Evaluation, MethodResult, Results
from examples.reproduction.scales import SCALES

PROBLEMS, SAMPLES, STEPS, LONG = 100, 512, 10, 20
# What the paper describes, as a method's (share of problems it can solve, chance of a right response there, entropy).
PAPER = {
    "psr": (0.75, 0.75, 0.02),
    "nsr": (0.95, 0.45, 0.30),
    "w_reinforce": (0.97, 0.50, 0.25),
    "reinforce": (0.90, 0.48, 0.15),
    "grpo": (0.88, 0.48, 0.20),
}
START, DEGRADED = (0.92, 0.30, 0.32), (0.60, 0.40, 0.28)
Shape = tuple[float, float, float]


def evaluation(step: int, shape: Shape, seed: int) -> Evaluation:
    """Counts that a model of this shape gives, with the luck of `seed`."""
    solvable, chance, entropy = shape
    generator = np.random.default_rng(seed)
    # The same problems are hard for all: the first ones are solvable.
    counts = [int(generator.binomial(SAMPLES, chance if index < solvable * PROBLEMS else 0.0)) for index in range(PROBLEMS)]
    return Evaluation(step, SAMPLES, entropy + 0.004 * float(generator.standard_normal()), tuple(counts))


def results(shapes: Mapping[str, Shape] = PAPER, late: Mapping[str, Shape] | None = None, bases: int = 2, seeds: int = 3) -> Results:
    late = {"nsr": DEGRADED} if late is None else late
    runs = []
    for base in range(1, bases + 1):
        for index, (method, shape) in enumerate(shapes.items()):
            for seed in range(1, seeds + 1):
                luck = 1000 * base + 100 * index + 10 * seed
                evaluations = [evaluation(STEPS, shape, luck)]
                if method in ("nsr", "w_reinforce"):
                    evaluations.append(evaluation(LONG, late.get(method, shape), luck + 1))
                runs.append(MethodResult(base, method, seed, 1e-4, tuple(evaluations)))
    plan = SCALES["full"].describe() | {"steps": STEPS, "long_steps": LONG}
    return Results(
        settings=plan,
        bases=tuple(BaseResult(base, evaluation(0, START, base)) for base in range(1, bases + 1)),
        runs=tuple(runs),
        search=(),
        cost={"wall_s": 120.0, "cpu_s": 180.0},
        environment={"hardware": {"cores": 2, "cpu": "some"}, "git": {"commit": "0123456789abcdef"}},
    )
