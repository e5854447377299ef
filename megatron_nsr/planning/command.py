"""The `plan` command. May import: config, rich, planning."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from megatron_nsr.config import Config
from megatron_nsr.planning.hardware import find_gpu
from megatron_nsr.planning.plan import make_plan
from megatron_nsr.planning.published_models import model_shape
from megatron_nsr.planning.remedies import Asked, find_remedies
from megatron_nsr.planning.report import as_values, render
from megatron_nsr.planning.scaling import Point, point_values, render_scaling, scaling, write_scaling_picture
from megatron_nsr.planning.search import best_layouts
from megatron_nsr.planning.workload import lengths_of
from megatron_nsr.types import UserError

WIDTH = 120  # where the output is no terminal


def show_plan(
    config: Config,
    *,
    gpus: int,
    gpu: str,
    prompt_mean: float | None = None,
    response_mean: float | None = None,
    response_spread: float | None = None,
    simulate: bool = False,
    plot: Path | None = None,
    as_json: bool = False,
) -> bool:
    """Prints the plan; returns whether it fits. Raises UserError for a GPU, a length or a layout that cannot be."""
    if plot is not None and not simulate:
        raise UserError(f"--plot {plot}: there is a picture with --simulate only")
    if simulate and config.objective.name == "supervised":
        raise UserError("--simulate: objective.name=supervised samples nothing")
    device, shape = find_gpu(gpu), model_shape(config.model.path)
    lengths = lengths_of(config, prompt_mean=prompt_mean, response_mean=response_mean, response_spread=response_spread)
    plan = make_plan(config, shape, gpus, device, lengths)
    suggestions = best_layouts(config, shape, gpus, device, lengths)
    remedies = None if plan.fits else find_remedies(Asked(config, shape, gpus, device, lengths))
    points: list[Point] = scaling(config, shape, gpus, device, lengths) if simulate else []
    if plot is not None:
        write_scaling_picture(plot, points)
    if as_json:
        simulated = {"simulation": [{"mode": one.mode, "fits": one.fits, **point_values(one)} for one in points]} if simulate else {}
        print(json.dumps(as_values(plan, suggestions, remedies) | simulated, indent=2))
        return plan.fits
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(render(plan, suggestions, remedies), crop=False)
    if simulate:
        console.print(render_scaling(points))
    return plan.fits
