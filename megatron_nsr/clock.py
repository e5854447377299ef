"""Wall-clock time by phase of a step. May import: the standard library."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseClock:
    """`with clock("rollout"):` adds to that phase; phases do not nest."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """`time/PHASE_s` of each phase, `time/step_s` since the clock was made, and `time/other_s`, what no phase covers."""
        total = time.perf_counter() - self.started
        phases = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        return {**phases, "time/other_s": total - sum(self.seconds.values()), "time/step_s": total}
