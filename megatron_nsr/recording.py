"""What a run leaves behind: state, metrics, samples, evaluations, the exported policy. Only rank 0 writes.

May import: everything below the trainer.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_nsr.components import Components, Inputs
from megatron_nsr.config import Config
from megatron_nsr.evaluation.benchmarks import Evaluation
from megatron_nsr.experience import Experience
from megatron_nsr.observability.environment import describe_environment
from megatron_nsr.observability.loggers import Loggers, MetricLogger, build_loggers, check_loggers
from megatron_nsr.observability.run_directory import RunDirectory, flat_config, open_run, write_json
from megatron_nsr.observability.samples import sample_rows, write_samples
from megatron_nsr.observability.state import Status, read_state, write_state
from megatron_nsr.platform import distributed
from megatron_nsr.presets import overridden
from megatron_nsr.types import Prompt, StepMetrics, UserError
from megatron_nsr.weights.gathering import execute_push_plan
from megatron_nsr.weights.safetensors_files import write_hf_directory
from megatron_nsr.weights.safetensors_writing import config_of_dtype


class Progress:
    """Keeps RUN/state.json true."""

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.writes = run, distributed.launched_rank() == 0
        self.steps: Callable[[], int] | None = None

    def started(self, config: Config, steps: Callable[[], int]) -> None:
        """Makes the run directory: the input has proved right. steps: tells the completed steps at any later moment. A collective call."""
        with distributed.rank_0_speaks_for_all():
            if self.writes:
                open_run(config)
        self.steps = steps
        if self.writes:
            write_json(self.run.environment, describe_environment())
            write_state(self.run, "running", steps())

    def ended(self, status: Status, reason: str = "") -> None:
        assert self.steps is not None
        if self.writes:
            write_state(self.run, status, self.steps(), reason)

    def failed(self, error: BaseException) -> None:
        """Wrong input that shows before the start is not a failed run. Any rank may fail; the first one knows the reason."""
        if self.steps is None and isinstance(error, UserError):
            return
        state = read_state(self.run)
        if self.steps is not None and state is not None and state.status == "failed":
            return
        completed = self.steps() if self.steps is not None else state.step if state is not None else 0
        write_state(self.run, "failed", completed, f"{type(error).__name__}: {error}")


def announce(config: Config, inputs: Inputs) -> None:
    """Before the slow start: what is about to run and what was left out, and for training where it departs from what was published."""
    if distributed.launched_rank() != 0:
        return
    parallel, world = config.parallel, distributed.launched_world_size()
    replica = parallel.tensor * parallel.context * parallel.pipeline
    sizes = f"tensor {parallel.tensor} x context {parallel.context} x pipeline {parallel.pipeline} x data {world // replica}"
    data = [("data.train", inputs.train), *inputs.benchmarks.items()]
    counts = ", ".join(f"{name} {len(p.prompts)} prompts" + (f" ({p.too_long} too long)" if p.too_long else "") for name, p in data if p)
    work = config.objective.name if inputs.train else "evaluate"
    print(f"{config.run.dir}: {work}, {counts}; {sizes} on {inputs.backend.device.type}; starting ...", flush=True)
    if inputs.train and (departures := overridden(config.model_dump(by_alias=True))):
        origin = f"preset={config.objective.preset}" if config.objective.preset else f"name={config.objective.name}"
        print(f"objective.{origin} holds except for {', '.join(departures)}", flush=True)


def conclude(config: Config, run: RunDirectory, status: Status, step: int) -> None:
    """The last line: where the results are, or how to go on."""
    if distributed.launched_rank() != 0:
        return
    if status == "stopped":
        print(f"{run.path}: stopped after step {step} of {config.run.steps}; the same command continues", flush=True)
    else:
        policy = f"; policy in {run.hf}" if config.checkpoint.export_hf else ""
        policy += f"; best by validation: {run.best.resolve().name}" if run.best.is_symlink() else ""
        print(f"{run.path}: {step} steps done{policy}; compare runs: megatron-nsr report {run.path} --out FILE", flush=True)


@contextmanager
def reporting_state(run: RunDirectory) -> Iterator[Progress]:
    """An exception that leaves the block is written to state.json as `failed`."""
    progress = Progress(run)
    try:
        yield progress
    except BaseException as error:
        progress.failed(error)
        raise


@contextmanager
def alone_in(run: RunDirectory) -> Iterator[None]:
    """Holds the run's directory while the block lasts. A collective call. Raises UserError, on every rank, where another run here holds it.

    Rank 0 holds an abstract Unix socket (unix(7)), which the kernel frees however the process ends. It knows of this machine alone: a lock
    on a shared file system may outlive the node that took it, and would then refuse the job that Slurm has queued again.
    """
    name = hashlib.blake2b(str(run.path.resolve()).encode(), digest_size=16).hexdigest()
    with socket.socket(socket.AF_UNIX) as held:
        with distributed.rank_0_speaks_for_all():
            try:
                if distributed.launched_rank() == 0:
                    held.bind(f"\0megatron_nsr/{name}")
            except OSError:
                raise UserError(f"run.dir={run.path}: a process of this machine is training in it; choose another run.dir") from None
        yield


def require_loggers(config: Config) -> None:
    """Before the slow start: raises UserError, on every rank, where rank 0 finds that a chosen logger is missing or cannot start."""
    settings = config.logging
    with distributed.rank_0_speaks_for_all():
        if distributed.launched_rank() == 0:
            check_loggers(
                wandb=settings.wandb,
                mlflow=settings.mlflow,
                mlflow_experiment=settings.mlflow_experiment,
                prometheus_port=settings.prometheus_port,
            )


def open_loggers(run: RunDirectory, config: Config, *, completed_steps: int) -> Loggers:
    """Starts the loggers on rank 0. A collective call. Raises UserError, on every rank, where one has become impossible since the start."""
    settings = config.logging
    with distributed.rank_0_speaks_for_all():
        loggers = build_loggers(
            run,
            rank=distributed.rank(),
            title=Path(config.run.dir).name,
            steps=config.run.steps,
            completed_steps=completed_steps,
            tensorboard=settings.tensorboard,
            wandb=settings.wandb,
            wandb_project=settings.wandb_project,
            mlflow=settings.mlflow,
            mlflow_experiment=settings.mlflow_experiment,
            prometheus_port=settings.prometheus_port,
            config=flat_config(config),
        )
    return Loggers((loggers, StateLogger(run))) if distributed.rank() == 0 else loggers


def check_gap(metrics: Mapping[str, float], area: str, bound: float | None) -> None:
    """Raises RuntimeError where `AREA/logprob_gap_max` is past rollout.max_logprob_gap."""
    gap = metrics.get(f"{area}/logprob_gap_max")
    if bound is None or gap is None:
        return
    if not gap <= bound:
        raise RuntimeError(
            f"{area}/logprob_gap_max is {gap:.3g}, above rollout.max_logprob_gap={bound:.3g}: the engine does not hold the "
            "policy's weights, or computes too differently; nothing of this step was saved"
        )


class StateLogger:
    """Keeps the step in RUN/state.json."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def log(self, metrics: StepMetrics) -> None:
        write_state(self._run, "running", metrics.step)

    def close(self) -> None: ...


class Recorder:
    """Writes what loggers do not, and stops a run whose engine and policy disagree."""

    def __init__(self, run: RunDirectory, config: Config) -> None:
        self.run, self.config = run, config
        self.writes = distributed.rank() == 0

    def check(self, metrics: dict[str, float], loggers: MetricLogger, step: int) -> None:
        """Raises RuntimeError where the log-prob gap of the step's rollouts is past its bound; the step's line is written first."""
        try:
            if not metrics.get("rollout/staleness"):  # otherwise the policy has moved on since
                check_gap(metrics, "rollout", self.config.rollout.max_logprob_gap)
        except RuntimeError:
            loggers.log(StepMetrics(step, metrics))
            raise

    def keep_samples(self, step: int, prompts: Sequence[Prompt], experience: Experience) -> None:
        every = self.config.logging.samples_every
        if self.writes and every and experience.verdicts and (step % every == 0 or step == self.config.run.steps):
            write_samples(self.run.samples(step), sample_rows(step, prompts, experience.trajectories, experience.verdicts))

    def evaluation(self, evaluation: Evaluation) -> dict[str, float]:
        if self.writes:
            write_json(self.run.evaluation(evaluation.result["step"]), evaluation.result)
        return evaluation.metrics

    def export_hf(self, parts: Components, directory: Path) -> None:
        """Writes the policy as a Hugging Face directory. A collective call."""
        parts.phases.push()
        source = Path(self.config.model.path)
        tensors = execute_push_plan(parts.push_plan, parts.actor.chunks)
        config_json = config_of_dtype(json.loads((source / "config.json").read_text()), getattr(torch, self.config.model.dtype))
        write_hf_directory(directory, tensors, config_json, copy_from=source, writer=self.writes)
        distributed.barrier()
