"""Part (e) with the 1.5B shape: seconds, tokens, memory, and the update's utilization.

May import: tools.acceptance.job.
"""

from __future__ import annotations

from pathlib import Path

from tools.acceptance import job
from tools.acceptance.bases import Base
from tools.acceptance.curves import Lesson
from tools.acceptance.record import Record
from tools.acceptance.runs import RunSettings

GOALS = {"utilization": job.UTILIZATION}
BASE = Base("1.5b", "bfloat16", Lesson(80, 64, 120, 2e-4), 8192)
RUN = RunSettings("bfloat16", 120, 16, 8, 4096, 2e-6, sleep_level=2, offload="all")
GPU = job.Settings(BASE, RUN, 12)
DRY = job.Settings(job.DRY_BASE, job.DRY_RUN, 3)


def run(record: Record, work: Path) -> None:
    job.run(record, work, DRY if record.dry else GPU)
