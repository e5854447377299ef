"""What tests on the sandbox of tools/slurm_sandbox.sh share: a tiny quickstart, and `launch` with two nodes.

SLURM_CONF names the sandbox; `make test-slurm` starts and ends it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.quickstart.prepare import prepare
from tests.integration.small_run import CONFIGS, REPOSITORY, Small

WAIT_S = 900


@dataclass(frozen=True, slots=True)
class Sandbox:
    """`launch` on the two nodes; `home` is nemo-run's."""

    small: Small
    home: Path

    def begin(self, run: Path, *overrides: str) -> subprocess.Popen[str]:
        """The supervised quickstart on two nodes of one rank, without an evaluation and so without an engine."""
        train = self.small.supervised(
            run, "evaluation.benchmarks.puzzle=null", "optimizer.schedule=constant", "cluster.nodes=2", *overrides
        )
        return self._launch(train)

    def begin_with_servers(self, run: Path, *overrides: str) -> subprocess.Popen[str]:
        """NSR from random weights on one node, which samples from a server on the other."""
        alone = ["evaluation.benchmarks.puzzle=null", "data.validation=null", "checkpoint.export_every=0"]
        model = [f"model.path={self.small.model}", "model.initialization=random", "rollout.kv_cache_mib=32"]
        return self._launch(self.small.nsr(run, *alone, *model, "cluster.rollout.nodes=1", *overrides))

    def job(self, *arguments: str) -> str:
        """`megatron-nsr job ...`."""
        process = self._start("job", *arguments)
        output, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, output
        return output

    def name(self) -> str:
        """Of the newest job."""
        jobs = sorted(self.home.glob("megatron_nsr/*/job.json"), key=lambda path: path.stat().st_mtime)
        return jobs[-1].parent.name

    def _launch(self, train: list[str]) -> subprocess.Popen[str]:
        options = ["--executor", "slurm", "--uncommitted", "cluster.slurm.time=00:30:00"]
        return self._start("launch", train[1], *options, *train[2:])

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = os.environ | {"NEMORUN_HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "megatron_nsr", *arguments]
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    assert "SLURM_CONF" in os.environ, "start the sandbox first: make test-slurm, or tools/slurm_sandbox.sh up"
    root = tmp_path_factory.mktemp("slurm")
    prepare(root, corpus_size=3000)
    assert CONFIGS.is_dir()
    return Sandbox(Small(root), root / "home")


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    """Waits for something while `launch` waits for its job."""
    deadline = time.monotonic() + WAIT_S
    while not happened():
        if process.poll() is not None:
            raise AssertionError(f"launch ended before {what}:\n{process.communicate()[0]}")
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"time ran out before {what}:\n{process.communicate()[0]}")
        time.sleep(0.2)
