"""Every part of the acceptance program on this host's GPU, and the Triton kernels as they are launched, not interpreted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.acceptance.part import PARTS
from tools.acceptance.results import read, summary

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base models are made once and shared by the parts."""
    return tmp_path_factory.mktemp("work")


@pytest.mark.parametrize("part", PARTS)
def test_all_that_can_run_of_a_part_holds(part: str, work: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tools/gpu_acceptance.py", "--part", part, "--json", str(tmp_path), "--work", str(work)]
    status = subprocess.run(command, cwd=ROOT).returncode
    (file,) = tmp_path.glob(f"*-{part}.json")
    found = read(file)
    assert status == 0, summary(found)
    assert found["device"] and not found["dry"] and "not run" not in found


def test_the_triton_kernels_agree_with_torch_and_float64() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/unit/losses/triton_program.py"]
    subprocess.run(command, cwd=ROOT, check=True)
