"""Many evaluations side by side: one table for a terminal, all numbers as CSV or JSON, one picture.

May import: observability, types, this package, numpy and rich.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_nsr.evaluation.bootstrap import interval
from megatron_nsr.evaluation.pass_at_k import pass_at_k
from megatron_nsr.evaluation.report_data import run_names
from megatron_nsr.evaluation.results import CONS_KEYS, PASS_KEYS
from megatron_nsr.observability.plots import PALETTE, Line, color_of, panels_figure, write_png
from megatron_nsr.observability.run_directory import RunDirectory, write_atomic
from megatron_nsr.types import UserError

SHOWN_KS = 4  # columns of Pass@k in the terminal; the files have every k
NO_VALUE = "–"
COLUMNS = (
    *("evaluation", "step", "benchmark", "group", "measure", "k", "value", "low", "high", "problems", "n"),
    *("difference", "difference_low", "difference_high"),
)


@dataclass(frozen=True)
class Evaluated:
    """One eval/step_N.json. benchmarks: name to its entry, as evaluation/results.py describes it."""

    label: str
    step: int
    benchmarks: Mapping[str, Mapping[str, Any]]


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
    for name in benchmark_names(evaluations):
        entries = {item.label: item.benchmarks[name] for item in evaluations if name in item.benchmarks}
        ks = _shown({int(k) for entry in entries.values() for k in entry["pass_at_k"]})
        table = Table(show_lines=True)
        table.add_column("evaluation", overflow="fold")
        for column in ("n", *(f"Pass@{k}" for k in ks), "cons@n"):
            table.add_column(column, justify="right", no_wrap=True)
        for label, entry in entries.items():
            largest = max((int(k) for k in entry.get("cons_at_k", {})), default=0)
            table.add_row(label, str(entry["n"]), *(_cell(entry, PASS_KEYS, k) for k in ks), _cell(entry, CONS_KEYS, largest))
        counts = sorted({len(entry["problems"]) for entry in entries.values()})
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
        for name, entry in item.benchmarks.items():
            base = next(other.benchmarks[name] for other in evaluations if name in other.benchmarks)
            common = {"evaluation": item.label, "step": item.step, "benchmark": name, "n": entry["n"]}
            everything = {**entry, "problems": len(entry["problems"])}
            records += _group_records(common, "all", everything, {} if base is entry else _differences(entry, base))
            for column, values in entry.get("groups", {}).items():
                for value, scores in values.items():
                    records += _group_records(common, f"{column}={value}", scores, {})
    return records


def _group_records(
    common: Mapping[str, Any], group: str, scores: Mapping[str, Any], differences: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """differences: by k, of Pass@k."""
    records = []
    for measure, keys in (("pass", PASS_KEYS), ("cons", CONS_KEYS)):
        for k in scores.get(keys[0], {}):
            value, low, high = (scores.get(key, {}).get(k) for key in keys)
            row = {
                "group": group,
                "problems": scores["problems"],
                "measure": measure,
                "k": int(k),
                "value": value,
                "low": low,
                "high": high,
            }
            compared = differences.get(k, {}) if measure == "pass" else {}
            records.append({**dict.fromkeys(COLUMNS), **common, **row, **compared})
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
        name: [_line(index, item, item.benchmarks[name]) for index, item in enumerate(evaluations) if name in item.benchmarks]
        for name in benchmark_names(evaluations)
    }
    write_png(panels_figure(panels, x_label="k", y_label="Pass@k", x_scale="log2"), path)


def benchmark_names(evaluations: Sequence[Evaluated]) -> list[str]:
    """Every benchmark, in the order of first appearance."""
    return list(dict.fromkeys(name for item in evaluations for name in item.benchmarks))


def _line(index: int, item: Evaluated, entry: Mapping[str, Any]) -> Line:
    value, low, high = (list(entry.get(key, {}).values()) for key in PASS_KEYS)
    ks = [int(k) for k in entry["pass_at_k"]]
    again = index >= len(PALETTE)  # its colours begin again
    return Line(item.label, ks, value, color_of(index), dashed=again, low=low or None, high=high or None)


def _differences(entry: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By k: the difference of Pass@k and its paired interval; empty where the problems differ."""
    if not entry["problems"] or [p["id"] for p in entry["problems"]] != [p["id"] for p in base["problems"]]:
        return {}
    ks = [k for k in entry["pass_at_k"] if k in base["pass_at_k"]]
    difference = _per_problem(entry, ks) - _per_problem(base, ks)
    columns = np.stack([difference.mean(axis=0), *interval(difference)]).T.tolist()
    return {k: dict(zip(COLUMNS[-3:], column, strict=True)) for k, column in zip(ks, columns, strict=True)}


def _per_problem(entry: Mapping[str, Any], ks: Sequence[str]) -> np.ndarray:
    """float64 [problems, ks]"""
    return np.array([[pass_at_k(problem["correct"], problem["n"], int(k)) for k in ks] for problem in entry["problems"]])


def _shown(ks: set[int]) -> list[int]:
    """At most SHOWN_KS of them, evenly over their order, both ends included."""
    ordered = sorted(ks)
    if len(ordered) <= SHOWN_KS:
        return ordered
    return [ordered[round(index * (len(ordered) - 1) / (SHOWN_KS - 1))] for index in range(SHOWN_KS)]


def _cell(entry: Mapping[str, Any], keys: Sequence[str], k: int) -> str:
    value, low, high = (entry.get(key, {}).get(str(k)) for key in keys)
    if value is None:
        return NO_VALUE
    band = "" if low is None or high is None else f"\n{100 * low:.1f}–{100 * high:.1f}"
    return f"{100 * value:.1f}{band}"


def _read(path: Path, label: str) -> Evaluated:
    if not path.is_file():
        raise UserError(f"{path}: no such file or directory; name run directories, or files in the form of eval/step_N.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        benchmarks = {name: _entry(entry) for name, entry in content["benchmarks"].items()}
        return Evaluated(label, int(content["step"]), benchmarks)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path}: not an evaluation ({type(error).__name__}: {error})") from None


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with its k in order and, where an earlier version left them out, its intervals."""
    problems = entry.get("problems", [])
    values = {k: float(entry["pass_at_k"][k]) for k in sorted(entry["pass_at_k"], key=int)}
    complete = {**entry, "n": int(entry["n"]), "pass_at_k": values, "problems": problems}
    if "ci_low" not in entry and problems:
        low, high = interval(_per_problem(complete, list(values)))
        complete |= {"ci_low": dict(zip(values, low.tolist(), strict=True)), "ci_high": dict(zip(values, high.tolist(), strict=True))}
    return complete


def _check_suffix(field: str, path: Path, *suffixes: str) -> None:
    if path.suffix not in suffixes:
        raise UserError(f"{field}={path}: its name must end in {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{field}={path}: no directory {path.parent}")
