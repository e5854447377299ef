"""Starts programs of this repository in processes of their own: an engine, a policy or Triton's interpreter changes its process.

May import: psutil, the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # of a process's own, not of those that it starts


def python(*arguments: str | Path) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, with the repository importable. Without OMP_NUM_THREADS it is 1, as for every command of the project."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited = {name: value for name, value in os.environ.items() if name not in WORLD}
    return {"OMP_NUM_THREADS": "1", **inherited, "PYTHONPATH": path, **(changes or {})}


@contextmanager
def started(command: Sequence[str], log: Path | None = None, changes: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, of which nothing is left after the block. Its output goes to `log`, or to this one's."""
    with log.open("wb") if log else open(os.devnull, "wb") as file:
        output = file if log else None
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(changes), stdout=output, stderr=subprocess.STDOUT if log else None, start_new_session=True
        )
        try:
            yield process
        finally:
            end_session(process)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and all that it started, in sessions of their own too: a part that is killed cannot end its own programs.

    The session's leader may be gone while others of it live.
    """
    others = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for other in others:
        with suppress(psutil.NoSuchProcess):
            other.kill()
    process.wait()


def run(command: Sequence[str], log: Path, seconds: float, changes: Mapping[str, str] | None = None) -> None:
    """Raises RuntimeError with the end of what it printed where it fails, TimeoutError where it takes longer than `seconds`."""
    name = " ".join(command[1:4])
    with started(command, log, changes) as process:
        try:
            status = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{name} took longer than {seconds:.0f} s: {tail(log)}") from None
    if status != 0:
        raise RuntimeError(f"{name} ended with status {status}: {tail(log)}")


def tail(log: Path, characters: int = 500) -> str:
    return log.read_text(encoding="utf-8", errors="replace").strip()[-characters:] if log.exists() else ""
