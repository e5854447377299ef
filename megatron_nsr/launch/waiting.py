"""Waiting for a job: its log, its signals, and what it ended with.

May import: this package.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_nsr.launch.job import JobDirectory, JobRecord, progress
from megatron_nsr.launch.nemo import ENDED

POLL_S = 1.0
LAST_LINES = 60  # torchrun alone adds 40 to what a rank said
DONE, FAILED = 0, 1


def wait_for(directory: JobDirectory, record: JobRecord, current: Callable[[], str], *, follow: bool) -> None:
    """Until `current` says that the job has ended; prints its state when it changes, and the log where it is followed.

    A signal to this process goes to a job of this machine; one of Slurm's goes on without us.
    """
    shown, position = "", 0
    with _passing_signals_on(directory) if record.executor != "slurm" else _leaving_the_job(record):
        while True:
            state = current()
            ended = state in ENDED or state == "ENDED"
            if follow:
                position = _print_from(directory, position)
            elif state != shown and not ended:
                print(f"job {record.id}: {state}", flush=True)
            if ended:
                return
            shown = state
            time.sleep(POLL_S)


def exit_status(directory: JobDirectory, record: JobRecord, state: str, *, followed: bool) -> int:
    """The run's own exit status; where no rank left one, it was killed, unless the job itself succeeded elsewhere."""
    status = directory.status()
    if status is None:
        status = DONE if ENDED.get(state) else FAILED
    if status in (1, 2) and not followed:
        for line in directory.last_lines(LAST_LINES):
            print(line, file=sys.stderr)
    print(f"job {record.id}: exit status {status}; log {directory.log}", flush=True)
    print(progress(record.run), flush=True)
    return status


def interrupt(directory: JobDirectory, slurm_job: str | None) -> None:
    """SIGTERM to the trainer. A job of Slurm: its script first, which then knows that it shall not queue again."""
    if slurm_job is None:
        if directory.pid.is_file() and directory.status() is None:
            os.kill(int(directory.pid.read_text()), signal.SIGTERM)
        return
    for options in (["--state=PENDING"], ["--state=RUNNING", "--batch", "--signal=TERM"], ["--state=RUNNING", "--signal=TERM"]):
        subprocess.run(["scancel", *options, slurm_job], check=False)


def _print_from(directory: JobDirectory, position: int) -> int:
    """Prints what the log has beyond `position`; returns its new end."""
    if not directory.log.is_file():
        return position
    with directory.log.open("rb") as file:
        file.seek(position)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return position + len(text)


@contextmanager
def _passing_signals_on(directory: JobDirectory) -> Iterator[None]:
    """SIGTERM and SIGINT mean the job, which nemo-run has started in a session of its own."""

    def tell(_number: int, _frame: FrameType | None) -> None:
        print("stopping: the run writes a checkpoint first", file=sys.stderr, flush=True)
        interrupt(directory, None)

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _leaving_the_job(record: JobRecord) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"the job goes on: megatron-nsr job status|logs|cancel {record.id}", file=sys.stderr)
        raise
