"""Live progress of the runs, read from the files that they write. May import: megatron_nsr, the jobs, rich."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from examples.quickstart.jobs import Job
from megatron_nsr.config_files import load_config
from megatron_nsr.observability.run_directory import RunDirectory
from megatron_nsr.types import UserError

TAIL_BYTES = 16384  # several lines of metrics.jsonl
# The first of these that a step has is shown beside the bar.
SHOWN = (("reward/correct_ratio", "correct {:.2f}"), ("supervised/loss", "loss {:.3f}"))


class LiveProgress:
    """A bar for each started job: step, what it has reached, elapsed time. A context manager.

    keep_finished: a finished job's bar stays; otherwise a line takes its place, which suits more jobs than a screen has lines.
    """

    def __init__(self, console: Console, *, keep_finished: bool = True) -> None:
        self._keep_finished, self._finished = keep_finished, set[str]()
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[reached]:<13}"),
            TimeElapsedColumn(),
            console=console,
        )

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, jobs: Sequence[Job]) -> None:
        """Reads the newest step of each job; a job seen for the first time gets a bar."""
        for job in jobs:
            if job.name not in self._tasks:
                self._tasks[job.name] = self._progress.add_task(job.name, total=None, reached="starting")
            latest = latest_metrics(job.run.metrics) if job.name not in self._finished else None
            if latest:
                total = total_steps(job.run)
                self._progress.update(self._tasks[job.name], completed=latest["step"], total=total, reached=describe_step(latest))
                if latest["step"] == total:
                    self._finish(job, latest)

    def _finish(self, job: Job, latest: Mapping[str, Any]) -> None:
        self._finished.add(job.name)
        if not self._keep_finished:
            self._progress.update(self._tasks[job.name], visible=False)
            self._progress.console.print(f"{job.name}: {latest['step']} steps, {describe_step(latest)}", soft_wrap=True)


def latest_metrics(path: Path) -> dict[str, Any] | None:
    """The last complete line of a metrics.jsonl that is being written, None before the first."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        complete = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    try:
        record = json.loads(complete)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def describe_step(metrics: Mapping[str, Any]) -> str:
    """The step's correct ratio, or a supervised step's loss."""
    for name, text in SHOWN:
        if metrics.get(name) is not None:
            return text.format(metrics[name])
    return ""


def total_steps(run: RunDirectory) -> int | None:
    """run.steps of the config that the run has written, None before."""
    try:
        return _steps(run.config, run.config.stat().st_mtime_ns)
    except (FileNotFoundError, UserError):
        return None


@lru_cache(maxsize=64)
def _steps(config: Path, _written_ns: int) -> int:
    """Asked several times a second, and reading a configuration takes milliseconds; a run that goes on may write another."""
    return load_config(config).run.steps
