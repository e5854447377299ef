"""`evaluate`: Pass@k of a checkpoint on benchmarks, without training. May import: everything below the trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_nsr.components import Components, build_components, read_inputs
from megatron_nsr.config import Config
from megatron_nsr.config_files import dump_config
from megatron_nsr.evaluation.generations import Generations, check_settings, generation_settings, weights_digest
from megatron_nsr.evaluation.results import render_result
from megatron_nsr.observability.run_directory import RunDirectory, write_atomic, write_json
from megatron_nsr.platform import distributed
from megatron_nsr.recording import announce, check_gap
from megatron_nsr.training.checkpoint_files import is_checkpoint, read_description
from megatron_nsr.types import UserError
from megatron_nsr.weights.checksums import policy_checksums


def evaluate(config: Config) -> None:
    """Samples and grades `evaluation.benchmarks` with the weights of `model.path`; writes run.dir/eval/step_N.json.

    N is the checkpoint's step, 0 for a Hugging Face directory. The directory may be that of the run that wrote the checkpoint: nothing
    else in it is changed. Generations are kept in run.dir/eval/step_N/BENCHMARK/, and those that are there are not sampled again; raises
    UserError where they were made with other settings or weights.
    """
    if not any(config.evaluation.benchmarks.values()):
        raise UserError("evaluation.benchmarks: no benchmark is named; give at least one, as evaluation.benchmarks.MATH=FILE")
    inputs = read_inputs(config, training=False)
    run, path = RunDirectory(Path(config.run.dir)), Path(config.model.path)
    step = read_description(path)["step"] if is_checkpoint(path) else 0
    _refuse_mixing(run, path, step)
    stop_ids = inputs.tokenizer.stop_ids
    settings = {name: generation_settings(config, name, problems, stop_ids) for name, problems in inputs.benchmarks.items()}
    for name, values in settings.items():
        check_settings(run.generations(step, name), values)
    announce(config, inputs)
    with ExitStack() as stack:
        parts = build_components(config, inputs, stack)
        assert parts.benchmarks is not None
        parts.push(step)
        evaluation = parts.benchmarks.run(step, parts.actor, _kept(run, step, settings, _weights(parts, config)))
        check_gap(evaluation.metrics, "heldout", config.rollout.max_logprob_gap)
        if distributed.rank() == 0:
            if not run.config.is_file():
                write_atomic(run.config, dump_config(config))
            write_json(run.evaluation(step), {"model": str(path), **evaluation.result})
            console = Console()
            for name, scores in evaluation.result["benchmarks"].items():
                console.print(render_result(name, scores))
            print(f"written to {run.evaluation(step)}", flush=True)


def _refuse_mixing(run: RunDirectory, model: Path, step: int) -> None:
    """Raises UserError where the result would stand for another model: in a run that it does not come from, or over its evaluation."""
    inside = model.resolve().is_relative_to(run.path.resolve())
    if run.state.is_file() and not inside:
        raise UserError(f"run.dir={run.path}: holds a training run, which model.path={model} is no part of; choose another run.dir")
    written = run.evaluation(step)
    other = json.loads(written.read_text(encoding="utf-8")).get("model") if written.is_file() else None
    if other not in (None, str(model)) and not inside:
        raise UserError(f"run.dir={run.path}: {written.name} is the evaluation of model.path={other}; choose another run.dir")


def _weights(parts: Components, config: Config) -> str:
    """A name for the weights of `model.path`. A collective call."""
    return weights_digest(policy_checksums(parts.push_plan, parts.actor.chunks, getattr(torch, config.model.dtype)))


def _kept(run: RunDirectory, step: int, settings: Mapping[str, dict[str, Any]], weights: str) -> dict[str, Generations]:
    return {
        name: Generations(run.generations(step, name), values | {"model.path": f"weights {weights}"}) for name, values in settings.items()
    }
