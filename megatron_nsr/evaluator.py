"""`evaluate`: Pass@k of a checkpoint on benchmarks, without training. May import: everything below the trainer."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from megatron_nsr.components import build_components, read_inputs
from megatron_nsr.config import Config
from megatron_nsr.evaluation.report import render_pass_at_k_table
from megatron_nsr.observability.run_directory import locate_run, open_run, write_json
from megatron_nsr.platform import distributed
from megatron_nsr.recording import announce
from megatron_nsr.training.checkpoints import is_checkpoint, read_description
from megatron_nsr.types import UserError


def evaluate(config: Config) -> None:
    """Samples and grades `evaluation.benchmarks` with the weights of `model.path`; writes run.dir/eval/step_N.json.

    N is the checkpoint's step, 0 for a Hugging Face directory.
    """
    if not config.evaluation.benchmarks:
        raise UserError("evaluation.benchmarks: no benchmark is named; give at least one, as evaluation.benchmarks.MATH=FILE")
    inputs = read_inputs(config, training=False)
    run = locate_run(config)
    path = Path(config.model.path)
    step = read_description(path)["step"] if is_checkpoint(path) else 0
    announce(config, inputs)
    with ExitStack() as stack:
        parts = build_components(config, inputs, stack)
        assert parts.benchmarks is not None
        parts.push(step)
        result = parts.benchmarks.run(step, parts.actor).result
        if distributed.rank() == 0:
            open_run(config)
            write_json(run.evaluation(step), result)
            Console().print(render_pass_at_k_table([run.path]))
            Console().print(f"written to {run.evaluation(step)}")
