"""One job: its directory, which it shares with whoever launched it, and what can be read there.

May import: this package, config, config_files, observability, types.

    JOB/code/        the commit                 JOB/train.log    what the ranks print      JOB/serve.log  what rollout servers print
    JOB/config.yaml  the resolved config        JOB/exit_status  of the run, as of `train`; absent while it runs, or where it was killed
    JOB/train.sh     what starts a rank         JOB/servers/     addresses of rollout servers
    JOB/job.json     who, where and of what commit               JOB/pid          of a job on this machine
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megatron_nsr.config import Config
from megatron_nsr.launch.cluster import Cluster
from megatron_nsr.launch.source import Source
from megatron_nsr.observability.run_directory import RunDirectory, write_json
from megatron_nsr.observability.state import read_state
from megatron_nsr.types import UserError

DRY_RUN = "DRY-RUN"  # nemo-run takes the last underscore for the end of the title


def nemo_run_home() -> Path:
    """Where nemo-run keeps what it knows of jobs; shared with the nodes, as a home usually is."""
    return Path(os.environ.get("NEMORUN_HOME", "~/.nemo_run")).expanduser().absolute()


@dataclass(frozen=True, slots=True)
class JobRecord:
    """JOB/job.json. run: the run directory, absolute; commit: None where no code was shipped."""

    id: str
    executor: str
    run: str
    commit: str | None
    uncommitted: bool


@dataclass(frozen=True, slots=True)
class JobDirectory:
    """Paths of a job's directory; nothing is created by naming it."""

    path: Path

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def server_log(self) -> Path:
        return self.path / "serve.log"

    @property
    def exit_status(self) -> Path:
        return self.path / "exit_status"

    @property
    def servers(self) -> Path:
        return self.path / "servers"

    @property
    def pid(self) -> Path:
        return self.path / "pid"

    @property
    def record(self) -> Path:
        return self.path / "job.json"

    def status(self) -> int | None:
        """The exit status that a rank left, None where none did."""
        text = self.exit_status.read_text().strip() if self.exit_status.is_file() else ""
        return int(text) if text else None

    def process(self) -> psutil.Process | None:
        """What takes the signals of a job of this machine, None where it has ended.

        Its number may be another process's by now: each of the commands that a job's process becomes names the job's directory.
        """
        try:
            process = psutil.Process(int(self.pid.read_text()))
            return process if any(self.path.name in word for word in process.cmdline()) else None
        except (OSError, ValueError, psutil.Error):
            return None

    def runs(self) -> bool:
        """Whether a job of this machine still runs."""
        return self.status() is None and self.process() is not None

    def last_lines(self, count: int) -> list[str]:
        if not self.log.is_file():
            return []
        with self.log.open(errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, count)]


@dataclass(frozen=True, slots=True)
class Job:
    """What is launched. config: resolved, with every path as the user wrote it; cwd: where it was launched, where its ranks start."""

    id: str
    title: str
    directory: JobDirectory
    cwd: Path
    config: Config
    cluster: Cluster
    source: Source | None

    def record(self) -> JobRecord:
        commit = self.source.commit if self.source else None
        changed = self.source.changed if self.source else False
        return JobRecord(self.id, self.cluster.executor, str(self.cwd / self.config.run.dir), commit, changed)


def new_job(config: Config, cluster: Cluster, source: Source | None, cwd: Path, *, dry_run: bool) -> Job:
    """Names the job after its run's directory; creates nothing."""
    title = re.sub("[^A-Za-z0-9]+", "-", Path(config.run.dir).name).strip("-") or "run"
    identity = f"{title}_{DRY_RUN if dry_run else time.time_ns()}"
    return Job(identity, title, job_directory(identity), cwd, config, cluster, source)


def job_directory(identity: str) -> JobDirectory:
    return JobDirectory(nemo_run_home() / "megatron_nsr" / identity)


def write_record(job: Job) -> None:
    write_json(job.directory.record, asdict(job.record()))


def find_job(identity: str) -> tuple[JobDirectory, JobRecord]:
    """A job that was launched; raises UserError where there is none of this name."""
    directory = job_directory(identity)
    if not directory.record.is_file():
        known = sorted(path.parent.name for path in directory.path.parent.glob("*/job.json"))
        raise UserError(f"job {identity}: not in {directory.path.parent}; there {'are ' + ', '.join(known[-5:]) if known else 'is none'}")
    return directory, JobRecord(**json.loads(directory.record.read_text(encoding="utf-8")))


def progress(run: str) -> str:
    """The run's own state as one line."""
    state = read_state(RunDirectory(Path(run)))
    if state is None:
        return f"{run}: no state yet"
    return f"{run}: {state.status} at step {state.step}{f', {state.reason}' if state.reason else ''}"
