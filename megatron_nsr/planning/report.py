"""A plan as tables for people and as plain values for programs. May import: rich, planning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_nsr.planning.hardware import GIB
from megatron_nsr.planning.memory import MOMENTS
from megatron_nsr.planning.parameters import model_elements
from megatron_nsr.planning.plan import Plan
from megatron_nsr.planning.recomputation import unplanned
from megatron_nsr.planning.remedies import Remedies
from megatron_nsr.planning.search import Candidate, overrides
from megatron_nsr.planning.workload import micro_batches

GB, TERA = 1e9, 1e12


def verdict(plan: Plan) -> str:
    """One line: whether it fits."""
    memory = plan.memory
    if memory.problem is not None:
        return memory.problem
    return f"fits: {memory.peak / GIB:.1f} of {memory.capacity / GIB:.0f} GiB on a GPU"


def render(plan: Plan, suggestions: Sequence[Candidate], remedies: Remedies) -> RenderableType:
    """The whole plan."""
    lengths = plan.workload.lengths
    lines = [
        f"{plan.config.model.path}: {model_elements(plan.shape) / GB:.2f} billion parameters on {plan.gpus} x {plan.gpu.name}; "
        f"{plan.layout.describe()}",
        f"assumed: prompts of {lengths.prompt_mean:.0f} tokens, responses of {lengths.response_mean:.0f} on average "
        f"(spread {lengths.response_spread:g} of it, at most {lengths.cap}), {plan.workload.kept:.0%} of them trained on",
        verdict(plan),
        *_advice(remedies),
        *([f"not in these numbers: {', '.join(left_out)}"] if (left_out := unplanned(plan.config)) else []),
    ]
    tables = [_memory(plan), _time(plan), _communication(plan)]
    return Group(*(Text(line) for line in lines), *tables, _suggestions(plan, suggestions))


def as_values(plan: Plan, suggestions: Sequence[Candidate], remedies: Remedies) -> dict[str, Any]:
    """Sizes in bytes, times in seconds."""
    lengths, memory = plan.workload.lengths, plan.memory
    return {
        "model": plan.config.model.path,
        "parameters": model_elements(plan.shape),
        "gpu": plan.gpu.name,
        "gpus": plan.gpus,
        "layout": plan.layout.describe(),
        "assumed": {
            "prompt_mean": lengths.prompt_mean,
            "response_mean": lengths.response_mean,
            "response_spread": lengths.response_spread,
            "kept": plan.workload.kept,
        },
        "fits": plan.fits,
        "verdict": verdict(plan),
        "not_planned": unplanned(plan.config),
        "memory": {
            "capacity": memory.capacity,
            "peak": memory.peak,
            "host": memory.host,
            "stage": memory.stage,
            "parts": {name: dict(zip(MOMENTS, sizes, strict=True)) for name, sizes in memory.parts.items()},
            "cached_tokens": memory.engine.cached_tokens if memory.engine else None,
        },
        "micro_batches": micro_batches(plan.workload, plan.layout),
        "phases": {
            name: {"seconds": phase.seconds, "bound": phase.bound, "spent": dict(phase.spent)} for name, phase in plan.phases.items()
        },
        "step_seconds": plan.step_seconds,
        "update_utilization": plan.utilization,
        "communication_bytes": dict(plan.communication),
        "flops": dict(plan.flops),
        "would_fit_with": list(remedies.keys),
        "would_fit_on_gpus": remedies.gpus,
        "suggestions": [
            {
                "layout": one.layout.describe(),
                "overrides": overrides(plan.config, one.layout),
                "seconds_without_sampling": one.seconds,
                "peak": one.memory.peak,
            }
            for one in suggestions
        ],
    }


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    stage = f", pipeline stage {memory.stage}" if plan.layout.pipeline > 1 else ""
    table = _table(f"memory of one GPU, GiB{stage}", "part", *MOMENTS)
    for name, sizes in memory.parts.items():
        table.add_row(name, *(f"{size / GIB:,.2f}" for size in sizes))
    table.add_section()
    table.add_row(f"in all, of {memory.capacity / GIB:,.0f}", *(f"{memory.total(moment) / GIB:,.2f}" for moment in range(len(MOMENTS))))
    if memory.host:
        table.add_row("in host memory", *len(MOMENTS) * (f"{memory.host / GIB:,.2f}",))
    return table


def _time(plan: Plan) -> Table:
    table = _table("one step", "phase", "seconds", "bound by", "PFLOP, all GPUs")
    flops = dict(plan.flops)
    flops["rollout"] = flops.pop("prefill", 0.0) + flops.pop("decode", 0.0)
    for name, phase in plan.phases.items():
        work = number(flops[name] / 1e15) if flops.get(name) else ""
        table.add_row(name, number(phase.seconds), f"{phase.bound} ({phase.spent[phase.bound] / phase.seconds:.0%})", work)
    table.add_section()
    table.add_row("step", number(plan.step_seconds), f"update: {plan.utilization:.0%} of {'bf16 ' if plan.layout.fp8 else ''}peak", "")
    return table


def _communication(plan: Plan) -> Table:
    table = _table("sent by one GPU in a step", "group", "GB")
    for name, size in plan.communication.items():
        table.add_row(name, number(size / GB))
    return table


def _suggestions(plan: Plan, suggestions: Sequence[Candidate]) -> RenderableType:
    if not suggestions:
        return Text(f"no layout of the trainer's {plan.layout.gpus} GPUs fits with the other keys as they are")
    table = _table("the fastest layouts that fit", "keys to change", "data parallel", "seconds without sampling", "GiB")
    own = sum(phase.seconds for name, phase in plan.phases.items() if name != "rollout")
    rows = [("(this config)" if plan.fits else "(this config, which does not fit)", plan.layout, own, plan.memory)]
    rows += [(" ".join(overrides(plan.config, one.layout)), one.layout, one.seconds, one.memory) for one in suggestions]
    for keys, layout, seconds, memory in rows:
        if keys:
            table.add_row(keys, str(layout.data), number(seconds), f"{memory.peak / GIB:,.1f}")
    return table


def _advice(remedies: Remedies) -> list[str]:
    lines = [f"it would fit with: {' '.join(remedies.keys)}"] if remedies.keys else []
    return lines + ([f"it would fit on {remedies.gpus:,} GPUs"] if remedies.gpus else [])


def number(value: float) -> str:
    """Three digits that count, or all before the point: 0.0512, 5.12, 51.2, 5,120."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column(first)
    for header in numbers:
        table.add_column(header, justify="right")
    return table
