"""The tables of a report: Pass@k with intervals, metrics, config differences, versions, and the responses to read.

May import: observability and types.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from megatron_nsr.evaluation.report_data import BenchmarkResult, RunData, bootstrap_band, difference_interval
from megatron_nsr.evaluation.report_panels import logged_metrics
from megatron_nsr.observability.metrics import metric_meaning
from megatron_nsr.observability.run_directory import flatten
from megatron_nsr.observability.samples import SampleRow
from megatron_nsr.types import Outcome

SHOWN_KS = 4  # columns of Pass@k in the first table, from the smallest to the largest k
SHOWN_SAMPLES = 3  # of each kind and run
SHOWN_CHARACTERS = 6000  # of a prompt or response; the middle of a longer one is left out
LAST_VALUES = 10  # that a metric's number is the mean of
NO_VALUE = "–"


@dataclass(frozen=True)
class Cell:
    """A number as text, and below it its interval or what sets it apart from the first run's."""

    value: str
    notes: tuple[str, ...] = ()


def shown_ks(runs: Sequence[RunData], benchmark: str) -> list[int]:
    """At most SHOWN_KS of the ks that any run has, evenly over their order, both ends included."""
    ks = _all_ks(runs, benchmark)
    if len(ks) <= SHOWN_KS:
        return ks
    return [ks[round(index * (len(ks) - 1) / (SHOWN_KS - 1))] for index in range(SHOWN_KS)]


def summary_rows(runs: Sequence[RunData], benchmark: str) -> list[tuple[RunData, list[Cell]]]:
    """For each run its Pass@k cells in the order of `shown_ks`, then held-out entropy, with their differences to the first run."""
    shown = shown_ks(runs, benchmark)
    base = runs[0]
    rows = []
    for run in runs:
        other = None if run is base else base
        cells = _difference_cells(run.final(benchmark), other.final(benchmark) if other else None, shown)
        entropy = _difference(run.final_entropy, other.final_entropy) if other else ()
        rows.append((run, [*cells, Cell(number_text(run.final_entropy), entropy)]))
    return rows


def curve_rows(runs: Sequence[RunData], benchmark: str) -> tuple[list[int], list[tuple[RunData, list[Cell]]]]:
    """All ks, and for each run that was evaluated its Pass@k with the 95 % interval in percent."""
    ks = _all_ks(runs, benchmark)
    return ks, [(run, _interval_cells(result, ks)) for run in runs if (result := run.final(benchmark))]


def metric_rows(runs: Sequence[RunData]) -> list[tuple[str, str, list[str]]]:
    """(name, meaning, for each run the mean of the last LAST_VALUES logged values) of every logged metric."""
    return [
        (name, metric_meaning(name) or "not a metric of this version", [_last_mean(run.curve(name)[1]) for run in runs])
        for name in logged_metrics(runs)
    ]


def config_differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of every config field in which the runs differ, `run.dir` aside."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "run.dir")
    return _unequal([(key, [_setting(run.config, key) for run in runs]) for key in keys])


def environment_rows(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of everything in environment.json but the time; one value where all runs have the same."""
    flat = [flatten(run.environment or {}) for run in runs]
    keys = dict.fromkeys(key for environment in flat for key in environment if key != "time")
    rows = [(key, [_setting(environment, key) for environment in flat]) for key in keys]
    return [(key, values if len(set(values)) > 1 else values[:1]) for key, values in rows]


def samples_to_read(rows: Sequence[SampleRow]) -> list[SampleRow]:
    """The first few correct, wrong and ungraded samples, of different prompts where there are as many, cut to a readable length."""
    chosen = []
    for outcome in Outcome:
        fitting = [row for row in rows if row.outcome == outcome.value]
        by_prompt = list({row.prompt_id: row for row in reversed(fitting)}.values())[::-1]
        chosen += (by_prompt + [row for row in fitting if row not in by_prompt])[:SHOWN_SAMPLES]
    return [replace(row, prompt=_without_middle(row.prompt), response=_without_middle(row.response)) for row in chosen]


def ratio_text(value: float | None) -> str:
    """A share in percent."""
    return NO_VALUE if value is None else f"{100 * value:.1f} %"


def number_text(value: float | None) -> str:
    """A number of nats."""
    return NO_VALUE if value is None else f"{value:.3f}"


def _all_ks(runs: Sequence[RunData], benchmark: str) -> list[int]:
    return sorted({k for run in runs if (result := run.final(benchmark)) for k in result.pass_at_k})


def _difference_cells(result: BenchmarkResult | None, base: BenchmarkResult | None, ks: Sequence[int]) -> list[Cell]:
    intervals = difference_interval(result, base) if result and base else {}
    cells = []
    for k in ks:
        value = result.pass_at_k.get(k) if result else None
        difference = _difference(value, base.pass_at_k.get(k), factor=100, digits=1) if base else ()
        interval = (" to ".join(_signed(100 * bound, 1) for bound in intervals[k]),) if k in intervals else ()
        cells.append(Cell(ratio_text(value), difference + interval))
    return cells


def _interval_cells(result: BenchmarkResult, ks: Sequence[int]) -> list[Cell]:
    bounds = dict(zip(result.pass_at_k, zip(*bootstrap_band(result), strict=True), strict=True)) if result.ids else {}
    return [
        Cell(
            NO_VALUE if k not in result.pass_at_k else f"{100 * result.pass_at_k[k]:.1f}",
            (f"{100 * bounds[k][0]:.1f} to {100 * bounds[k][1]:.1f}",) if k in bounds else (),
        )
        for k in ks
    ]


def _unequal(rows: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _last_mean(values: Sequence[float]) -> str:
    return f"{fmean(values[-LAST_VALUES:]):.4g}" if values else NO_VALUE


def _without_middle(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[-half:]}"


def _setting(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else NO_VALUE


def _difference(value: float | None, base: float | None, factor: float = 1, digits: int = 3) -> tuple[str, ...]:
    return () if value is None or base is None else (_signed(factor * (value - base), digits),)


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # adding zero turns -0.0 into 0.0
