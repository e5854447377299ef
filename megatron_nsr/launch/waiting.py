"""Waiting for a job: its log, its signals, and what it ended with.

May import: this package.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_nsr.launch.job import JobDirectory, JobRecord, progress
from megatron_nsr.launch.last_words import MESSAGE, last_words
from megatron_nsr.launch.nemo import ENDED

POLL_S = 1.0
READ_LINES, SHOWN_LINES = 200, 40  # of the log's end
DONE, FAILED, WRONG_INPUT = 0, 1, 2


def wait_for(directory: JobDirectory, record: JobRecord, current: Callable[[], str], *, follow: bool) -> None:
    """Until `current` says that the job has ended; prints its state when it changes, and the log where it is followed.

    A signal to this process goes to a job of this machine; one of Slurm's goes on without us.
    """
    shown, position = "", 0
    with _passing_signals_on(directory) if record.executor != "slurm" else _leaving_the_job(record):
        while True:
            state = current()
            ended = has_ended(state)
            if follow:
                position = _print_from(directory, position)
            elif state != shown and not ended:
                print(f"job {record.id}: {state}", flush=True)
            if ended:
                return
            shown = state
            time.sleep(POLL_S)


def has_ended(state: str) -> bool:
    """Whether a state, nemo-run's or ours of a job of this machine, is a last one."""
    return state in ENDED or state == "ENDED"


def exit_status(directory: JobDirectory, record: JobRecord, state: str, *, followed: bool) -> int:
    """The run's own exit status; where no rank left one, it was killed, unless the job itself succeeded elsewhere."""
    status = directory.status()
    if status is None:
        status = DONE if ENDED.get(state) else FAILED
    said = last_words(directory.last_lines(READ_LINES)) if status in (FAILED, WRONG_INPUT) else []
    message = next((line for line in reversed(said) if MESSAGE in line), None)
    if not followed and not (status == WRONG_INPUT and message):
        for line in said[-SHOWN_LINES:]:
            print(line, file=sys.stderr)
    print(f"job {record.id}: exit status {status}; log {directory.log}", flush=True)
    print(progress(record.run), flush=True)
    if message:
        print(message, file=sys.stderr)
    return status


def interrupt(directory: JobDirectory, slurm_job: str | None) -> None:
    """SIGTERM to the trainer. A job of Slurm: its script first, which then knows that it shall not queue again."""
    if slurm_job is None:
        process = directory.process()
        if process is not None and directory.status() is None:
            process.terminate()
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
