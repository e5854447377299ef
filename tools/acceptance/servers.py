"""A rollout server of the project (`megatron-nsr serve`) beside the process that trains.

May import: megatron_nsr.config_files, platform; the standard library.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_nsr.config import Config
from megatron_nsr.config_files import dump_config
from megatron_nsr.platform.distributed import free_port
from tools.acceptance import processes


@contextmanager
def served(config: Config, work: Path, seconds: float, changes: Mapping[str, str]) -> Iterator[str]:
    """The address of a server of `config`'s model; it is gone after the block. Raises RuntimeError where it does not answer in time."""
    port, file, log = free_port(), work / "server.yaml", work / "server.log"
    file.write_text(dump_config(config), encoding="utf-8")
    command = processes.python("-m", "megatron_nsr", "serve", file, "--port", str(port))
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + seconds
    with processes.started(command, log, changes) as process:
        while not answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the rollout server did not start: {processes.tail(log)}")
            time.sleep(0.2)
        yield address


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
