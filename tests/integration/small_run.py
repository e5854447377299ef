"""A tiny quickstart for tests of the real commands: its data, the command lines, and processes that can be signalled.

May import: the quickstart, megatron_nsr.observability, filelock and the standard library.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from examples.quickstart.prepare import prepare
from megatron_nsr.observability.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
TIMEOUT_S = 300
TIMINGS = ("time/", "perf/")


@dataclass(frozen=True, slots=True)
class Small:
    """Where the data and models of the test session lie."""

    root: Path

    @property
    def model(self) -> Path:
        """config.json and tokenizer only."""
        return self.root / "model"

    @property
    def base(self) -> Path:
        """The run that trained the base model; its `hf` is what the objectives start from."""
        return self.root / "base"

    def data(self, name: str) -> Path:
        return self.root / "data" / f"{name}.jsonl"

    def supervised(self, run: Path, *overrides: str) -> list[str]:
        return [
            *("train", str(CONFIGS / "quickstart_base.yaml"), f"run.dir={run}", f"model.path={self.model}"),
            *(f"data.train={self.data('corpus')}", f"evaluation.benchmarks.puzzle={self.data('test')}", "evaluation.limit=4"),
            *("evaluation.samples=2", "logging.tensorboard=false", *overrides),
        ]

    def nsr(self, run: Path, *overrides: str) -> list[str]:
        """A step is 16 prompts x 4 responses in two mini-batches; rates change from step to step, a checkpoint follows each.

        16 of the training problems choose the best checkpoint.
        """
        return [
            *("train", str(CONFIGS / "quickstart.yaml"), "objective.name=nsr", f"run.dir={run}", f"model.path={self.base / 'hf'}"),
            *(f"data.train={self.data('train')}", "data.validation=16", "data.prompts_per_step=16", "rollout.samples_per_prompt=4"),
            *("optimizer.warmup_steps=2", "optimizer.weight_decay=0.1", "checkpoint.every=1", "checkpoint.keep=2"),
            "checkpoint.export_every=5",
            *(f"evaluation.benchmarks.puzzle={self.data('test')}", "evaluation.limit=8", "evaluation.samples=4", "evaluation.every=4"),
            *("logging.samples_every=2", "logging.tensorboard=false", *overrides),
        ]


def prepare_small(root: Path) -> Small:
    """Writes the quickstart's data, its corpus shortened, and trains the base just long enough to write words."""
    root.mkdir()
    prepare(root, corpus_size=3000)
    small = Small(root)
    steps = ("run.steps=40", "optimizer.warmup_steps=5", "checkpoint.every=40")
    finished(start(small.supervised(small.base, *steps), root / "base.log"), 0)
    return small


def made_once(folder: Path, make: Callable[[], object]) -> Path:
    """The folder, which `make` fills in the first of the session's test processes that asks for it; the others wait and share it."""
    made = Path(f"{folder}.made")
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make()
            made.touch()
    return folder


@dataclass(frozen=True, slots=True)
class Started:
    """A command in a session of its own; standard output and error go to `log`."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def start(arguments: Sequence[str], log: Path, *, ranks: int = 1, module: str = "megatron_nsr", python: str | None = None) -> Started:
    """Starts `python -m megatron_nsr`, under torchrun where there are several ranks. python: of another environment than this one."""
    command = [python or sys.executable, "-m", module, *arguments]
    if ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
        command = [*torchrun, "--rdzv-endpoint", "127.0.0.1:0", "-m", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)  # a test of this process may have set them for a world of its own
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    return Started(process, log)


def finished(started: Started, status: int) -> str:
    """Waits for the end, requires the exit status, and returns what was printed; no process outlives the call."""
    try:
        started.process.wait(TIMEOUT_S)
    finally:
        kill(started)
    assert started.process.returncode == status, f"exit status {started.process.returncode}\n{started.text[-6000:]}"
    return started.text


def kill(started: Started) -> None:
    """Kills what is left of the command and of all that it started."""
    try:
        os.killpg(started.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    started.process.wait()


def cut_short(run: Path, step: int) -> None:
    """Leaves a finished run of one step more as one that was killed after `step` leaves its directory."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:step]))
    shutil.rmtree(run / "checkpoints" / f"step_{step + 1}")
    (run / "checkpoints" / "latest").unlink()
    os.symlink(f"step_{step}", run / "checkpoints" / "latest")
    shutil.rmtree(run / "hf")
    (run / "state.json").write_text((run / "state.json").read_text().replace('"done"', '"running"'))


def wait_until(happened: Callable[[], bool], started: Started, what: str) -> None:
    """Waits for something that the command does; it must not end before."""
    deadline = time.monotonic() + TIMEOUT_S
    while not happened():
        ended = started.process.poll() is not None
        if ended or time.monotonic() > deadline:
            kill(started)
            raise AssertionError(f"{'it ended' if ended else 'time ran out'} before {what}\n{started.text[-6000:]}")
        time.sleep(0.01)


def steps_logged(run: Path) -> int:
    return len(read_metrics(run / "metrics.jsonl"))


def state(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "state.json").read_text())
    return found


def values(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without timings."""
    return [{name: value for name, value in step.items() if not name.startswith(TIMINGS)} for step in read_metrics(run / "metrics.jsonl")]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Every path below a folder with its time of change and its bytes."""
    return {str(p.relative_to(folder)): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in sorted(folder.rglob("*"))}
