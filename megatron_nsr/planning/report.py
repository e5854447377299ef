"""A plan as tables for people and as plain values for programs. May import: rich, planning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
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

MEMORY = ((GIB, "GiB"), (1 << 20, "MiB"))
OPERATIONS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))
BYTES = ((1e9, "GB"), (1e6, "MB"))
COUNT = ((1e9, "billion"), (1e6, "million"))
WORTH = {"GiB": 4.0}  # of the largest value in this unit, where 1 would leave the others too few digits


def verdict(plan: Plan) -> str:
    """One line: whether it fits."""
    memory = plan.memory
    if memory.problem is not None:
        return memory.problem
    return f"fits: {memory.peak / GIB:.1f} of {memory.capacity / GIB:.0f} GiB {'on a GPU' if plan.gpu.backend == 'te' else 'in a process'}"


def render(plan: Plan, suggestions: Sequence[Candidate], remedies: Remedies | None) -> RenderableType:
    """The whole plan."""
    lengths, elements = plan.workload.lengths, model_elements(plan.shape)
    size, name = unit(COUNT, [elements])
    lines = [
        f"{plan.config.model.path}: {elements / size:.2f} {name} parameters on {plan.gpus} x {plan.gpu.name}"
        f"{f', {serving} of them for servers' if (serving := plan.gpus - plan.layout.gpus) else ''}; data parallel {plan.layout.data}",
        f"layout: {plan.layout.describe()}",
        f"assumed: prompts of {lengths.prompt_mean:.0f} tokens, responses of {lengths.response_mean:.0f} on average "
        f"(spread {lengths.response_spread:g} of it, at most {lengths.cap}), {plan.workload.kept:.0%} of them trained on",
        verdict(plan),
        *_advice(remedies),
        *([f"not in these numbers: {', '.join(left_out)}"] if (left_out := unplanned(plan.config)) else []),
    ]
    tables = [_memory(plan), *_server(plan), _time(plan), _communication(plan)]
    return Group(*(_whole(line) for line in lines), *tables, *(_whole(line) for line in _suggestions(plan, suggestions)))


def as_values(plan: Plan, suggestions: Sequence[Candidate], remedies: Remedies | None) -> dict[str, Any]:
    """Sizes in bytes, times in seconds."""
    lengths, memory = plan.workload.lengths, plan.memory
    return {
        "model": plan.config.model.path,
        "parameters": model_elements(plan.shape),
        "gpu": plan.gpu.name,
        "gpus": plan.gpus,
        "layout": plan.layout.describe(),
        "data_parallel": plan.layout.data,
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
            "engine": None if memory.engine is None else asdict(memory.engine),
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
        "remedies": None if remedies is None else asdict(remedies),
        "suggestions": [
            {
                "layout": one.layout.describe(),
                "data_parallel": one.layout.data,
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
    scale, measure = unit(MEMORY, [memory.peak])
    table = _table(f"memory of one {'GPU' if plan.gpu.backend == 'te' else 'process'}, {measure}{stage}", "part", *MOMENTS)
    for name, sizes in memory.parts.items():
        table.add_row(name, *(f"{size / scale:,.2f}" for size in sizes))
    table.add_section()
    table.add_row(f"in all, of {memory.capacity / scale:,.0f}", *(f"{memory.total(moment) / scale:,.2f}" for moment in range(len(MOMENTS))))
    if memory.host:
        table.add_row("in host memory", *len(MOMENTS) * (f"{memory.host / scale:,.2f}",))
    return table


def _server(plan: Plan) -> list[Table]:
    """Of GPUs that only sample."""
    engine = plan.memory.engine
    if engine is None or plan.config.rollout.mode == "colocated":
        return []
    scale, measure = unit(MEMORY, [engine.total])
    table = _table(f"a server's GPU, {measure}", "part", "sampling")
    for name, size in (("weights", engine.weights), ("KV cache", engine.cache), ("workspace", engine.workspace)):
        table.add_row(name, f"{size / scale:,.2f}")
    table.add_section()
    table.add_row(f"in all, of {plan.memory.capacity / scale:,.0f}", f"{engine.total / scale:,.2f}")
    return [table]


def _time(plan: Plan) -> Table:
    scale, measure = unit(OPERATIONS, plan.flops.values())
    table = _table("one step", "phase", "seconds", "bound by", f"{measure}, all together")
    flops = dict(plan.flops)
    flops["rollout"] = flops.pop("prefill", 0.0) + flops.pop("decode", 0.0)
    for name, phase in plan.phases.items():
        work = number(flops[name] / scale) if flops.get(name) else ""
        table.add_row(name, number(phase.seconds), f"{phase.bound} ({phase.spent[phase.bound] / phase.seconds:.0%})", work)
    table.add_section()
    table.add_row("step", number(plan.step_seconds), f"update: {plan.utilization:.0%} of {'bf16 ' if plan.layout.fp8 else ''}peak", "")
    return table


def _communication(plan: Plan) -> Table:
    scale, measure = unit(BYTES, plan.communication.values())
    table = _table("sent by one rank in a step", "group", measure)
    for name, size in plan.communication.items():
        table.add_row(name, number(size / scale))
    return table


def _suggestions(plan: Plan, suggestions: Sequence[Candidate]) -> list[str]:
    """A line each, which ends with its keys: they can be pasted after the config's name."""
    if not suggestions:
        return [f"no layout of the trainer's {plan.layout.gpus} x {plan.gpu.name} fits with the other keys as they are"]
    own = sum(phase.seconds for name, phase in plan.phases.items() if name != "rollout")
    rows = [("(this config)" if plan.fits else "(this config, which does not fit)", plan.layout, own, plan.memory)]
    rows += [(" ".join(keys), one.layout, one.seconds, one.memory) for one in suggestions if (keys := overrides(plan.config, one.layout))]
    scale, measure = unit(MEMORY, [plan.memory.peak])
    lines = ["the fastest layouts that fit, context parallelism and all other keys as they are; seconds without sampling", ""]
    lines += [f"  {'seconds':>9}  {measure:>7}  {'data parallel':>13}  keys to change"]
    return lines + [f"  {number(time):>9}  {memory.peak / scale:>7,.1f}  {layout.data:>13,}  {keys}" for keys, layout, time, memory in rows]


def _advice(remedies: Remedies | None) -> list[str]:
    if remedies is None:
        return []
    lines = [f"it would fit with: {' '.join(remedies.keys)}"] if remedies.keys else []
    if remedies.more_gpus:
        how = f"with: {' '.join(remedies.more_gpus_keys)}" if remedies.more_gpus_keys else "as it is"
        lines.append(f"it would fit on {remedies.more_gpus:,} GPUs {how}")
    return lines or ["neither keys that save memory nor more GPUs make it fit with this layout"]


def unit(units: Sequence[tuple[float, str]], values: Iterable[float]) -> tuple[float, str]:
    """Of units from large to small the first of which the largest value has enough, or the last."""
    most = max(values, default=0.0)
    return next((one for one in units if most >= one[0] * WORTH.get(one[1], 1.0)), units[-1])


def number(value: float) -> str:
    """Three digits that count, or all before the point: 0.0512, 5.12, 51.2, 5,120."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _whole(line: str) -> Text:
    """A line that only the terminal breaks, so that it is copied as one."""
    return Text(line, no_wrap=True, overflow="ignore")


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column(first)
    for header in numbers:
        table.add_column(header, justify="right")
    return table
