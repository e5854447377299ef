"""Real rollout servers (`megatron-nsr serve`) for tests, which can be killed and started again on the same port.

May import: tests.integration.small_run, megatron_nsr.platform.distributed and the standard library.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from megatron_nsr.platform.distributed import free_port
from tests.integration.small_run import CONFIGS, Small, Started, kill, start, wait_until

PYTHON = os.environ.get("MEGATRON_NSR_SERVER_PYTHON")  # of another environment, for another version of vLLM than the trainer's


class RolloutServer:
    """One server of the small base model; `url` stays the same when it is started again."""

    def __init__(self, small: Small, log: Path, *overrides: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        self._arguments = [
            *("serve", str(CONFIGS / "quickstart.yaml"), f"model.path={small.base / 'hf'}", "rollout.kv_cache_mib=32"),
            *("--port", str(self.port), *overrides),
        ]
        self._started: Started | None = None

    def begin(self) -> None:
        """Starts it, without waiting."""
        self._started = start(self._arguments, self._log, python=PYTHON)

    def wait(self) -> None:
        """Until it answers."""
        assert self._started is not None
        wait_until(self._answers, self._started, "the server answered")

    def revive(self) -> None:
        """Starts it again if it is not there."""
        if self._started is None or self._started.process.poll() is not None:
            self.begin()
        self.wait()

    def kill(self) -> None:
        """As a crash does: at once, with all its processes."""
        if self._started is not None:
            kill(self._started)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def server_overrides(servers: Sequence[RolloutServer]) -> list[str]:
    return ["rollout.mode=server", f"rollout.servers=[{','.join(server.url for server in servers)}]"]
