"""The panels of a report that show metrics.jsonl against the training step: learning, the two signs, and everything else.

May import: observability.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_nsr.evaluation.report_data import SUPERVISED, RunData, prompts_remark, step_limits, step_runs
from megatron_nsr.evaluation.report_figures import PHASES, ReportFigure, run_line, step_panel
from megatron_nsr.observability.metrics import METRICS, metric_meaning
from megatron_nsr.observability.plots import Line, Scale


@dataclass(frozen=True)
class Panel:
    """Metrics that share an axis. roles: what a solid and a dashed line stand for, where there are two metrics."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    scale: Scale = "linear"
    roles: tuple[str, ...] = ()


SHARE, NATS = "share, 0 to 1", "nats a token"
LEARNING = (
    Panel("Correct responses", SHARE, ("reward/correct_ratio",)),
    Panel("Fully solved prompts", SHARE, ("reward/fully_solved_ratio",)),
    Panel("Never solved prompts", SHARE, ("reward/never_solved_ratio",)),
    Panel("Policy entropy", NATS, ("policy/entropy",)),
    Panel("Entropy on fixed responses", NATS, ("heldout/entropy_fixed",)),
    Panel("Different answers a prompt", "count", ("reward/unique_answers_mean",)),
    Panel("Response length", "tokens", ("rollout/response_tokens_mean",)),
    Panel("KL to the reference", NATS, ("policy/kl_reference",)),
    Panel("Supervised loss", NATS, ("supervised/loss",)),
)
ENGINE = (
    Panel("Log-prob gap, engine to policy", "nats", ("rollout/logprob_gap_mean", "rollout/logprob_gap_max"), "log", ("mean", "largest")),
    Panel("Gradient norm", "norm before clipping", ("policy/grad_norm",)),
    Panel("Responses trained on", SHARE, ("policy/kept_ratio",)),
    Panel("Critic's loss", "squared reward", ("critic/loss",)),
    Panel("Variance that the critic explains", "share, at most 1", ("critic/explained_variance",)),
)
SPEED = (
    Panel("Speed", "tokens a second", ("perf/tokens_per_s",)),
    Panel("Step time", "seconds", ("time/step_s",)),
)
# Of a metric with a value for each sign: title and unit. One that is not named here has its own name as title.
SIGNS = ("_psr", "_nsr")
SIGN_TITLES = {
    "policy/loss": ("Loss", "nats"),
    "policy/clip_fraction": ("Clip fraction", "share of tokens, 0 to 1"),
    "policy/logprob": ("Log-prob", NATS),
    "policy/entropy": ("Entropy", NATS),
    "rollout/logprob": ("Log-prob in the engine", NATS),
    "rollout/response_tokens_mean": ("Response length by sign", "tokens"),
    "reward/truncated_ratio": ("Truncated responses", SHARE),
    "policy/grad_norm_head": ("Gradient norm at the head", "norm"),
    "policy/grad_norm": ("Whole gradient's norm", "norm"),
}


def learning_figures(runs: Sequence[RunData]) -> list[ReportFigure]:
    """How the responses and the policy's entropy change."""
    return _figures(runs, LEARNING)


def sign_figures(runs: Sequence[RunData]) -> list[ReportFigure]:
    """Every registered metric that is told apart by the sign of the reward: correct responses solid, wrong ones dashed."""
    stems = dict.fromkeys(name[: -len(sign)] for name in METRICS for sign in SIGNS if name.endswith(sign))
    panels = []
    for stem in stems:
        title, unit = SIGN_TITLES.get(stem, (stem, "value"))
        names = tuple(stem + sign for sign in SIGNS)
        panels.append(Panel(title, unit, names, roles=("correct responses", "wrong ones")))
    return _figures(runs, panels)


def engine_figures(runs: Sequence[RunData]) -> list[ReportFigure]:
    """What says whether the run is healthy."""
    return _figures(runs, ENGINE)


def speed_figures(runs: Sequence[RunData]) -> list[ReportFigure]:
    """How fast it went."""
    return _figures(runs, SPEED)


def other_figures(runs: Sequence[RunData]) -> list[ReportFigure]:
    """A panel for each logged metric that no other figure of the page shows."""
    shown = {name for panel in (*LEARNING, *ENGINE, *SPEED) for name in panel.metrics} | set(PHASES) | {"heldout/entropy"}
    names = [name for name in logged_metrics(runs) if name not in shown and not name.endswith(SIGNS) and "/pass@" not in name]
    return _figures(runs, [Panel(name, "value", (name,)) for name in names])


def logged_metrics(runs: Sequence[RunData]) -> list[str]:
    """Names of all metrics with a value, in the registry's order, then those it does not know."""
    logged = {name: None for run in runs for record in run.metrics for name, value in record.items() if value is not None}
    logged.pop("step", None)
    known = [name for name in METRICS if name in logged]
    return known + [name for name in logged if name not in METRICS]


def _figures(runs: Sequence[RunData], panels: Iterable[Panel]) -> list[ReportFigure]:
    # Steps of supervised and of reinforcement learning share no axis, unless there are only the former.
    shared, supervised = step_runs(runs), [run for run in runs if run.objective == SUPERVISED]
    figures = []
    for panel in panels:
        shown = supervised if panel.metrics == ("supervised/loss",) else shared
        lines = _lines(runs, panel, {run.name for run in shown})
        if lines:
            remark = prompts_remark(runs) if panel.metrics[0].startswith("heldout/") else ""
            logged = [metric for metric in panel.metrics if any(run.curve(metric)[0] for run in shown)]
            caption, limits = _caption(panel, logged) + remark, step_limits(shown)
            figures.append(step_panel(panel.title, caption, lines, y_label=panel.unit, y_scale=panel.scale, limits=limits))
    return figures


def _lines(runs: Sequence[RunData], panel: Panel, names: set[str]) -> list[Line]:
    """The panel's lines of the runs of these names."""
    lines = []
    for index, run in enumerate(runs):
        for position, metric in enumerate(panel.metrics):
            x, y = run.curve(metric)
            if x and run.name in names:
                label = f"{run.name}, {panel.roles[position]}" if panel.roles else run.name
                lines.append(run_line(index, label, x, y, dashed=position > 0))
    return lines


def _caption(panel: Panel, logged: Sequence[str]) -> str:
    """What the metrics mean; of two, which differ in one word, the first that the registry has stands for both.

    logged: those of the panel's metrics that it shows; only their lines are explained.
    """
    meanings = [f"{metric}: {metric_meaning(metric)}" for metric in panel.metrics if metric_meaning(metric)]
    styles = zip(("solid", "dashed"), panel.roles, panel.metrics, strict=False)  # a panel without roles explains none
    lines = "; ".join(f"{style}: {role}" for style, role, metric in styles if metric in logged)
    return (
        f"{lines.capitalize()}. {meanings[0]}."
        if lines and meanings
        else f"{meanings[0]}."
        if meanings
        else f"{panel.metrics[0]}: not a metric of this version."
    )
