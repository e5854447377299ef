"""`evaluate`: Pass@k of a checkpoint on benchmarks, without training. May import: everything below the trainer."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_nsr.components import build_components, read_inputs
from megatron_nsr.config import Config, dump_config
from megatron_nsr.observability.run_directory import RunDirectory, write_atomic, write_json
from megatron_nsr.platform import distributed
from megatron_nsr.recording import announce, check_gap
from megatron_nsr.training.checkpoints import is_checkpoint, read_description
from megatron_nsr.types import UserError


def evaluate(config: Config) -> None:
    """Samples and grades `evaluation.benchmarks` with the weights of `model.path`; writes run.dir/eval/step_N.json.

    N is the checkpoint's step, 0 for a Hugging Face directory. The directory may be that of the run that wrote the checkpoint: nothing
    else in it is changed.
    """
    if not config.evaluation.benchmarks:
        raise UserError("evaluation.benchmarks: no benchmark is named; give at least one, as evaluation.benchmarks.MATH=FILE")
    inputs = read_inputs(config, training=False)
    run, path = RunDirectory(Path(config.run.dir)), Path(config.model.path)
    step = read_description(path)["step"] if is_checkpoint(path) else 0
    announce(config, inputs)
    with ExitStack() as stack:
        parts = build_components(config, inputs, stack)
        assert parts.benchmarks is not None
        parts.push(step)
        evaluation = parts.benchmarks.run(step, parts.actor)
        check_gap(evaluation.metrics, "heldout", config.rollout.max_logprob_gap)
        if distributed.rank() == 0:
            if not run.config.is_file():
                write_atomic(run.config, dump_config(config))
            write_json(run.evaluation(step), {"model": str(path), **evaluation.result})
            console = Console()
            for name, scores in evaluation.result["benchmarks"].items():
                console.print(_table(name, scores))
            console.print(f"written to {run.evaluation(step)}")


def _table(name: str, scores: dict[str, Any]) -> Table:
    table = Table(title=f"{name}: {len(scores['problems'])} problems, {scores['n']} samples each", title_justify="left")
    for k in scores["pass_at_k"]:
        table.add_column(f"Pass@{k}", justify="right")
    table.add_row(*(f"{100 * value:.1f} %" for value in scores["pass_at_k"].values()))
    return table
