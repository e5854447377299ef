"""The report of runs: one HTML page that needs nothing else, the Pass@k table for a terminal, and the Pass@k picture.

May import: observability, types, jinja2 and rich.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from rich.table import Table

from megatron_nsr import __version__
from megatron_nsr.evaluation.report_data import BenchmarkResult, RunData, benchmark_names, difference_interval, load_runs
from megatron_nsr.evaluation.report_figures import evaluation_figures, pass_at_k_picture, time_figures, training_figures
from megatron_nsr.observability.plots import color_of, write_png
from megatron_nsr.observability.run_directory import write_atomic
from megatron_nsr.observability.samples import SampleRow
from megatron_nsr.types import Outcome, UserError

SHOWN_KS = 4  # columns of Pass@k in a table, from the smallest to the largest k
SHOWN_SAMPLES = 3  # of each kind and run
NO_VALUE = "–"


@dataclass(frozen=True)
class Cell:
    """A number as text, and below it what sets it apart from the first run's."""

    value: str
    difference: str = ""
    interval: str = ""


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Writes one self-contained HTML page that compares the runs, in the given order, with the first one.

    Whatever a run lacks (evaluations, samples, metrics) is left out. Raises UserError naming an argument that is no run directory.
    """
    data = load_runs(runs)
    if not out.absolute().parent.is_dir():
        raise UserError(f"out={out}: no directory {out.parent}")
    environment = Environment(
        loader=PackageLoader("megatron_nsr.evaluation", "."),
        autoescape=select_autoescape(["j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        version=__version__,
        title=", ".join(run.name for run in data),
        colors={run.name: color_of(index) for index, run in enumerate(data)},
        runs=data,
        summaries=[(name, _shown_ks(data, name), _summary_rows(data, name)) for name in benchmark_names(data) or [""]],
        sections=[
            ("Held-out problems", evaluation_figures(data)),
            ("Training", training_figures(data)),
            ("Time", time_figures(data)),
        ],
        samples=[(run.name, run.samples[0].step, _samples_to_read(run.samples)) for run in data if run.samples],
        differences=config_differences(data),
        environments=_environments(data),
    )
    write_atomic(out, page)


def render_pass_at_k_table(runs: Sequence[Path]) -> Table:
    """The final Pass@k and held-out entropy of each run as a table for a terminal; raises UserError as `write_report` does."""
    data = load_runs(runs)
    benchmarks = benchmark_names(data)
    shown = sorted({k for benchmark in benchmarks for k in _shown_ks(data, benchmark)})
    table = Table(title="Pass@k on held-out problems")
    for column in ("run", *(["benchmark"] if len(benchmarks) > 1 else [])):
        table.add_column(column, overflow="fold")
    for column in ("steps", *(f"Pass@{k}" for k in shown), "entropy"):
        table.add_column(column, justify="right")
    for benchmark in benchmarks or [""]:
        for run in data:
            result = run.final(benchmark)
            values = [_ratio(result.pass_at_k.get(k) if result else None) for k in shown]
            names = [run.name, benchmark] if len(benchmarks) > 1 else [run.name]
            table.add_row(*names, str(run.steps), *values, _number(run.final_entropy))
    return table


def write_pass_at_k_figure(runs: Sequence[Path], out_png: Path) -> None:
    """Draws each run's final Pass@k curve with its 95 % band, one panel a benchmark.

    Raises UserError where an argument is no run directory, or no run was evaluated.
    """
    data = load_runs(runs)
    if not benchmark_names(data):
        raise UserError(f"runs {', '.join(str(path) for path in runs)}: none holds an evaluation (eval/step_N.json)")
    write_png(pass_at_k_picture(data), out_png)


def config_differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of every config field in which the runs differ, `run.dir` aside."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "run.dir")
    rows = [(key, [_setting(run.config, key) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _shown_ks(runs: Sequence[RunData], benchmark: str) -> list[int]:
    """At most SHOWN_KS of the ks that any run has, evenly over their order, both ends included."""
    ks = sorted({k for run in runs if (result := run.final(benchmark)) for k in result.pass_at_k})
    if len(ks) <= SHOWN_KS:
        return ks
    return [ks[round(index * (len(ks) - 1) / (SHOWN_KS - 1))] for index in range(SHOWN_KS)]


def _summary_rows(runs: Sequence[RunData], benchmark: str) -> list[tuple[RunData, list[Cell]]]:
    """For each run its Pass@k cells in the order of `_shown_ks`, then held-out entropy."""
    shown = _shown_ks(runs, benchmark)
    base = runs[0]
    rows = []
    for run in runs:
        cells = _pass_cells(run.final(benchmark), base.final(benchmark) if run is not base else None, shown)
        entropy = Cell(_number(run.final_entropy), _difference(run.final_entropy, base.final_entropy) if run is not base else "")
        rows.append((run, [*cells, entropy]))
    return rows


def _pass_cells(result: BenchmarkResult | None, base: BenchmarkResult | None, shown: Sequence[int]) -> list[Cell]:
    intervals = difference_interval(result, base) if result and base else {}
    cells = []
    for k in shown:
        value = result.pass_at_k.get(k) if result else None
        difference = _difference(value, base.pass_at_k.get(k), factor=100, digits=1) if base else ""
        interval = " to ".join(_signed(100 * bound, 1) for bound in intervals[k]) if k in intervals else ""
        cells.append(Cell(_ratio(value), difference, interval))
    return cells


def _samples_to_read(rows: Sequence[SampleRow]) -> list[SampleRow]:
    """The first few correct, wrong and ungraded samples of different prompts where there are as many."""
    chosen = []
    for outcome in Outcome:
        fitting = [row for row in rows if row.outcome == outcome.value]
        by_prompt = list({row.prompt_id: row for row in reversed(fitting)}.values())[::-1]
        chosen += (by_prompt + [row for row in fitting if row not in by_prompt])[:SHOWN_SAMPLES]
    return chosen


def _environments(runs: Sequence[RunData]) -> list[tuple[str, str]]:
    """(names of the runs, environment as indented JSON), one for each distinct environment; the time is not part of it."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        if run.environment is not None:
            content = {key: value for key, value in run.environment.items() if key != "time"}
            groups.setdefault(json.dumps(content, indent=2, ensure_ascii=False), []).append(run.name)
    return [(", ".join(names), content) for content, names in groups.items()]


def _setting(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key], ensure_ascii=False) if key in config else NO_VALUE


def _ratio(value: float | None) -> str:
    return NO_VALUE if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.3f}"


def _difference(value: float | None, base: float | None, factor: float = 1, digits: int = 3) -> str:
    return "" if value is None or base is None else _signed(factor * (value - base), digits)


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # adding zero turns -0.0 into 0.0
