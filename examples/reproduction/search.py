"""The search for each method's learning rate, on validation problems. May import: results.

The score is the mean over k of Pass@k, so that neither end of the curve decides alone; bases and seeds are averaged first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from examples.reproduction.results import MethodResult


def score(run: MethodResult) -> float:
    """Mean of Pass@1..64 over the powers of two, after the run's last step."""
    return float(run.evaluations[-1].table.mean())


def scores(runs: Sequence[MethodResult]) -> dict[str, dict[float, float]]:
    """Mean score by method and learning rate, over bases and seeds."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        found.setdefault(run.method, {}).setdefault(run.learning_rate, []).append(score(run))
    return {method: {rate: sum(each) / len(each) for rate, each in sorted(rates.items())} for method, rates in found.items()}


def chosen_rates(runs: Sequence[MethodResult]) -> Mapping[str, float]:
    """Each method's best learning rate; of equal ones the smaller."""
    return {method: max(rates, key=lambda rate: rates[rate]) for method, rates in scores(runs).items()}
