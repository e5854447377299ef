"""The `plan` command. May import: config, rich, planning."""

from __future__ import annotations

import json

from rich.console import Console

from megatron_nsr.config import Config
from megatron_nsr.planning.hardware import find_gpu
from megatron_nsr.planning.plan import make_plan
from megatron_nsr.planning.published_models import model_shape
from megatron_nsr.planning.report import as_values, render
from megatron_nsr.planning.search import best_layouts
from megatron_nsr.planning.workload import lengths_of

WIDTH = 120  # where the output is no terminal


def show_plan(
    config: Config,
    *,
    gpus: int,
    gpu: str,
    prompt_mean: float | None,
    response_mean: float | None,
    response_spread: float | None,
    as_json: bool,
) -> bool:
    """Prints the plan; returns whether it fits. Raises UserError for a GPU, a length or a layout that cannot be."""
    device, shape = find_gpu(gpu), model_shape(config.model.path)
    lengths = lengths_of(config, prompt_mean=prompt_mean, response_mean=response_mean, response_spread=response_spread)
    plan = make_plan(config, shape, gpus, device, lengths)
    suggestions = best_layouts(config, shape, gpus, device, lengths)
    if as_json:
        print(json.dumps(as_values(plan, suggestions), indent=2))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = WIDTH
        console.print(render(plan, suggestions), soft_wrap=False)
    return plan.fits
