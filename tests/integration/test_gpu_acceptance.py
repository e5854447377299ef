"""The acceptance program's dry run: every part of it on this machine, with tiny sizes and real components."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.acceptance import page
from tools.acceptance.part import PARTS
from tools.acceptance.results import read

ROOT = Path(__file__).parents[2]
# What a machine without a GPU, or with one alone, cannot run. Everything else must.
NOT_RUN = {
    "policy": {"fused weight-gradient accumulation"},
    "te": {"update, delayed", "update, tensorwise", "update, blockwise"},
    "tune": {"tiles of the row kernels", "rollout.push_bucket_mib", "overlap of the reduction of gradients", "rollout.enforce_eager"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By part."""
    out = tmp_path_factory.mktemp("acceptance")
    command = [sys.executable, "tools/gpu_acceptance.py", "--dry", "--json", str(out / "json"), "--work", str(out / "work")]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    return {part: read(out / "json" / f"dry-{part}.json") for part in PARTS}


def test_every_part_ran_to_its_end_and_holds(results: dict[str, dict[str, Any]]) -> None:
    for part, found in results.items():
        assert found["dry"] and found["complete"] and found["holds"] and "not run" not in found
        skipped = {name for name, step in found["steps"].items() if "not run" in step}
        assert skipped == NOT_RUN.get(part, set())
        assert all(step.get("checks") for name, step in found["steps"].items() if name in ("generation", "colocated training", "updates"))


def test_a_result_says_where_it_comes_from_and_a_dry_one_reaches_no_goal(results: dict[str, dict[str, Any]]) -> None:
    for found in results.values():
        assert found["versions"]["torch"] and found["time"] and found["settings"] and "git" in found and found["device"] is None
        assert all(goal["reached"] is None and goal["why"] for goal in found["goals"])
    assert {"bf16_tflops", "fp8_tflops", "copy_gb_s"} == set(results["job-1.5b"]["limits"])
    assert results["job-1.5b"]["steps"]["colocated training"]["utilization_of_measured_products"] > 0


def test_the_page_shows_every_part_and_takes_a_dry_run_for_no_measurement(results: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    text = page.render(list(results.values()))
    for part, found in results.items():
        assert f"### `{part}`: {found['title']}" in text
        assert all(goal["goal"] in text for goal in found["goals"])
    assert text.count("A dry run: no measurement.") == len(results)
    assert "| colocated training | update_tokens_per_s |" in text
    for part in results:
        (tmp_path / f"h200-{part}.json").write_text('{"dry": true, "device": null}')
    assert page.measured(tmp_path) == []
