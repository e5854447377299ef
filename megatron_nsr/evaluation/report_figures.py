"""The figures of a report: which numbers of the runs each one shows, with its legend and caption.

May import: observability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from megatron_nsr.evaluation.report_data import RunData, benchmark_names, bootstrap_band
from megatron_nsr.observability.metrics import METRICS
from megatron_nsr.observability.plots import Line, Scale, bars_figure, color_of, line_figure, panels_figure, stacked_bars_figure, to_svg

SUPERVISED_LOSS = "supervised/loss"
# title, y label, scale of y, metrics: the second of a pair is dashed.
TRAINING_FIGURES: tuple[tuple[str, str, Scale, tuple[str, ...]], ...] = (
    ("Supervised loss", "nats a token", "linear", (SUPERVISED_LOSS,)),
    ("Correct responses", "ratio", "linear", ("reward/correct_ratio",)),
    ("Fully solved prompts", "ratio", "linear", ("reward/fully_solved_ratio",)),
    ("Policy entropy", "nats a token", "linear", ("policy/entropy",)),
    ("Loss by sign", "nats", "linear", ("policy/loss_psr", "policy/loss_nsr")),
    ("Clip fraction by sign", "ratio", "linear", ("policy/clip_fraction_psr", "policy/clip_fraction_nsr")),
    ("Log-prob gap, engine to policy", "nats", "log", ("rollout/logprob_gap_mean", "rollout/logprob_gap_max")),
    ("Response length", "tokens", "linear", ("rollout/response_tokens_mean",)),
)
PHASES = ("rollout", "reward", "old_logprobs", "update", "weight_sync", "eval", "checkpoint", "other")
LEVELS = "A run evaluated once is drawn as a level."
SIGN_LABELS = {"_psr": "correct", "_nsr": "wrong", "_mean": "mean", "_max": "largest"}


@dataclass(frozen=True)
class LegendEntry:
    label: str
    color: str
    style: str = "solid"  # CSS: solid or dashed


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the page. svg: trusted markup made by matplotlib; everything else is text."""

    title: str
    caption: str
    svg: str
    legend: tuple[LegendEntry, ...]


def evaluation_figures(runs: Sequence[RunData]) -> list[ReportFigure]:
    """Pass@k of every benchmark, its way over the steps, and held-out entropy, each where there is something to draw."""
    figures = []
    for benchmark in benchmark_names(runs):
        lines = pass_at_k_lines(runs, benchmark)
        title = f"Pass@k on {benchmark}"
        caption = "Last evaluation of each run; bands are 95 % bootstrap intervals over problems."
        figures.append(_line_panel(title, caption, lines, x_label="k", y_label="Pass@k", x_scale="log2"))
    for benchmark in benchmark_names(runs):
        figures += _pass_over_steps(runs, benchmark)
    return figures + _heldout_entropy(runs)


def training_figures(runs: Sequence[RunData]) -> list[ReportFigure]:
    """The training curves that any of the runs logged. Steps of supervised and of reinforcement learning share no axis."""
    reinforced = [run.name for run in runs if not run.curve(SUPERVISED_LOSS)[0]] or [run.name for run in runs]
    figures = []
    for title, unit, scale, metrics in TRAINING_FIGURES:
        lines = []
        for index, run in enumerate(runs):
            for position, metric in enumerate(metrics):
                x, y = run.curve(metric)
                if x and (metric == SUPERVISED_LOSS or run.name in reinforced):
                    lines.append(Line(_curve_label(run.name, metric, metrics), x, y, color_of(index), dashed=position > 0))
        if lines:
            caption = "; ".join(f"{metric}: {METRICS[metric]}" for metric in metrics) + "."
            figures.append(_line_panel(title, caption, lines, x_label="training step", y_label=unit, y_scale=scale))
    return figures


def time_figures(runs: Sequence[RunData]) -> list[ReportFigure]:
    """Mean seconds of a step by phase, one bar a run; empty where nothing was timed."""
    timed = [run for run in runs if any(_mean_seconds(run, phase) > 0 for phase in PHASES)]
    phases = [phase for phase in PHASES if any(_mean_seconds(run, phase) > 0 for run in timed)]
    if not timed:
        return []
    parts = {phase: [_mean_seconds(run, phase) for run in timed] for phase in phases}
    figure = stacked_bars_figure([run.name for run in timed], parts, x_label="seconds a step, mean over the run")
    totals = ", ".join(f"{run.name} {sum(_mean_seconds(run, phase) for phase in phases):.3g} s" for run in timed)
    legend = tuple(LegendEntry(phase.replace("_", " "), color_of(index)) for index, phase in enumerate(phases))
    caption = "Wall time by phase; evaluation and checkpoints are spread over all steps."
    return [ReportFigure("Time of a step", caption, to_svg(figure, f"Bars of the mean time of a step by phase: {totals}"), legend)]


def pass_at_k_lines(runs: Sequence[RunData], benchmark: str) -> list[Line]:
    """Each run's last Pass@k curve on a benchmark, with its bootstrap band where counts per problem are there."""
    lines = []
    for index, run in enumerate(runs):
        result = run.final(benchmark)
        if result is None or not result.pass_at_k:
            continue
        low, high = bootstrap_band(result) if result.ids else (None, None)
        lines.append(
            Line(
                run.name,
                list(result.pass_at_k),
                list(result.pass_at_k.values()),
                color_of(index),
                low=None if low is None else low.tolist(),
                high=None if high is None else high.tolist(),
            )
        )
    return lines


def pass_at_k_picture(runs: Sequence[RunData]) -> Figure:
    """The Pass@k curves of every benchmark as one matplotlib figure with its own legend."""
    panels = {benchmark: pass_at_k_lines(runs, benchmark) for benchmark in benchmark_names(runs)}
    return panels_figure(panels, x_label="k", y_label="Pass@k", x_scale="log2")


def _pass_over_steps(runs: Sequence[RunData], benchmark: str) -> list[ReportFigure]:
    """Pass@1 and Pass@largest k against training steps, where a run was evaluated more than once."""
    curves = []
    for index, run in enumerate(runs):
        results = [
            (evaluation.step, evaluation.benchmarks[benchmark]) for evaluation in run.evaluations if benchmark in evaluation.benchmarks
        ]
        results = [(step, result) for step, result in results if result.pass_at_k]
        if not results:
            continue
        steps, largest = [step for step, _ in results], max(results[-1][1].pass_at_k)
        for k, dashed in ((1, False), (largest, True)):
            values = [result.pass_at_k.get(k, float("nan")) for _, result in results]
            curves.append(Line(f"{run.name}, k = {k}", steps, values, color_of(index), dashed=dashed))
    lines = _level_single_points(curves)
    if not lines:
        return []
    caption = f"Pass@1 (solid) and Pass@k at the largest k (dashed). {LEVELS}"
    return [_line_panel(f"{benchmark} over training", caption, lines, x_label="training step", y_label="Pass@k")]


def _heldout_entropy(runs: Sequence[RunData]) -> list[ReportFigure]:
    """Held-out entropy against steps, or as bars where every run was evaluated once."""
    curves = []
    for index, run in enumerate(runs):
        points = [(evaluation.step, evaluation.heldout_entropy) for evaluation in run.evaluations if evaluation.heldout_entropy is not None]
        if points:
            curves.append(Line(run.name, [step for step, _ in points], [value for _, value in points], color_of(index)))
    if not curves:
        return []
    caption = f"heldout/entropy: {METRICS['heldout/entropy']}."
    lines = _level_single_points(curves)
    if lines:
        return [_line_panel("Held-out entropy", f"{caption} {LEVELS}", lines, x_label="training step", y_label="nats a token")]
    figure = bars_figure(
        [line.label for line in curves], [line.y[0] for line in curves], [line.color for line in curves], x_label="nats a token"
    )
    alt = "Bars of held-out entropy: " + ", ".join(f"{line.label} {line.y[0]:.3g}" for line in curves)
    return [ReportFigure("Held-out entropy", caption, to_svg(figure, alt), ())]


def _level_single_points(curves: Sequence[Line]) -> list[Line]:
    """Draws a run that was evaluated once as a level across the others' steps: its own steps may be of another kind of training.

    Empty where no curve has more than one point.
    """
    steps = [step for curve in curves if len(curve.x) > 1 for step in curve.x]
    if not steps:
        return []
    ends = [min(steps), max(steps)]
    return [curve if len(curve.x) > 1 else replace(curve, x=ends, y=[curve.y[0]] * 2) for curve in curves]


def _line_panel(
    title: str, caption: str, lines: Sequence[Line], *, x_label: str, y_label: str, x_scale: Scale = "linear", y_scale: Scale = "linear"
) -> ReportFigure:
    figure = line_figure(lines, x_label=x_label, y_label=y_label, x_scale=x_scale, y_scale=y_scale)
    ends = ", ".join(f"{line.label} ends at {line.y[-1]:.3g}" for line in lines)
    legend = tuple(LegendEntry(line.label, line.color, "dashed" if line.dashed else "solid") for line in lines)
    return ReportFigure(title, caption, to_svg(figure, f"{title}: {y_label} against {x_label}; {ends}"), legend)


def _curve_label(run: str, metric: str, metrics: Sequence[str]) -> str:
    if len(metrics) == 1:
        return run
    return next(f"{run}, {label}" for suffix, label in SIGN_LABELS.items() if metric.endswith(suffix))


def _mean_seconds(run: RunData, phase: str) -> float:
    """Seconds of a phase over all steps of the run: one that runs at some steps only counts as nothing at the others."""
    _, seconds = run.curve(f"time/{phase}_s")
    return sum(seconds) / len(run.metrics) if run.metrics else 0.0
