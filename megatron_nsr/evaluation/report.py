"""The report of runs: one HTML page that needs nothing else, and the Pass@k table.

May import: observability, types, jinja2 and rich.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from rich.table import Table

from megatron_nsr import __version__
from megatron_nsr.evaluation.evaluation_files import benchmark_names, shown_ks
from megatron_nsr.evaluation.report_data import RunData, load_runs
from megatron_nsr.evaluation.report_figures import heldout_entropy_figures, pass_at_k_figures, time_figures
from megatron_nsr.evaluation.report_panels import engine_figures, learning_figures, other_figures, sign_figures, speed_figures
from megatron_nsr.evaluation.report_tables import (
    all_ks,
    config_differences,
    curve_rows,
    environment_rows,
    group_tables,
    metric_rows,
    number_text,
    ratio_text,
    samples_to_read,
    summary_tables,
)
from megatron_nsr.observability.plots import MARKERS, color_of, css_color, marker_of, theme_variables
from megatron_nsr.observability.run_directory import write_atomic
from megatron_nsr.types import UserError


def write_report(runs: Sequence[Path], out: Path) -> list[str]:
    """Writes one self-contained HTML page that compares the runs, in the given order, with the first one.

    Returns a line for everything that a run lacks (evaluations, samples, metrics) and the page therefore leaves out; the page has the
    same lines. Raises UserError naming an argument that is no run directory.
    """
    data = load_runs(runs)
    if not out.absolute().parent.is_dir():
        raise UserError(f"out={out}: no directory {out.parent}")
    if out.is_dir():
        raise UserError(f"out={out}: is a directory; name a file")
    environment = Environment(
        loader=PackageLoader("megatron_nsr.evaluation", "."),
        autoescape=select_autoescape(["j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    benchmarks = benchmark_names(evaluation for run in data for evaluation in run.evaluations)
    page = environment.get_template("report.html.j2").render(
        version=__version__,
        themes=[theme_variables(dark=False), theme_variables(dark=True)],
        keys={run.name: (css_color(color_of(index)), MARKERS[marker_of(index)]) for index, run in enumerate(data)},
        runs=data,
        summaries=summary_tables(data, benchmarks),
        benchmarks=[(name, pass_at_k_figures(data, name), *curve_rows(data, name), group_tables(data, name)) for name in benchmarks],
        sections=[
            ("learning", "Learning", [*heldout_entropy_figures(data), *learning_figures(data)]),
            ("signs", "The two signs", sign_figures(data)),
            ("engine", "Engine and optimizer", engine_figures(data)),
            ("time", "Time", [*time_figures(data), *speed_figures(data)]),
        ],
        others=other_figures(data),
        samples=[(run.name, run.samples[0].step, samples_to_read(run.samples)) for run in data if run.samples],
        differences=config_differences(data),
        metrics=metric_rows(data),
        environments=environment_rows(data),
    )
    write_atomic(out, page)
    return _missing_lines(data)


def render_pass_at_k_table(runs: Sequence[Path]) -> Table:
    """The final Pass@k and held-out entropy of each run as a table for a terminal; raises UserError as `write_report` does."""
    data = load_runs(runs)
    benchmarks = benchmark_names(evaluation for run in data for evaluation in run.evaluations)
    shown = sorted({k for benchmark in benchmarks for k in shown_ks(all_ks(data, benchmark))})
    table = Table(title="Pass@k on held-out problems")
    for column in ("run", *(["benchmark"] if len(benchmarks) > 1 else [])):
        table.add_column(column, overflow="fold")
    for column in ("steps", *(f"Pass@{k}" for k in shown), "entropy"):
        table.add_column(column, justify="right")
    for benchmark in benchmarks or [""]:
        for run in data:
            result = run.final(benchmark)
            if result is None and len(benchmarks) > 1:
                continue
            values = [ratio_text(result.pass_at_k.get(k) if result else None) for k in shown]
            names = [run.name, benchmark] if len(benchmarks) > 1 else [run.name]
            table.add_row(*names, str(run.steps), *values, number_text(run.final_entropy) if len(benchmarks) < 2 else "")
    for run in data if len(benchmarks) > 1 else ():  # entropy is a mean over all of a run's benchmarks
        table.add_row(run.name, "all", str(run.steps), *("" for _ in shown), number_text(run.final_entropy))
    return table


def _missing_lines(runs: Sequence[RunData]) -> list[str]:
    return [f"{run.name}: {line}" for run in runs for line in run.missing]
