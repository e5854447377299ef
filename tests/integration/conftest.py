"""The small quickstart that tests of the commands share, and runs that several of them compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.small_run import Small, finished, prepare_small, start


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return prepare_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def undisturbed(small: Small) -> Callable[[int], Path]:
    """An NSR run of 10 steps that nothing interrupts, on 1 rank or 2 data-parallel ones, each run once."""
    done: dict[int, Path] = {}

    def run_on(ranks: int) -> Path:
        if ranks not in done:
            run = small.root / f"undisturbed_{ranks}"
            finished(start(small.nsr(run, "run.steps=10"), small.root / f"{run.name}.log", ranks=ranks), 0)
            done[ranks] = run
        return done[ranks]

    return run_on
