"""What a comparison took, over all the commands that worked on it. May import: megatron_nsr.observability and the standard library."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

from megatron_nsr.observability.run_directory import write_json

WRITE_EVERY_S = 10.0  # what a kill loses at most of the clock


class Cost:
    """Seconds by the clock, and of CPU time of the runs that have ended; OUT/cost.json carries them from one command to the next."""

    def __init__(self, out: Path) -> None:
        self.path = out / "cost.json"
        before = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {"wall_s": 0.0, "cpu_s": 0.0}
        self._wall, self._cpu = before["wall_s"] - time.monotonic(), before["cpu_s"] - _children_cpu()
        self._written = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        return {"wall_s": round(self._wall + time.monotonic(), 1), "cpu_s": round(self._cpu + _children_cpu(), 1)}

    def note(self) -> None:
        """Writes the file, at most every WRITE_EVERY_S seconds."""
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        write_json(self.path, self.seconds)


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
