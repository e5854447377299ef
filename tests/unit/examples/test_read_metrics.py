"""The example that reads metrics: what it tells of two small runs. On a real run: tests/integration/test_examples.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.read_metrics import LAST, load, pass_at_k, signs


def write_run(path: Path, steps: int, entropy: float) -> Path:
    path.mkdir()
    records = [{"step": step, "policy/entropy": entropy * step, "policy/loss_nsr": -1.0} for step in range(1, steps + 1)]
    records[-1]["eval/MATH/pass@1"] = 0.5
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 99, "torn')
    return path


def test_its_tables_have_every_run_and_step(tmp_path: Path) -> None:
    metrics = load([write_run(tmp_path / "nsr", 4, 1.0), write_run(tmp_path / "psr", 2 * LAST, 2.0)])
    assert len(metrics) == 4 + 2 * LAST and metrics.loc[("psr", 3), "policy/entropy"] == 6.0
    assert pass_at_k(metrics)["eval/MATH/pass@1"].to_dict() == {("nsr", 4): 0.5, ("psr", 2 * LAST): 0.5}
    table = signs(metrics)
    assert table.loc["policy/entropy", "nsr"] == 2.5  # of all 4 steps
    assert table.loc["policy/entropy", "psr"] == pytest.approx(2.0 * (1.5 * LAST + 0.5))  # of the last 10
    assert list(table.index) == ["policy/entropy", "policy/loss_nsr"]
