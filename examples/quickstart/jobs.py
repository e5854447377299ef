"""Training runs as child processes: the quickstart's, what each is doing, and running some of any at a time.

May import: megatron_nsr.observability, megatron_nsr.types, psutil and the standard library.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from megatron_nsr.observability.run_directory import RunDirectory
from megatron_nsr.observability.state import read_state
from megatron_nsr.types import UserError

BASE = "base"
OBJECTIVES = ("psr", "nsr", "w_reinforce")
CONFIGS = Path(__file__).parents[2] / "configs"
POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Job:
    """One training run: what to start, where its run directory is, and where its output goes."""

    name: str
    command: tuple[str, ...]
    run: RunDirectory
    log: Path

    @property
    def done(self) -> bool:
        """Whether its state.json says so. Raises UserError where that file is not one of ours."""
        state = read_state(self.run)
        return state is not None and state.status == "done"


class JobFailed(Exception):
    """A job's process ended with another status than 0."""

    def __init__(self, job: Job, status: int) -> None:
        super().__init__(f"{job.name} ended with status {status}")
        self.job, self.status = job, status


class Stopped(Exception):
    """A signal asked for an end, and every job has ended since."""


class StopSignals:
    """Counts SIGINT and SIGTERM while it is entered, in place of dying of them."""

    def __init__(self) -> None:
        self.count = 0
        self._previous: dict[signal.Signals, Any] = {}  # what signal.signal returned

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Holds OUT/lock, so that no two commands start the same runs. Raises UserError where another one holds it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another command is at work in it; wait for its end, or choose another --out") from None
        yield


def exit_status(work: Callable[[StopSignals], int]) -> int:
    """What `work` returns, or the exit status for how it ended otherwise, which is explained on standard error."""
    try:
        with StopSignals() as signals:
            return work(signals)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped:
        print("Stopped. The same command continues from the newest checkpoints.", file=sys.stderr)
        return 3
    except JobFailed as failure:
        explain(failure)
        return child_status(failure.status)


def explain(failure: JobFailed) -> None:
    """Shows the end of the failed job's log, and how to start it by hand."""
    show = partial(print, file=sys.stderr)
    show(*last_lines(failure.job.log), sep="\n")
    show(f"error: {failure.job.name} ended with status {failure.status}; the lines above end its log, {failure.job.log}")
    show(f"It was started as: {shlex.join(failure.job.command)}")


def child_status(status: int) -> int:
    """A child's status as ours; one that a signal killed has failed."""
    return status if status > 0 else 1


def base_job(out: Path) -> Job:
    """Supervised pre-training of the base model."""
    data, run = out / "data", out / BASE
    overrides = (f"run.dir={run}", f"model.path={out / 'model'}", f"data.train={data / 'corpus.jsonl'}")
    return _job(BASE, "quickstart_base.yaml", out, overrides)


def objective_job(name: str, out: Path) -> Job:
    """Reinforcement learning from the base model with one objective."""
    data, run = out / "data", out / name
    overrides = (f"objective.name={name}", f"run.dir={run}", f"model.path={out / BASE / 'hf'}", f"data.train={data / 'train.jsonl'}")
    return _job(name, "quickstart.yaml", out, overrides)


def _job(name: str, config: str, out: Path, overrides: tuple[str, ...]) -> Job:
    benchmark = f"evaluation.benchmarks.puzzle={out / 'data' / 'test.jsonl'}"
    command = (sys.executable, "-m", "megatron_nsr", "train", str(CONFIGS / config), *overrides, benchmark)
    return Job(name, command, RunDirectory(out / name), out / "logs" / f"{name}.log")


def run_jobs(jobs: Sequence[Job], at_once: int, signals: StopSignals, on_poll: Callable[[Sequence[Job]], None]) -> None:
    """Runs the jobs, `at_once` of them side by side, and calls `on_poll` with those started so far several times a second.

    A first signal is passed on as SIGTERM, at which a run writes a checkpoint and ends; a second one kills. When one job fails, the
    others are stopped in the same way.

    Raises JobFailed for the first that fails, Stopped after a signal.
    """
    waiting, running, started = list(jobs), list[tuple[Job, subprocess.Popen[bytes]]](), list[Job]()
    try:
        while (waiting or running) and not signals.count:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running.append((job, start(job)))
                started.append(job)
            time.sleep(POLL_S)
            on_poll(started)
            ended = [(job, process) for job, process in running if process.poll() is not None]
            running = [(job, process) for job, process in running if process.returncode is None]
            for job, process in ended:
                if process.returncode and not signals.count:
                    raise JobFailed(job, process.returncode)
    finally:
        stop([process for _, process in running], signals)
    if signals.count:
        raise Stopped


def start(job: Job) -> subprocess.Popen[bytes]:
    """Starts a job on one core, in a session of its own: a Ctrl-C reaches it through us only, once."""
    end_orphans(job)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def end_orphans(job: Job) -> None:
    """Ends what a killed command left running of this job, which would write into the same directory, and waits until it has."""
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == list(job.command):
            with suppress(psutil.NoSuchProcess):
                process.terminate()
                process.wait()


def stop(processes: Sequence[subprocess.Popen[bytes]], signals: StopSignals) -> None:
    """Asks all to end and waits until they have; kills them, with all that they started, on a further signal."""
    asked = signals.count
    for process in processes:
        process.terminate()
    while any(process.poll() is None for process in processes):
        if signals.count > asked:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        time.sleep(POLL_S)


def last_lines(path: Path, count: int = 20) -> list[str]:
    """The end of a log, empty where there is none."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:] if path.is_file() else []
