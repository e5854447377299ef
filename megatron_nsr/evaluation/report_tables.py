"""The tables of a report: Pass@k with intervals, metrics, config differences, versions, and the responses to read.

May import: observability, types and this package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from megatron_nsr.evaluation.evaluation_files import NO_VALUE, BenchmarkResult, Curve, Group, difference, shown_ks
from megatron_nsr.evaluation.report_data import RunData, same_prompts
from megatron_nsr.evaluation.report_panels import logged_metrics
from megatron_nsr.observability.metrics import metric_meaning
from megatron_nsr.observability.run_directory import flatten
from megatron_nsr.observability.samples import SampleRow
from megatron_nsr.types import Outcome

SHOWN_SAMPLES = 3  # of each kind and run
SHOWN_CHARACTERS = 6000  # of a prompt or response; the middle of a longer one is left out
LAST_STEPS = 10  # of a run, that a metric's number is the mean over


@dataclass(frozen=True)
class Cell:
    """A number as text, and below it its interval or what sets it apart from the first run's."""

    value: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SummaryTable:
    """rows: a run and a cell a column."""

    benchmark: str
    columns: list[str]
    rows: list[tuple[RunData, list[Cell]]]


@dataclass(frozen=True)
class GroupTable:
    """Pass@1, and as a note Pass@k at the largest k. rows: value of `column`, its problems, a cell a run."""

    column: str
    largest_k: int
    rows: list[tuple[str, str, list[Cell]]]


def all_ks(runs: Sequence[RunData], benchmark: str) -> list[int]:
    """Every k that some run has."""
    return sorted({k for run in runs if (result := run.final(benchmark)) for k in result.pass_at_k})


def summary_tables(runs: Sequence[RunData], benchmarks: Sequence[str]) -> list[SummaryTable]:
    """One of all runs with what belongs to no benchmark, and one of each benchmark with the runs that have it; a single one is both."""
    if len(benchmarks) == 1:
        return [summary_table(runs, benchmarks[0], entropy=True)]
    tables = [summary_table(runs, name, entropy=False) for name in benchmarks]
    return [summary_table(runs, "", entropy=True), *(replace(t, rows=[r for r in t.rows if r[0].final(t.benchmark)]) for t in tables)]


def summary_table(runs: Sequence[RunData], benchmark: str, *, entropy: bool) -> SummaryTable:
    """The last evaluations' numbers with their differences to the first run; benchmark: may be none's name, for its own columns alone."""
    shown = shown_ks(all_ks(runs, benchmark))
    results = [run.final(benchmark) for run in runs]
    greedy = any(result is not None and result.greedy is not None for result in results)
    columns = [*(f"Pass@{k}" for k in shown), *(["greedy"] if greedy else []), *(["held-out entropy, nats"] if entropy else [])]
    rows = []
    for run, result in zip(runs, results, strict=True):
        base = None if run is runs[0] else results[0]
        cells = _difference_cells(result, base, shown)
        if greedy:
            cells.append(Cell(ratio_text(result.greedy if result else None)))
        if entropy:
            comparable = run is not runs[0] and same_prompts(run, runs[0])
            notes = _difference(run.final_entropy, runs[0].final_entropy) if comparable else ()
            cells.append(Cell(number_text(run.final_entropy), notes))
        rows.append((run, cells))
    return SummaryTable(benchmark, columns, rows)


def curve_rows(runs: Sequence[RunData], benchmark: str) -> tuple[list[int], list[tuple[RunData, list[Cell]]]]:
    """All ks, and for each run that was evaluated its Pass@k with the 95 % interval in percent."""
    ks = all_ks(runs, benchmark)
    return ks, [(run, _interval_cells(result.curve, ks)) for run in runs if (result := run.final(benchmark))]


def group_tables(runs: Sequence[RunData], benchmark: str) -> list[GroupTable]:
    """A table for each of the columns level, type and subject that any run's last evaluation was split by."""
    results = [run.final(benchmark) for run in runs]
    by_column: dict[str, dict[str, list[Group | None]]] = {}
    for index, result in enumerate(results):
        for column, groups in (result.groups if result else {}).items():
            for value, group in groups.items():
                by_column.setdefault(column, {}).setdefault(value, [None] * len(runs))[index] = group
    largest = max(all_ks(runs, benchmark), default=1)
    return [
        GroupTable(
            column, largest, [(value, _problems(groups), [_group_cell(g, largest) for g in groups]) for value, groups in rows.items()]
        )
        for column, rows in by_column.items()
    ]


def metric_rows(runs: Sequence[RunData]) -> list[tuple[str, str, list[str]]]:
    """(name, meaning, a number for each run) of every logged metric but Pass@k.

    The number is the mean over the run's last LAST_STEPS steps, or the last value where these have none.
    """
    names = [name for name in logged_metrics(runs) if "/pass@" not in name]
    return [(name, metric_meaning(name) or "not a metric of this version", [_last_mean(run, name) for run in runs]) for name in names]


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


def _difference_cells(result: BenchmarkResult | None, base: BenchmarkResult | None, ks: Sequence[int]) -> list[Cell]:
    intervals = difference(result, base).intervals if result and base else {}
    cells = []
    for k in ks:
        value = result.pass_at_k.get(k) if result else None
        points = _difference(value, base.pass_at_k.get(k), factor=100, digits=1) if base else ()
        interval = (" to ".join(_signed(100 * bound, 1) for bound in intervals[k]),) if k in intervals else ()
        cells.append(Cell(ratio_text(value), points + interval))
    return cells


def _interval_cells(curve: Curve, ks: Sequence[int]) -> list[Cell]:
    notes = {k: (" to ".join(f"{100 * bound:.1f}" for bound in bounds),) for k, bounds in curve.intervals.items()}
    return [Cell(f"{100 * curve.values[k]:.1f}" if k in curve.values else NO_VALUE, notes.get(k, ())) for k in ks]


def _problems(groups: Sequence[Group | None]) -> str:
    return " or ".join(str(count) for count in sorted({group.problems for group in groups if group}))


def _group_cell(group: Group | None, k: int) -> Cell:
    if group is None:
        return Cell(NO_VALUE)
    first, last = (f"{100 * group.curve.values[at]:.1f}" if at in group.curve.values else NO_VALUE for at in (1, k))
    return Cell(first, (last,))


def _unequal(rows: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _last_mean(run: RunData, name: str) -> str:
    steps, values = run.curve(name)
    recent = [value for step, value in zip(steps, values, strict=True) if step > run.steps - LAST_STEPS] or values[-1:]
    return f"{fmean(recent):.4g}" if recent else NO_VALUE


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
