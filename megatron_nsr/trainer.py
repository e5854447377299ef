"""The training loop: prompts, rollout, reward, objective, policy update, weight push.

May import: everything below it. One step reads top to bottom in `Trainer.train_step`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from megatron_nsr.clock import PhaseClock
from megatron_nsr.components import VALIDATION, Components, Inputs, build_components, read_inputs
from megatron_nsr.config import Config
from megatron_nsr.evaluation.fixed_responses import FixedResponses, fixed_responses
from megatron_nsr.experience import Experience
from megatron_nsr.observability.loggers import MetricLogger
from megatron_nsr.observability.metrics import last_step, steps_by
from megatron_nsr.observability.run_directory import RunDirectory, locate_run
from megatron_nsr.observability.state import Status, read_state
from megatron_nsr.platform import distributed
from megatron_nsr.platform.signals import StopRequest
from megatron_nsr.recording import Recorder, alone_in, announce, check_gap, conclude, open_loggers, reporting_state, require_loggers
from megatron_nsr.training.checkpoint_files import newest_checkpoint
from megatron_nsr.training.checkpoints import Checkpoints
from megatron_nsr.training.critic import joined
from megatron_nsr.training.schedule import learning_rate
from megatron_nsr.types import NoVerdicts, Prompt, RolloutsLost, StepMetrics

Result = TypeVar("Result")


def train(config: Config) -> Status:
    """Runs or resumes the training run of `config`; returns "done" or "stopped". Raises UserError for wrong input."""
    inputs = read_inputs(config, training=True)
    run = locate_run(config)
    state = read_state(run)
    if state and state.status == "done" and state.step >= config.run.steps:
        if distributed.launched_rank() == 0:
            print(f"{run.path}: all {state.step} steps are done; raise run.steps to go on, or choose another run.dir")
        return "done"
    newest_checkpoint(run.checkpoints)  # a damaged one is found before the slow start
    stop = StopRequest()
    with alone_in(run), ExitStack() as stack, reporting_state(run) as progress:
        require_loggers(config)
        stop.install()
        announce(config, inputs)
        trainer = Trainer(config, run, inputs, build_components(config, inputs, stack), stop)
        stop.install()  # the engine's start may have replaced the handlers
        progress.started(config, lambda: trainer.step)
        loggers = stack.enter_context(open_loggers(run, config, completed_steps=trainer.step))
        status = trainer.run(loggers)
        progress.ended(status, f"{stop.signal or 'a signal on another rank'} asked for it" if status == "stopped" else "")
    conclude(config, run, status, trainer.step)
    return status


class Trainer:
    """Owns the step counter and the order of things; every rank runs the same loop."""

    def __init__(self, config: Config, run: RunDirectory, inputs: Inputs, parts: Components, stop: StopRequest) -> None:
        assert inputs.train is not None and inputs.sampler is not None
        self.config, self.run_directory, self.parts, self.stop = config, run, parts, stop
        self.prompts = inputs.train.prompts
        self.sampler, self.tokenizer = inputs.sampler, inputs.tokenizer
        self.checkpoints = Checkpoints(run.checkpoints, keep=config.checkpoint.keep)
        self.recorder = Recorder(run, config)
        self.fixed = FixedResponses()
        self.step = 0  # training steps completed
        self.metrics: dict[str, float] = {}  # of the last of them
        self.checkpointed = 0  # the step of the newest checkpoint
        self.unfinished: dict[str, float] | None = None  # metrics of a step that has a checkpoint, but neither evaluation nor log line yet
        self._resume()

    def run(self, loggers: MetricLogger) -> Status:
        """Raises RolloutsLost where no rollout server is left, and NoVerdicts, after a checkpoint of the last complete step."""
        try:
            return self._steps(loggers)
        except (RolloutsLost, NoVerdicts) as error:
            if self.checkpointed < self.step:
                self._checkpoint(self.metrics)
            kept = f"a checkpoint of step {self.step} is written" if self.step else "no step is complete yet"
            raise type(error)(f"{error}; {kept}, and the same command goes on") from None

    def _steps(self, loggers: MetricLogger) -> Status:
        device = self.parts.actor.groups.device
        self.parts.push(self.step)
        self.fixed = self._fixed_responses()
        if self.unfinished is not None:
            self._finish_step(self.unfinished, loggers)
        self._choose_best()
        interrupted = self.stop.agreed(device)
        while self.step < self.config.run.steps and not interrupted:
            self.metrics = metrics = self.train_step()
            self.recorder.check(metrics, loggers, self.step)
            interrupted = self.stop.agreed(device)
            if interrupted or self._checkpoints(self.step):
                metrics |= self._checkpoint(metrics)
            if not (interrupted and self._evaluates(self.step)):  # an evaluation may take long; it is made up for when the run goes on
                self._finish_step(metrics, loggers)
        if interrupted and (self.step < self.config.run.steps or self._evaluates(self.step)):
            return "stopped"
        if self.config.checkpoint.export_hf:
            self.recorder.export_hf(self.parts, self.run_directory.hf)
        return "done"

    def train_step(self) -> dict[str, float]:
        """One step on one batch of prompts; `self.step` counts it when it is complete."""
        clock, step, phases = PhaseClock(), self.step + 1, self.parts.phases
        with clock("offload"):
            phases.sample()
        experience = self._sampled(lambda: self.parts.source.collect(map(self._prompts, itertools.count()), step, clock))
        if self.config.rollout.max_staleness and step < self.config.run.steps:
            self.parts.source.draw_ahead(self._prompts(experience.prompt_batches), step + 1)
        with clock("offload"):
            phases.train()
        critic, only_critic = self.parts.critic, step <= self.config.critic.warmup_steps
        with clock("old_logprobs"):
            score = only_critic or (critic is not None and critic.kl_coefficient > 0)
            prepared = self.parts.actor.prepare(experience.batch, step, score=score)
        metrics: dict[str, float] = {}
        if critic is not None:
            with clock("critic"):
                prepared = replace(prepared, mini_batches=critic.judge(prepared.mini_batches))
                metrics |= critic.update(prepared.mini_batches, self._learning_rate(step, self.config.critic.learning_rate))
            prepared = replace(prepared, mini_batches=joined(prepared.mini_batches, experience.batch.shares))
        if only_critic:
            prepared = replace(prepared, mini_batches=())
        with clock("update"):
            metrics |= self.parts.actor.update(prepared, self._learning_rate(step, self.config.optimizer.learning_rate))
        if self.config.rollout.max_staleness:
            with clock("rollout"):  # what training did not hide
                self.parts.source.settle()
        with clock("weight_sync"):
            if self.parts.pushes_every_step:
                metrics |= self.parts.push(step)
        self.step = step
        for _ in range(experience.prompt_batches):
            self.sampler.next()  # only now: a step that is given up is drawn again
        self.recorder.keep_samples(step, experience.prompts, experience)
        return self._step_metrics(self.parts.source.finish(metrics), experience, clock)

    def _prompts(self, ahead: int) -> list[Prompt]:
        """The sampler's next batch, or one that comes `ahead` batches later."""
        return [self.prompts[index] for index in self.sampler.peek(ahead)]

    def _sampled(self, sample: Callable[[], Result]) -> Result:
        """What `sample` draws; where all servers lost their weights, from those that answer once these were pushed again."""
        try:
            return sample()
        except RolloutsLost:
            self.parts.push(self.step)
            return sample()

    def _evaluates(self, step: int) -> bool:
        every = self.config.evaluation.every
        return step == self.config.run.steps or (every > 0 and step % every == 0)

    def _checkpoints(self, step: int) -> bool:
        """What validation may choose has a checkpoint."""
        chosen_from = self.config.data.validation is not None and self._evaluates(step)
        return chosen_from or step % self.config.checkpoint.every == 0 or step == self.config.run.steps

    def _finish_step(self, metrics: dict[str, float], loggers: MetricLogger) -> None:
        """Exports and evaluates where it is due, and writes the step's line."""
        clock, export_every = PhaseClock(), self.config.checkpoint.export_every
        if export_every and self.step % export_every == 0:
            self.recorder.export_hf(self.parts, self.run_directory.export(self.step))
        if self._evaluates(self.step):
            with clock("eval"):
                metrics |= self.evaluate()
            metrics["time/eval_s"] = clock.seconds["eval"]
        loggers.log(StepMetrics(self.step, metrics))
        if self._evaluates(self.step):
            self._choose_best()

    def _choose_best(self) -> None:
        """Lets the logged validation results say which checkpoint is best: a resumed run has the same ones."""
        if self.config.data.validation is not None and distributed.rank() == 0:
            self.checkpoints.point_best(steps_by(self.run_directory.metrics, f"eval/{VALIDATION}/pass@1"))

    def _fixed_responses(self) -> FixedResponses:
        """Made before the first step, so that they are the base's; random weights, as supervised runs may start from, draw none."""
        benchmarks, draw = self.parts.benchmarks, self.parts.pushes_every_step
        if benchmarks is None:
            return FixedResponses()
        return self._sampled(lambda: fixed_responses(self.run_directory.fixed_responses, benchmarks, self.tokenizer, draw=draw))

    def evaluate(self) -> dict[str, float]:
        """Pass@k and entropy of the current weights on the benchmarks, written to RUN/eval/step_N.json."""
        if self.parts.benchmarks is None or not self.parts.benchmarks.benchmarks:
            return {}
        if not self.parts.pushes_every_step:
            self.parts.push(self.step)
        benchmarks = self.parts.benchmarks
        evaluation = self._sampled(lambda: benchmarks.run(self.step, self.parts.actor))
        check_gap(evaluation.metrics, "heldout", self.config.rollout.max_logprob_gap)
        return self.recorder.evaluation(evaluation) | self.fixed.measure(self.parts.actor)

    def _learning_rate(self, step: int, peak: float) -> float:
        settings = self.config.optimizer
        return learning_rate(
            step - 1,
            peak=peak,
            final=settings.min_learning_rate,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
            total_steps=self.config.run.steps,
        )

    def _step_metrics(self, metrics: dict[str, float], experience: Experience, clock: PhaseClock) -> dict[str, float]:
        times = clock.metrics()
        return {
            "data/epoch": float(self.sampler.epoch),
            **experience.metrics,
            **metrics,
            **times,
            "perf/tokens_per_s": experience.sampled_tokens / times["time/step_s"],
        }

    def _checkpoint(self, metrics: dict[str, float]) -> dict[str, float]:
        """The step's metrics go with it: a run that ends before their line is written can still write it."""
        actor, critic, clock = self.parts.actor, self.parts.critic, PhaseClock()
        self.parts.phases.inspect()
        files = Path(self.config.model.path)
        state = {"sampler": self.sampler.state(), "weight_version": self.step, "metrics": metrics}
        with clock("checkpoint"):
            ahead = self.parts.rollouts.ahead.state() if self.parts.rollouts else None
            self.checkpoints.save(self.step, state, actor.wrapped, actor.optimizer, actor.backend, files, ahead, critic)
        self.checkpointed = self.step
        return {"time/checkpoint_s": clock.seconds["checkpoint"]}

    def _resume(self) -> None:
        latest = self.checkpoints.latest()
        if latest is None:
            return
        actor = self.parts.actor
        saved = self.checkpoints.load(latest, actor.wrapped, actor.optimizer, actor.backend, self.parts.critic)
        self.sampler.load_state(saved["sampler"])
        if self.parts.rollouts:
            self.parts.rollouts.ahead.restore(saved["ahead"])
        self.step = self.checkpointed = saved["step"]
        self.metrics = saved["metrics"]
        if distributed.broadcast_object(last_step(self.run_directory.metrics)) < self.step:
            self.unfinished = saved["metrics"]
