"""The figures of a report on held-out problems and on time: which numbers of the runs each one shows, and its caption.

May import: observability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_nsr.evaluation.evaluation_files import BenchmarkResult, Curve, difference
from megatron_nsr.evaluation.report_data import RunData, prompts_remark, step_limits, step_runs
from megatron_nsr.observability.metrics import METRICS
from megatron_nsr.observability.plots import (
    FILLED_BANDS,
    WIDE,
    Line,
    Scale,
    banded,
    bars_figure,
    color_of,
    css_color,
    line_figure,
    marker_of,
    same_curve,
    smoothing_window,
    stacked_bars_figure,
    to_svg,
)

PHASES = tuple(name for name in METRICS if name.startswith("time/") and name != "time/step_s")
VOTES = (
    "Share of problems whose most frequent answer among k samples is correct. All correct answers count as one; wrong ones as one if they"
    " are equal numbers or texts, or math-verify finds them equal (with another grader: equal texts). Samples without an answer do not"
    " vote; answers with equally many votes share the problem."
)
INTERVALS = "95 % intervals by bootstrap over problems"


@dataclass(frozen=True)
class LegendEntry:
    label: str
    color: str  # CSS


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the page. svg, and wide for a place of two columns: trusted markup made by matplotlib; everything else is text.

    legend: of colours that do not stand for runs; those of the runs have one legend a section.
    """

    title: str
    caption: str
    svg: str
    wide: str = ""
    legend: tuple[LegendEntry, ...] = ()


def pass_at_k_figures(runs: Sequence[RunData], benchmark: str) -> list[ReportFigure]:
    """Pass@k against k, its difference to the first run and its way over the steps, and cons@k, each where there is something to draw."""
    lines = pass_at_k_lines(runs, benchmark)
    unjudged = sum(result.no_verdict for run in runs if (result := run.final(benchmark)))
    lost = f" {unjudged} samples have no verdict and count as not correct." if unjudged else ""
    caption = f"Last evaluation of each run: {_counts(runs, benchmark)}.{lost} Bands are {INTERVALS}; k is on a log2 axis."
    curve = line_panel(f"Pass@k on {benchmark}", caption, lines, x_label="k", y_label="Pass@k, %", x_scale="log2", wide=True)
    return [curve, *_differences(runs, benchmark), *_pass_over_steps(runs, benchmark), *_votes(runs, benchmark)]


def heldout_entropy_figures(runs: Sequence[RunData]) -> list[ReportFigure]:
    """Held-out entropy against steps, or as bars where every run was evaluated once; empty without any."""
    curves = []
    for index, run in enumerate(runs):
        points = [(evaluation.step, evaluation.heldout_entropy) for evaluation in run.evaluations if evaluation.heldout_entropy is not None]
        if points:
            curves.append((run, run_line(index, run.name, [step for step, _ in points], [value for _, value in points])))
    if not curves:
        return []
    caption = f"heldout/entropy: {METRICS['heldout/entropy']}.{prompts_remark(runs)}"
    lines, remark = _over_steps(runs, curves)
    if lines:
        return [step_panel("Held-out entropy", caption + remark, lines, y_label="nats a token", limits=step_limits(step_runs(runs)))]
    figure = bars_figure(
        [line.label for _, line in curves], [line.y[0] for _, line in curves], [line.color for _, line in curves], x_label="nats a token"
    )
    alt = "Bars of held-out entropy: " + ", ".join(f"{line.label} {line.y[0]:.3g}" for _, line in curves)
    return [ReportFigure("Held-out entropy", caption, to_svg(figure, alt))]


def time_figures(runs: Sequence[RunData]) -> list[ReportFigure]:
    """Mean seconds of a step by phase, one bar a run; empty where nothing was timed."""
    timed = [run for run in runs if any(_mean_seconds(run, phase) > 0 for phase in PHASES)]
    phases = [phase for phase in PHASES if any(_mean_seconds(run, phase) > 0 for run in timed)]
    if not timed:
        return []
    parts = {phase: [_mean_seconds(run, phase) for run in timed] for phase in phases}
    figure = stacked_bars_figure([run.name for run in timed], parts, x_label="seconds a step, mean over the run")
    totals = ", ".join(f"{run.name} {sum(_mean_seconds(run, phase) for phase in phases):.3g} s" for run in timed)
    names = [phase.removeprefix("time/").removesuffix("_s").replace("_", " ") for phase in phases]
    legend = tuple(LegendEntry(name, css_color(color_of(index))) for index, name in enumerate(names))
    caption = f"Wall time by phase, in all: {totals}. Evaluation and checkpoints are spread over all steps."
    return [ReportFigure("Time of a step", caption, to_svg(figure, f"Bars of the mean time of a step by phase: {totals}"), legend=legend)]


def pass_at_k_lines(runs: Sequence[RunData], benchmark: str) -> list[Line]:
    """Each run's last Pass@k curve on a benchmark in percent, with its band where the file holds it or the counts per problem."""
    results = [run.final(benchmark) for run in runs]
    return _curves(runs, [result.curve if result else None for result in results])


def run_line(index: int, label: str, x: Sequence[float], y: Sequence[float], *, dashed: bool = False) -> Line:
    """A line in the colour and with the marker of the index-th run."""
    return Line(label, x, y, color_of(index), marker_of(index), dashed=dashed)


def step_panel(
    title: str, caption: str, lines: Sequence[Line], *, y_label: str, limits: tuple[float, float], y_scale: Scale = "linear"
) -> ReportFigure:
    """A panel against training steps; limits: the first and last step of its axis."""
    return line_panel(title, caption, lines, x_label="training step", y_label=y_label, y_scale=y_scale, x_limits=limits)


def line_panel(
    title: str,
    caption: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_scale: Scale = "linear",
    y_scale: Scale = "linear",
    wide: bool = False,
    zero: bool = False,
    x_limits: tuple[float, float] | None = None,
) -> ReportFigure:
    """A figure of lines whose description names where each one ends."""
    ends = ", ".join(f"{line.label} ends at {line.y[-1]:.3g}" for line in lines)
    alt = f"{title}: {y_label} against {x_label}; {ends}"
    window = smoothing_window(lines)
    if window > 1:
        caption += f" Thin: every value; thick: running mean of {window}."
    if len(banded(lines)) > FILLED_BANDS:
        caption += " Of each band the two edges are drawn, thin, in the run's colour."
    covered = [line.label for index, line in enumerate(lines) if any(same_curve(line, later) for later in lines[index + 1 :])]
    if covered:
        caption += f" Drawn wider, because another line covers it: {'; '.join(covered)}."

    def draw(**size: tuple[float, float]) -> str:
        figure = line_figure(
            lines, x_label=x_label, y_label=y_label, x_scale=x_scale, y_scale=y_scale, zero=zero, x_limits=x_limits, **size
        )
        return to_svg(figure, alt)

    return ReportFigure(title, caption, draw(), draw(size=WIDE) if wide else "")


def _curves(runs: Sequence[RunData], curves: Sequence[Curve | None]) -> list[Line]:
    """A line for each run whose curve holds something, in percent; the band is NaN where an interval is not known."""
    lines = []
    for index, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        if curve is None or not curve.values:
            continue
        line = run_line(index, run.name, list(curve.values), [100 * value for value in curve.values.values()])
        low, high = curve.band()
        if low and high:
            line = replace(line, low=[100 * share for share in low], high=[100 * share for share in high])
        lines.append(line)
    return lines


def _votes(runs: Sequence[RunData], benchmark: str) -> list[ReportFigure]:
    """The accuracy of a majority vote among k samples, where the grader names answers."""
    results = [run.final(benchmark) for run in runs]
    lines = _curves(runs, [result.vote if result else None for result in results])
    if not lines:
        return []
    caption = f"{VOTES} Bands are {INTERVALS}."
    return [line_panel(f"cons@k on {benchmark}", caption, lines, x_label="k", y_label="cons@k, %", x_scale="log2")]


def _differences(runs: Sequence[RunData], benchmark: str) -> list[ReportFigure]:
    """Pass@k less the first run's, in points, of the runs that were evaluated on the same problems."""
    base = runs[0].final(benchmark)
    results = [None, *(run.final(benchmark) for run in runs[1:])]
    compared = [difference(result, base) if result and base else None for result in results]
    lines = _curves(runs, [curve if curve and curve.intervals else None for curve in compared])
    if not lines:
        return []
    title = f"{benchmark}: difference to {runs[0].name}"
    caption = f"Pass@k less that of {runs[0].name}, in percentage points. Bands are {INTERVALS}, paired: one without 0 is a difference."
    return [line_panel(title, caption, lines, x_label="k", y_label="points", x_scale="log2", zero=True)]


def _pass_over_steps(runs: Sequence[RunData], benchmark: str) -> list[ReportFigure]:
    """Pass@1 and Pass@largest k against training steps, where a run was evaluated more than once."""
    curves, largest_ks = [], set()
    for index, run in enumerate(runs):
        results = [
            (evaluation.step, evaluation.benchmarks[benchmark]) for evaluation in run.evaluations if benchmark in evaluation.benchmarks
        ]
        results = [(step, result) for step, result in results if result.pass_at_k]
        if not results:
            continue
        steps, largest = [step for step, _ in results], max(results[-1][1].pass_at_k)
        largest_ks.add(largest)
        for k, dashed in ((1, False), (largest, True)):
            values = [100 * result.pass_at_k.get(k, float("nan")) for _, result in results]
            curves.append((run, run_line(index, f"{run.name}, k = {k}", steps, values, dashed=dashed)))
    lines, remark = _over_steps(runs, curves)
    if not lines:
        return []
    caption = f"Solid: k = 1; dashed: k = {' or '.join(map(str, sorted(largest_ks)))}.{remark}"
    limits = step_limits(step_runs(runs))
    return [step_panel(f"{benchmark} over training", caption, lines, y_label="Pass@k, %", limits=limits)]


def _over_steps(runs: Sequence[RunData], curves: Sequence[tuple[RunData, Line]]) -> tuple[list[Line], str]:
    """Each run's line against training steps, and a remark on those that are levels; no lines where none has two points.

    A run that took none of the axis's steps is a level at its last value, without markers: nothing was measured along it.
    """
    if all(len(line.x) < 2 for _, line in curves):
        return [], ""
    moving = step_runs(runs)
    names = {run.name for run in moving}
    lines = [line if run.name in names else replace(line, x=step_limits(moving), y=[line.y[-1]] * 2, marker="") for run, line in curves]
    levels = ", ".join(dict.fromkeys(run.name for run, _ in curves if run.name not in names))
    return lines, f" Level, without markers: {levels}, of none of these steps." if levels else ""


def _counts(runs: Sequence[RunData], benchmark: str) -> str:
    """`100 problems, n = 64 samples each`, run by run where they differ."""
    counts = {run.name: _count(result) for run in runs if (result := run.final(benchmark))}
    if len(set(counts.values())) == 1:
        return next(iter(counts.values()))
    return "; ".join(f"{name} {count}" for name, count in counts.items())


def _count(result: BenchmarkResult) -> str:
    samples = " to ".join(str(n) for n in sorted({min(result.total), max(result.total)})) if result.total else str(result.n or "unknown")
    return f"{len(result.ids) or 'unknown'} problems, n = {samples} samples each"


def _mean_seconds(run: RunData, phase: str) -> float:
    """Seconds of a phase over all steps of the run: one that runs at some steps only counts as nothing at the others."""
    _, seconds = run.curve(phase)
    return sum(seconds) / len(run.metrics) if run.metrics else 0.0
