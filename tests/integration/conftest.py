"""The small quickstart that tests of the commands share, and runs that several of them compare with, each made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.small_run import Small, finished, made_once, prepare_small, start


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all test processes of this session (`pytest -n`)."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def small(shared: Path) -> Small:
    """Its root is for reading: one test process must not see what another one does."""
    root = shared / "small"
    return Small(made_once(root, lambda: prepare_small(root)))


@pytest.fixture(scope="session")
def undisturbed(small: Small, shared: Path) -> Callable[[int], Path]:
    """An NSR run of 10 steps that nothing interrupts, on 1 rank or 2 data-parallel ones."""

    def run_on(ranks: int) -> Path:
        run = shared / f"undisturbed_{ranks}"
        command = small.nsr(run, "run.steps=10")
        return made_once(run, lambda: finished(start(command, shared / f"{run.name}.log", ranks=ranks), 0))

    return run_on
