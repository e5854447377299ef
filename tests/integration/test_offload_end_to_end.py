"""A run whose policy leaves its memory to the engine: the numbers, checkpoints and evaluations of one that does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_nsr.observability.metrics import read_metrics
from tests.integration.small_run import Small, finished, start, values


def test_a_run_with_offload_is_the_same_bit_for_bit_also_resumed(small: Small, undisturbed: Callable[[int], Path], tmp_path: Path) -> None:
    run, offload = tmp_path / "run", "training.offload=all"
    finished(start(small.nsr(run, "run.steps=3", offload), tmp_path / "first.log"), 0)
    finished(start(small.nsr(run, "run.steps=10", offload), tmp_path / "resumed.log"), 0)
    plain = undisturbed(1)
    got, want = values(run), values(plain)
    assert got[3:] == want[3:]  # the third step ended a run, with an evaluation
    assert (run / "hf" / "model.safetensors").read_bytes() == (plain / "hf" / "model.safetensors").read_bytes()
    assert all(step["time/offload_s"] > 0 for step in read_metrics(run / "metrics.jsonl"))
