"""Part (e) with the 0.5B shape: 50 steps, over which engine and policy must stay together.

May import: tools.acceptance.job.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tools.acceptance import job
from tools.acceptance.bases import Base
from tools.acceptance.curves import Lesson
from tools.acceptance.record import Record
from tools.acceptance.runs import RunSettings

GOALS = {"gap": job.GAP, "drift": job.DRIFT}
BASE = Base("0.5b", "bfloat16", Lesson(100, 64, 120, 3e-4), 8192)
RUN = RunSettings("bfloat16", 120, 16, 4, 4096, 2e-6, sleep_level=1, offload="optimizer")
GPU = job.Settings(BASE, RUN, 55)
DRY = job.Settings(job.DRY_BASE, replace(job.DRY_RUN, offload="optimizer"), 4)


def run(record: Record, work: Path) -> None:
    job.run(record, work, DRY if record.dry else GPU)
