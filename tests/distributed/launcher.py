"""Starts a test program on several ranks, once for many cases, and reads what rank 0 found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def run_cases(module: str, nproc: int, paths: Sequence[Path] = (), *, timeout_s: float = 300) -> dict[str, Any]:
    """What `find(*paths)` of `module` (such as tests.distributed.parity_cases) returned on rank 0 of `nproc` ranks; see ranks.py.

    When it fails or takes longer than `timeout_s`, AssertionError carries the ranks' output.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        command = [sys.executable, "-m", "tests.distributed.ranks", str(nproc), module, str(results), *map(str, paths)]
        status, output = _run(command, timeout_s)
        if status != 0 or not results.is_file():
            print(output)
            raise AssertionError(f"{module} on {nproc} ranks: exit status {status}\n{output[-6000:]}")
        found: dict[str, Any] = json.loads(results.read_text())
        return found


def _run(command: Sequence[str], timeout_s: float) -> tuple[int | str, str]:
    """(exit status or "timed out", standard output and error); no rank outlives the call."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": str(REPOSITORY)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)  # a test of this process may have set them for a world of its own
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return "timed out", output
