"""Samples drawn ahead of the step that trains on them, in a thread, while the step before trains.

May import: types, this package and the standard library.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_nsr.rollout.engine import Completion, RolloutEngine, SampleRequest, Sampling
from megatron_nsr.types import RolloutsLost


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was asked for, and what came of it from which version of the weights."""

    requests: tuple[SampleRequest, ...]
    sampling: Sampling
    version: int | None
    completions: tuple[Completion, ...]


class Ahead:
    """At most one batch at a time. An engine that samples in the caller's process must not be used so."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts_ahead")
        self._running: Future[Drawn] | None = None
        self._drawn: Drawn | None = None

    def start(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """Draws from the weights that the engine has now; these must stay until `settle`."""
        version = self._engine.version

        def draw() -> Drawn:
            return Drawn(tuple(requests), sampling, version, tuple(self._engine.generate(requests, sampling)))

        self.settle()
        self._running = self._pool.submit(draw)

    def settle(self) -> None:
        """Waits until nothing is being drawn. A batch that was lost with its servers is forgotten: it will be drawn anew."""
        running, self._running = self._running, None
        if running is not None:
            try:
                self._drawn = running.result()
            except RolloutsLost:
                self._drawn = None

    def take(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Drawn | None:
        """The batch, once, if it is what is asked for."""
        drawn = self._drawn
        if drawn is None or (drawn.requests, drawn.sampling) != (tuple(requests), sampling):
            return None
        self._drawn = None
        return drawn

    def state(self) -> Any:
        """The batch that waits for its step, for `restore`; picklable."""
        return self._drawn

    def restore(self, state: Any) -> None:
        """Puts back a batch."""
        self._drawn = state

    def close(self) -> None:
        """Starts nothing more; what is being drawn goes on until the process ends."""
        self._pool.shutdown(wait=False)
