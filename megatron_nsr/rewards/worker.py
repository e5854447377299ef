"""A grader process: reads batches from its socket, answers one verdict at a time.

May import: types, platform.imports and the standard library; nothing heavy, and never torch.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from megatron_nsr.platform.imports import load_instance
from megatron_nsr.rewards.grader import Grader
from megatron_nsr.types import Outcome, Prompt, Reason, UserError, Verdict

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Reply(NamedTuple):
    """What a worker sends for one item; `traceback` where the grader raised."""

    verdict: Verdict
    traceback: str | None = None


class Ready(NamedTuple):
    """The first message of a worker; `error` is for the user where the grader cannot be built."""

    error: str | None = None


Batch = list[tuple[str, Prompt]]


def main(arguments: list[str]) -> None:
    """Arguments: socket, parent's pid, grader's import path, memory limit in MiB, whether the parent's main thread started us (0 or 1)."""
    connection = Connection(int(arguments[0]))
    parent, grader_path, memory_limit_mib, tied = int(arguments[1]), arguments[2], int(arguments[3]), arguments[4] == "1"
    _ignore_the_trainers_signals()
    _die_with(parent, tied)
    try:
        grader: Grader = load_instance(grader_path, "reward.grader", "grade(response, prompt)")
    except UserError as error:
        connection.send(Ready(str(error)))
        return
    _limit_memory(memory_limit_mib)
    connection.send(Ready())
    try:
        while True:
            batch: Batch = connection.recv()
            for response, prompt in batch:
                connection.send(judge(grader, response, prompt))
    except (EOFError, ConnectionError):
        return  # the pool closed or its process is gone


def judge(grader: Grader, response: str, prompt: Prompt) -> Reply:
    """One verdict; whatever the grader raises, running out of memory included, is a crash of that item alone."""
    try:
        verdict = grader.grade(response, prompt)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"grade() returned {type(verdict).__name__}, not a megatron_nsr.types.Verdict")
    except Exception:
        return Reply(Verdict(Outcome.NONE, Reason.CRASH), traceback.format_exc())
    return Reply(verdict)


def _ignore_the_trainers_signals() -> None:
    """Schedulers signal every process of a job; the pool outlives the trainer's last checkpoint and closes us itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _die_with(parent: int, tied: bool) -> None:
    """Ends this process when the parent is gone, even in the middle of an item.

    The kernel's death signal reaches code that never yields the interpreter lock, but it follows the parent's *thread*
    (prctl(2)), so it is set only where that is the main one. The watching thread serves the rest.
    """
    if tied and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _limit_memory(limit_mib: int) -> None:
    """Caps the address space at its present size plus the limit; beyond it allocations raise MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + limit_mib * 2**20
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
