"""The timeline of training steps: who works when, on drawn response lengths, for engines in the trainer and for engines of their own.

May import: planning. Deterministic: the seed and the step decide every length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_nsr.planning.generation import Engine, Generation, generate_on
from megatron_nsr.planning.workload import Workload

ENGINES, TRAINER = "engines", "trainer"


@dataclass(frozen=True, slots=True)
class Event:
    """One phase of one step. busy: GPU-seconds of work in it; the rest of its GPUs wait for the slowest of them."""

    step: int
    group: str
    name: str
    start: float
    end: float
    busy: float


@dataclass(frozen=True, slots=True)
class Deployment:
    """engines: of the step's responses. train_seconds: of a step with the mean number of tokens. shared: engines in the training processes.

    ahead: steps that a batch is drawn before it trains, 0 or 1 (rollout.max_staleness); 1 needs GPUs of their own for the engines.
    """

    engine: Engine
    engines: int
    trainer_gpus: int
    train_seconds: float
    push_seconds: float
    shared: bool
    ahead: int = 0

    @property
    def gpus(self) -> int:
        return self.trainer_gpus if self.shared else self.trainer_gpus + self.engines * self.engine.tensor


@dataclass(frozen=True)
class Timeline:
    """Events of whole steps: from the first draw, or where that came a step before from the first update, to the last push."""

    deployment: Deployment
    events: tuple[Event, ...]
    tokens: int  # prompt tokens left out

    @cached_property
    def seconds(self) -> float:
        return max(event.end for event in self.events)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def busy_share(self, group: str) -> float:
        """Of the group's GPUs over the whole time."""
        deployment = self.deployment
        gpus = deployment.trainer_gpus if group == TRAINER or deployment.shared else deployment.engines * deployment.engine.tensor
        return sum(event.busy for event in self.events if event.group == group) / (gpus * self.seconds)


def simulate(deployment: Deployment, workload: Workload, steps: int, seed: int) -> Timeline:
    """`steps` training steps in the middle of a run. The push after step n waits until step n + 1 is drawn, where that is drawn ahead."""
    drawn = [_draw(deployment, workload, seed, step) for step in range(1, steps + deployment.ahead + 1)]
    events: list[Event] = []
    clock = 0.0
    for step, generations in enumerate(drawn[:steps], start=1):
        if not deployment.ahead:
            clock = _rollout(events, deployment, generations, step, clock)
        seconds = deployment.train_seconds * sum(one.tokens for one in generations) / _mean_tokens(workload)
        end = clock + seconds
        events.append(Event(step, TRAINER, "train", clock, end, seconds * deployment.trainer_gpus))
        if deployment.ahead:
            end = max(end, _rollout(events, deployment, drawn[step], step + 1, clock))
        events.append(Event(step, TRAINER, "push", end, end + deployment.push_seconds, deployment.push_seconds * deployment.trainer_gpus))
        clock = end + deployment.push_seconds
    return Timeline(deployment, tuple(events), sum(one.tokens for generations in drawn[:steps] for one in generations))


def _draw(deployment: Deployment, workload: Workload, seed: int, step: int) -> list[Generation]:
    return generate_on(deployment.engine, deployment.engines, workload.prompts, workload.samples, workload.lengths, (seed, step))


def _rollout(events: list[Event], deployment: Deployment, generations: Sequence[Generation], step: int, start: float) -> float:
    """Adds the event; returns its end."""
    end = start + max(one.seconds for one in generations)
    busy = sum(one.seconds for one in generations) * deployment.engine.tensor
    events.append(Event(step, ENGINES, "rollout", start, end, busy))
    return end


def _mean_tokens(workload: Workload) -> float:
    return workload.sequences * workload.lengths.response_mean
