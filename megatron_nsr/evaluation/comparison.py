"""Many evaluations side by side: one table for a terminal, all numbers as CSV or JSON, one picture.

May import: observability, types, this package and rich.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_nsr.evaluation.evaluation_files import (
    NO_VALUE,
    BenchmarkResult,
    Curve,
    EvaluationResult,
    benchmark_names,
    difference,
    read_evaluation,
    shown_ks,
)
from megatron_nsr.evaluation.report_data import run_names
from megatron_nsr.observability.plots import PALETTE, Line, color_of, panels_figure, write_png
from megatron_nsr.observability.run_directory import RunDirectory, write_atomic
from megatron_nsr.types import UserError

NUMBERS = ("value", "low", "high", "difference", "difference_low", "difference_high")
COLUMNS = ("evaluation", "step", "benchmark", "group", "measure", "k", *NUMBERS[:3], "problems", "n", *NUMBERS[3:])
NO_CURVE = Curve({}, {})


@dataclass(frozen=True)
class Evaluated:
    """One eval/step_N.json. label: what tells it from the others."""

    label: str
    result: EvaluationResult

    @property
    def benchmarks(self) -> Mapping[str, BenchmarkResult]:
        return self.result.benchmarks


def load_evaluations(paths: Sequence[Path]) -> list[Evaluated]:
    """Reads files in the form of eval/step_N.json, and for each run directory all of its evaluations, in the given order.

    Raises UserError naming the argument or file that is missing or no evaluation.
    """
    found = []
    for path, name in zip(paths, run_names(paths), strict=True):
        if not path.is_dir():
            found.append(_read(path, name.removesuffix(".json")))
            continue
        run = RunDirectory(path)
        steps = run.evaluation_steps()
        if not steps:
            raise UserError(f"{path}: holds no evaluation (eval/step_N.json); name a run directory that was evaluated, or such a file")
        found += [_read(run.evaluation(step), f"{name}, step {step}" if len(steps) > 1 else name) for step in steps]
    return found


def render_comparison(evaluations: Sequence[Evaluated]) -> RenderableType:
    """For each benchmark a table with a row an evaluation: Pass@k over its 95 % interval, and cons@k at the largest k, in per cent."""
    parts: list[RenderableType] = []
    for name in benchmark_names(item.result for item in evaluations):
        results = {item.label: item.benchmarks[name] for item in evaluations if name in item.benchmarks}
        ks = shown_ks(k for result in results.values() for k in result.pass_at_k)
        table = Table(show_lines=True)
        table.add_column("evaluation", overflow="fold")
        for column in ("n", *(f"Pass@{k}" for k in ks), "cons@n"):
            table.add_column(column, justify="right", no_wrap=True)
        for label, result in results.items():
            cells = [*(_cell(result.curve, k) for k in ks), _cell(result.vote, max(result.vote.values, default=0))]
            table.add_row(label, str(result.n or NO_VALUE), *cells)
        counts = sorted({len(result.ids) for result in results.values()})
        parts += [Text(f"{name}: {' or '.join(map(str, counts))} problems; per cent, and 95 % intervals"), table]
    return Group(*parts)


def comparison_records(evaluations: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """One record of COLUMNS for each evaluation, benchmark, group of problems, measure (pass or cons) and k.

    group: all, or a column and its value as `level=Level 1`. low, high: 95 % bootstrap interval over problems. difference: to the
    first evaluation that has the benchmark, with its interval paired over problems; for group all and measure pass, where the problems are
    the same. What does not exist is None.
    """
    records = []
    for item in evaluations:
        for name, result in item.benchmarks.items():
            base = next(other.benchmarks[name] for other in evaluations if name in other.benchmarks)
            compared = NO_CURVE if base is result else difference(result, base)
            common = {"evaluation": item.label, "step": item.result.step, "benchmark": name, "n": result.n or None}
            everything = {**common, "group": "all", "problems": len(result.ids)}
            records += [*_records(everything, "pass", result.curve, compared), *_records(everything, "cons", result.vote, NO_CURVE)]
            for column, groups in result.groups.items():
                for value, group in groups.items():
                    part = {**common, "group": f"{column}={value}", "problems": group.problems}
                    records += [*_records(part, "pass", group.curve, NO_CURVE), *_records(part, "cons", group.vote, NO_CURVE)]
    return records


def _records(common: Mapping[str, Any], measure: str, curve: Curve, compared: Curve) -> list[dict[str, Any]]:
    """compared: the difference of `curve` to another one, as far as there is one."""
    records = []
    for k, value in curve.values.items():
        low, high = curve.intervals.get(k, (None, None))
        numbers = (value, low, high, compared.values.get(k), *compared.intervals.get(k, (None, None)))
        row = {**common, "measure": measure, "k": k, **dict(zip(NUMBERS, numbers, strict=True))}
        records.append({column: row[column] for column in COLUMNS})
    return records


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes a .csv or .json file, atomically; raises UserError for another suffix."""
    _check_suffix("out", path, ".csv", ".json")
    if path.suffix == ".json":
        write_atomic(path, json.dumps(list(records), indent=1) + "\n")
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomic(path, text.getvalue())


def write_picture(path: Path, evaluations: Sequence[Evaluated]) -> None:
    """Draws the Pass@k curves with their bands as a .png, one panel a benchmark; raises UserError for another suffix."""
    _check_suffix("plot", path, ".png")
    panels = {
        name: [_line(index, item.label, item.benchmarks[name].curve) for index, item in enumerate(evaluations) if name in item.benchmarks]
        for name in benchmark_names(item.result for item in evaluations)
    }
    write_png(panels_figure(panels, x_label="k", y_label="Pass@k", x_scale="log2"), path)


def _line(index: int, label: str, curve: Curve) -> Line:
    low, high = curve.band()
    again = index >= len(PALETTE)  # its colours begin again
    return Line(label, list(curve.values), list(curve.values.values()), color_of(index), dashed=again, low=low, high=high)


def _cell(curve: Curve, k: int) -> str:
    if k not in curve.values:
        return NO_VALUE
    low, high = curve.intervals.get(k, (None, None))
    band = "" if low is None or high is None else f"\n{100 * low:.1f}–{100 * high:.1f}"
    return f"{100 * curve.values[k]:.1f}{band}"


def _read(path: Path, label: str) -> Evaluated:
    if not path.is_file():
        raise UserError(f"{path}: no such file or directory; name run directories, or files in the form of eval/step_N.json")
    return Evaluated(label, read_evaluation(path))


def _check_suffix(field: str, path: Path, *suffixes: str) -> None:
    if path.suffix not in suffixes:
        raise UserError(f"{field}={path}: its name must end in {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{field}={path}: no directory {path.parent}")
